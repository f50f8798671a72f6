"""Parameters that are not weights of layers: the experts of a mixture, in both layouts."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from peft_ravan import RavanConfig
from peft_ravan.tuner.param_wrapper import ParamWrapper

from ..conftest import randomize_adapter


class Experts(nn.Module):
    """Three experts that all see all inputs."""

    def __init__(self, is_transposed: bool):
        super().__init__()
        torch.manual_seed(0)
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, 12, 20) if is_transposed else torch.randn(3, 20, 12))
        self.down = nn.Parameter(torch.randn(3, 20, 12) if is_transposed else torch.randn(3, 12, 20))

    def forward(self, x):
        up, down = (p if self.is_transposed else p.transpose(1, 2) for p in (self.up, self.down))
        return (torch.relu(x @ up) @ down).sum(dim=0)


class Model(nn.Module):
    def __init__(self, is_transposed=True):
        super().__init__()
        self.experts = Experts(is_transposed)

    def forward(self, x):
        return self.experts(x)


def config(**kwargs) -> RavanConfig:
    defaults = {"r": 2, "num_heads": 3, "target_parameters": ["experts.up", "experts.down"], "target_modules": []}
    return RavanConfig(**{**defaults, **kwargs})


@pytest.fixture(params=[True, False], ids=["[E, in, out]", "[E, out, in]"])
def is_transposed(request):
    return request.param


def wrappers(model) -> dict[str, ParamWrapper]:
    return {m.parameter_name: m for m in model.modules() if isinstance(m, ParamWrapper)}


def test_each_expert_has_cores_of_its_own_and_all_share_the_bases(is_transposed):
    model = get_peft_model(Model(is_transposed), config())
    found = wrappers(model)
    assert set(found) == {"up", "down"}
    up = found["up"]
    assert up.ravan_H["default"].shape == (9, 2, 2) and up.ravan_s["default"].shape == (9,)
    assert up.ravan_A["default"].shape == (6, 12) and up.ravan_B["default"].shape == (20, 6)

    randomize_adapter(model)
    A, B, H, s = up.adapter_tensors("default")
    for expert in range(3):
        own = slice(3 * expert, 3 * expert + 3)
        expected = B @ torch.block_diag(*(s[own, None, None] * H[own])) @ A
        delta = up.get_delta_weight("default")[expert]
        torch.testing.assert_close(delta.T if is_transposed else delta, expected, atol=1e-5, rtol=1e-5)


def test_output_merge_and_unload(is_transposed):
    base, x = Model(is_transposed), torch.randn(4, 12)
    fresh = base(x)
    model = get_peft_model(base, config())
    assert torch.equal(model(x), fresh)
    randomize_adapter(model)
    output = model(x)
    assert not torch.allclose(output, fresh, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(x), fresh)
    model.merge_adapter()
    torch.testing.assert_close(model(x), output, atol=1e-3, rtol=1e-4)
    model.unmerge_adapter()
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged.experts) is Experts
    torch.testing.assert_close(merged(x), output, atol=1e-3, rtol=1e-4)


def test_training_and_saving(is_transposed, tmp_path):
    model, x = get_peft_model(Model(is_transposed), config()), torch.randn(4, 12)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"ravan_H", "ravan_s"}
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Model(is_transposed), tmp_path)(x), model(x))


def test_a_second_adapter_goes_into_the_same_wrapper(is_transposed):
    model, x = get_peft_model(Model(is_transposed), config()), torch.randn(4, 12)
    randomize_adapter(model)
    first = model(x)
    model.add_adapter("other", config(projection_seed=1))
    assert len(wrappers(model)) == 2
    model.set_adapter("other")
    randomize_adapter(model, seed=1)
    assert not torch.allclose(model(x), first, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(model(x), first)


def test_a_mixture_of_experts_of_transformers(tmp_path):
    torch.manual_seed(0)
    base = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4,
        )
    ).eval()  # fmt: skip
    tokens = torch.randint(0, 64, (2, 7))
    expected = base(tokens).logits
    fields = {"task_type": "CAUSAL_LM", "target_parameters": ["mlp.experts.down_proj"], "target_modules": ["q_proj"]}
    model = get_peft_model(base, config(**fields)).eval()
    assert torch.equal(model(tokens).logits, expected)
    randomize_adapter(model, scale=0.1)
    adapted = model(tokens).logits
    assert not torch.allclose(adapted, expected, atol=1e-4)
    torch.testing.assert_close(model.merge_and_unload()(tokens).logits, adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"ravan_dropout": 0.1}, "`target_parameters` does not work with `ravan_dropout`"),
        ({"init_bases": "weight_svd"}, "does not work with init_bases='weight_svd'"),
    ],
)
def test_what_is_not_supported_is_reported(fields, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(Model(), config(**fields))


def test_adapters_must_name_the_same_parameters():
    model = get_peft_model(Model(), config())
    with pytest.raises(ValueError, match="same set of parameters, or none, but got .* and "):
        model.add_adapter("other", config(target_parameters=["experts.up"]))


def test_layer_replication():
    from ..conftest import tiny_llama

    model = get_peft_model(tiny_llama(), RavanConfig(r=3, num_heads=2, layer_replication=[(0, 2), (1, 2)]))
    layers = model.base_model.model.model.layers
    assert len(layers) == 3
    assert layers[1].self_attn.q_proj.base_layer.weight is layers[2].self_attn.q_proj.base_layer.weight
    first, second = (layers[i].self_attn.q_proj.ravan_A["default"] for i in (1, 2))
    assert not torch.equal(first, second)


def test_layers_are_not_replicated_if_the_adapter_does_not_fit():
    from ..conftest import tiny_llama

    model = tiny_llama()
    with pytest.raises(ValueError, match="d_in = 32"):
        get_peft_model(model, RavanConfig(r=16, num_heads=4, layer_replication=[(0, 2), (1, 2)]))
    assert len(model.model.layers) == 2


def test_tied_modules_to_save_stay_tied(tmp_path):
    from ..conftest import tiny_gpt2

    model = get_peft_model(
        tiny_gpt2(), RavanConfig(r=3, num_heads=2, modules_to_save=["lm_head"], ensure_weight_tying=True)
    )
    embeddings, head = model.base_model.model.transformer.wte, model.base_model.model.lm_head
    assert embeddings.modules_to_save["default"].weight is head.modules_to_save["default"].weight
