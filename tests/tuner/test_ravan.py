"""The features of a PEFT method with Ravan, on nn.Linear (Llama) and on Conv1D (GPT-2)."""

import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from peft_ravan import RavanConfig, RavanLayer

from ..conftest import randomize_adapter


def config(**kwargs) -> RavanConfig:
    return RavanConfig(**{"r": 4, "num_heads": 3, "task_type": "CAUSAL_LM", **kwargs})


def adapted(make_causal_lm, seed=0, **kwargs) -> PeftModel:
    model = get_peft_model(make_causal_lm(), config(**kwargs)).eval()
    randomize_adapter(model, seed)
    return model


def ravan_layers(model) -> list[RavanLayer]:
    return [module for module in model.modules() if isinstance(module, RavanLayer)]


def test_fresh_adapter_changes_the_output_by_exactly_zero(make_causal_lm, input_ids):
    base = make_causal_lm().eval()
    expected = base(input_ids).logits
    assert torch.equal(get_peft_model(base, config()).eval()(input_ids).logits, expected)


def test_output_is_that_of_the_sum_over_heads(input_ids):
    layer = nn.Linear(20, 14)
    model = get_peft_model(nn.Sequential(layer), RavanConfig(r=2, num_heads=3, target_modules=["0"]))
    randomize_adapter(model)
    [ravan] = ravan_layers(model)
    H, s = ravan.ravan_H["default"], ravan.ravan_s["default"]
    A, B = ravan.ravan_A["default"], ravan.ravan_B["default"]

    x = torch.randn(5, 7, 20)
    expected = layer(x)
    for i in range(3):
        rows = slice(2 * i, 2 * i + 2)
        expected = expected + s[i] * (x @ A[rows].T @ H[i].T @ B[:, rows].T)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)


def test_tensors_of_a_target(make_causal_lm):
    model = adapted(make_causal_lm)
    layer = ravan_layers(model)[0]
    d_in, d_out = layer.in_features, layer.out_features
    checkpoint = get_peft_model_state_dict(model)
    shapes = {name.rsplit(".", 1)[1]: tuple(tensor.shape) for name, tensor in checkpoint.items()}
    assert shapes == {"ravan_H": (3, 4, 4), "ravan_s": (3,), "ravan_A": (12, d_in), "ravan_B": (d_out, 12)}


def test_only_cores_and_scalings_are_trained(make_causal_lm):
    model = adapted(make_causal_lm)
    trained = {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"ravan_H", "ravan_s"}
    num_trained, _ = model.get_nb_trainable_parameters()
    assert num_trained == len(ravan_layers(model)) * 3 * (4**2 + 1)


def test_print_trainable_parameters(make_causal_lm, capsys):
    model = adapted(make_causal_lm)
    model.print_trainable_parameters()
    assert f"trainable params: {len(ravan_layers(model)) * 51}" in capsys.readouterr().out


def test_training_moves_cores_and_scalings_and_leaves_bases_and_base(make_causal_lm, input_ids):
    model = get_peft_model(make_causal_lm(), config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name.split(".")[-2] for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {"ravan_H", "ravan_s"}


@pytest.mark.parametrize("save_projection", [True, False])
def test_save_and_load(make_causal_lm, input_ids, tmp_path, save_projection):
    model = adapted(make_causal_lm, save_projection=save_projection)
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path)
    kinds = {name.rsplit(".", 1)[1] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert kinds == {"ravan_H", "ravan_s"} | (
        {"ravan_A", "ravan_B"} if save_projection else {"ravan_fingerprint", "ravan_layer"}
    )
    loaded = PeftModel.from_pretrained(make_causal_lm(), tmp_path).eval()
    assert torch.equal(loaded(input_ids).logits, expected)


def test_saved_bases_are_used_and_not_made_again(make_causal_lm, input_ids, tmp_path):
    model = adapted(make_causal_lm)
    for layer in ravan_layers(model):
        layer.ravan_A["default"].mul_(2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_causal_lm(), tmp_path).eval()
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_merge_and_unmerge(make_causal_lm, input_ids):
    model = adapted(make_causal_lm)
    expected, base = model(input_ids).logits, make_causal_lm().eval()(input_ids).logits
    assert not torch.allclose(expected, base, atol=1e-3)
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids).logits, expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(input_ids).logits, expected, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids).logits, base, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("safe_merge", [True, False])
def test_merge_and_unload(make_causal_lm, input_ids, safe_merge):
    model = adapted(make_causal_lm)
    expected = model(input_ids).logits
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not ravan_layers(merged)
    torch.testing.assert_close(merged(input_ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_unload_gives_back_the_base_model(make_causal_lm, input_ids):
    unloaded = adapted(make_causal_lm).unload()
    assert torch.equal(unloaded(input_ids).logits, make_causal_lm().eval()(input_ids).logits)


def test_safe_merge_refuses_a_broken_adapter_and_leaves_the_base(make_causal_lm):
    model = adapted(make_causal_lm)
    layer = ravan_layers(model)[0]
    weight = layer.get_base_layer().weight.clone()
    layer.ravan_H["default"].data[0, 0, 0] = torch.nan
    with pytest.raises(
        ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"
    ):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, weight)


def test_several_adapters(make_causal_lm, input_ids):
    model = adapted(make_causal_lm)
    first = model(input_ids).logits
    model.add_adapter("other", config(r=2, num_heads=5, projection_seed=1, init_bases="normal"))
    model.set_adapter("other")
    randomize_adapter(model, seed=1)
    second = model(input_ids).logits
    assert not torch.allclose(first, second, atol=1e-3)

    model.base_model.set_adapter(["default", "other"])
    both = model(input_ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids).logits, both, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()

    model.set_adapter("default")
    torch.testing.assert_close(model(input_ids).logits, first, atol=1e-5, rtol=1e-5)
    model.delete_adapter("default")
    torch.testing.assert_close(model(input_ids).logits, second, atol=1e-5, rtol=1e-5)
    assert "default" not in get_all_keys(model)


def get_all_keys(model) -> set[str]:
    return {part for name in model.state_dict() for part in name.split(".")}


def test_adapters_of_one_seed_share_their_bases_whatever_their_name(make_causal_lm):
    model = get_peft_model(make_causal_lm(), config(), adapter_name="ward_a")
    model.add_adapter("ward_b", config())
    for layer in ravan_layers(model):
        assert torch.equal(layer.ravan_A["ward_a"], layer.ravan_A["ward_b"])
        assert torch.equal(layer.ravan_B["ward_a"], layer.ravan_B["ward_b"])


def test_adapters_must_agree_on_save_projection(make_causal_lm):
    model = adapted(make_causal_lm)
    with pytest.raises(ValueError, match="`save_projection` must be the same for all adapters"):
        model.add_adapter("other", config(save_projection=False))


def test_modules_to_save_are_trained_and_saved(bert, tmp_path):
    model = get_peft_model(bert, config(task_type="SEQ_CLS")).eval()
    randomize_adapter(model)
    model.save_pretrained(tmp_path)
    assert "base_model.model.classifier.weight" in load_file(tmp_path / "adapter_model.safetensors")


def test_half_precision_base_model(make_causal_lm, input_ids):
    model = get_peft_model(make_causal_lm().to(torch.bfloat16), config()).eval()
    randomize_adapter(model)
    assert all(layer.ravan_H["default"].dtype == torch.float32 for layer in ravan_layers(model))
    logits = model(input_ids).logits
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()


def test_all_linear_and_exclude_modules(make_causal_lm):
    model = get_peft_model(
        make_causal_lm(), config(target_modules="all-linear", exclude_modules=".*layers?.1.*|.*h.1.*")
    )
    names = model.base_model.targeted_module_names
    assert names and not [name for name in names if ".1." in name or "lm_head" in name]


def test_targets_that_are_not_supported_are_refused_before_anything_changes():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.GRU(16, 16)})
    with pytest.raises(TypeError, match="Target module 'b' is a GRU, which Ravan does not support"):
        get_peft_model(model, RavanConfig(r=2, target_modules=["a", "b"]))
    assert type(model["a"]) is nn.Linear


def test_the_projection_of_multihead_attention_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)})
    with pytest.raises(TypeError, match="'attention.out_proj' is the output projection of an `nn.MultiheadAttention`"):
        get_peft_model(model, RavanConfig(r=2, target_modules=["out_proj"]))


def test_bases_that_do_not_fit_are_refused_before_anything_changes():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 8)})
    with pytest.raises(ValueError, match="target 'b' num_heads . r = 4 . 16 = 64, d_in = 64 and d_out = 8"):
        get_peft_model(model, RavanConfig(target_modules=["a", "b"]))
    assert type(model["a"]) is nn.Linear


@pytest.mark.parametrize("bias", ["all", "ravan_only"])
def test_biases_are_trained_saved_and_warned_of(bias, tmp_path, input_ids):
    from ..conftest import tiny_bert

    model = get_peft_model(tiny_bert(), config(bias=bias, task_type=None)).eval()
    randomize_adapter(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith(".bias")}
    adapted = {name for name in trained if ".query." in name or ".value." in name}
    assert len(adapted) == 2 and (trained == adapted) == (bias == "ravan_only")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    with pytest.warns(UserWarning, match=f"bias configured to be '{bias}'"), model.disable_adapter():
        pass


def test_pickling(make_causal_lm, input_ids):
    model = adapted(make_causal_lm)
    copy = pickle.loads(pickle.dumps(model))
    assert torch.equal(copy(input_ids).logits, model(input_ids).logits)
    assert copy.peft_config["default"].peft_type is model.peft_config["default"].peft_type


def test_layers_to_transform(make_causal_lm):
    model = get_peft_model(make_causal_lm(), config(layers_to_transform=[1]))
    names = model.base_model.targeted_module_names
    assert names and all(".1." in name for name in names)


def test_default_targets_of_the_usual_architectures(bert):
    model = get_peft_model(bert, RavanConfig(r=4))
    assert {name.rsplit(".", 1)[1] for name in model.base_model.targeted_module_names} == {"query", "value"}


def test_repr_shows_the_method():
    model = get_peft_model(nn.Sequential(nn.Linear(16, 16)), RavanConfig(r=2, target_modules=["0"]))
    assert "ravan.Linear" in repr(model)
