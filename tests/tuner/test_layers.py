"""The types of layers, each compared with the dense weight update that it represents."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ravan import RavanConfig, RavanLayer
from peft_ravan.tuner.functional import delta_weight

from ..conftest import randomize_adapter
from .helpers import LAYERS


@pytest.fixture(params=LAYERS, ids=str)
def adapted(request):
    """A model of one adapted layer, that layer, and an input."""
    make_layer, make_input = LAYERS[request.param]
    config = RavanConfig(r=2, num_heads=3, target_modules=["0"], init_bases="normal")
    model = get_peft_model(nn.Sequential(make_layer()), config).eval()
    return model, model.base_model.model[0], make_input()


def test_fresh_adapter_changes_nothing(adapted):
    model, layer, x = adapted
    assert torch.equal(model(x), layer.base_layer(x))


def test_output_is_that_of_the_dense_weight(adapted):
    model, layer, x = adapted
    randomize_adapter(model)
    output = model(x)
    layer.base_layer.weight.data += layer.get_delta_weight("default")
    torch.testing.assert_close(output, layer.base_layer(x), atol=1e-5, rtol=1e-5)


def test_merge_unmerge_and_unload(adapted):
    model, layer, x = adapted
    randomize_adapter(model)
    base, output = layer.base_layer(x), model(x)
    assert not torch.allclose(base, output, atol=1e-3)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), output, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer(x), base, atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload()
    assert not isinstance(merged[0], RavanLayer)
    torch.testing.assert_close(merged(x), output, atol=1e-5, rtol=1e-5)


def test_gradients_reach_cores_and_scalings(adapted):
    model, layer, x = adapted
    randomize_adapter(model)
    model(x).square().sum().backward()
    assert layer.ravan_H["default"].grad.any() and layer.ravan_s["default"].grad.any()


def test_mixed_batches_give_each_sample_its_adapter(adapted):
    model, _, x = adapted
    randomize_adapter(model, seed=0)
    model.add_adapter("other", RavanConfig(r=3, num_heads=1, target_modules=["0"], init_bases="normal"))
    model.set_adapter("other")
    randomize_adapter(model, seed=1)
    expected = {"other": model(x)}
    model.set_adapter("default")
    expected["default"] = model(x)
    with model.disable_adapter():
        expected["__base__"] = model(x)
    names = ["default", "__base__", "other", "default"]
    mixed = model(x, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], expected[name][row], atol=1e-5, rtol=1e-5)


def test_sizes_by_target():
    model = nn.ModuleDict({"query": nn.Linear(16, 16), "value": nn.Linear(16, 16)})
    config = RavanConfig(
        r=4, num_heads=2, target_modules=["query", "value"], rank_pattern={"value": 3}, heads_pattern={"quer.": 1}
    )
    model = get_peft_model(model, config).base_model.model
    assert model["query"].ravan_H["default"].shape == (1, 4, 4)
    assert model["value"].ravan_H["default"].shape == (2, 3, 3)
    assert "default: 2 heads of rank 3, gram_schmidt bases" in repr(model["value"])


def test_singular_directions_of_the_weight():
    """One head is LoRA-XS (Balazy et al., 2024), without the singular values in front of the core."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(20, 14)),
        RavanConfig(r=5, num_heads=1, target_modules=["0"], init_bases="weight_svd", bases_scale="paper"),
    )
    layer = model.base_model.model[0]
    U, S, Vh = torch.linalg.svd(layer.base_layer.weight)
    R = torch.randn(5, 5)
    lora_xs = (U[:, :5] * S[:5]) @ R @ Vh[:5]
    # the SVD does not determine the signs of pairs of directions
    signs = (layer.ravan_B["default"] * U[:, :5]).sum(dim=0).round()
    layer.ravan_H["default"].data[0] = signs[:, None] * (S[:5, None] * R) * signs
    torch.testing.assert_close(layer.get_delta_weight("default"), lora_xs, atol=1e-5, rtol=1e-5)


def test_blocks_of_singular_directions_go_to_the_heads_in_order():
    model = get_peft_model(
        nn.Sequential(Conv1D(40, 60)),
        RavanConfig(r=4, num_heads=2, target_modules=["0"], init_bases="weight_svd", bases_scale="paper"),
    )
    layer = model.base_model.model[0]
    weight = layer.base_layer.weight.T  # [d_out, d_in]
    A, B = layer.ravan_A["default"], layer.ravan_B["default"]
    captured = torch.einsum("oi,od,di->i", B, weight, A.T)
    torch.testing.assert_close(captured, torch.linalg.svdvals(weight)[:8], atol=1e-4, rtol=1e-4)


def test_adapters_with_bases_of_the_weight_load_what_was_saved(tmp_path):
    from peft import PeftModel

    base = nn.Sequential(nn.Linear(20, 14))
    state = base.state_dict()
    config = RavanConfig(r=2, num_heads=3, target_modules=["0"], init_bases="weight_svd", save_projection=False)
    model = get_peft_model(base, config)
    randomize_adapter(model)
    x = torch.randn(3, 20)
    expected = model(x)
    model.save_pretrained(tmp_path)
    fresh = nn.Sequential(nn.Linear(20, 14))
    fresh.load_state_dict({name.replace("base_layer.", ""): t for name, t in state.items() if "ravan" not in name})
    torch.testing.assert_close(PeftModel.from_pretrained(fresh, tmp_path)(x), expected)


def test_the_rank_of_the_update_is_that_of_the_bases():
    def rank(init_bases):
        model = get_peft_model(
            nn.Sequential(nn.Linear(40, 30)),
            RavanConfig(r=4, num_heads=3, target_modules=["0"], init_bases=init_bases, init_weights=False),
        )
        return torch.linalg.matrix_rank(model.base_model.model[0].get_delta_weight("default"), rtol=1e-5).item()

    ranks = {name: rank(name) for name in ("gram_schmidt", "normal", "weight_svd", "constant", "shared")}
    assert ranks == {"gram_schmidt": 12, "normal": 12, "weight_svd": 12, "constant": 4, "shared": 4}


def test_one_head_with_shared_bases_is_of_rank_r():
    config = RavanConfig(r=4, num_heads=1, target_modules=["0"], init_bases="shared", init_weights=False)
    layer = get_peft_model(nn.Sequential(nn.Linear(40, 30)), config).base_model.model[0]
    assert torch.linalg.matrix_rank(layer.get_delta_weight("default"), rtol=1e-5) == 4


def test_delta_weight_of_layers_is_that_of_their_tensors(adapted):
    _, layer, _ = adapted
    dense = delta_weight(*layer.adapter_tensors("default"))
    assert layer.get_delta_weight("default").shape == layer.base_layer.weight.shape
    assert layer.to_weight_layout(dense).shape == layer.base_layer.weight.shape


def test_trained_tensors_in_another_dtype_than_the_bases(adapted):
    """TRL casts what is trained on a quantised model to bfloat16, and frozen bases stay as they are."""
    model, layer, x = adapted
    randomize_adapter(model)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16().float()
    output, delta = model(x), layer.get_delta_weight("default")
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    assert layer.ravan_H["default"].dtype == torch.bfloat16 and layer.ravan_A["default"].dtype == torch.float32
    # a linear layer may have been computed with one dense product before
    torch.testing.assert_close(model(x), output, atol=1e-5, rtol=1e-5)
    assert torch.equal(layer.get_delta_weight("default"), delta)
    model(x).square().sum().backward()
    assert layer.ravan_H["default"].grad.any() and layer.ravan_s["default"].grad.any()
