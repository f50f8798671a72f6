"""The LoRA twin of a Ravan adapter: the same output, without peft-ravan, for every kind of target that LoRA knows."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.conversion import save_as_lora
from safetensors.torch import load_file, save_file
from torch import nn

from peft_ravan import RavanConfig, to_lora
from peft_ravan.sharing.conversion import lora_twin
from peft_ravan.tuner.linalg import svd_of_heads

from ..conftest import randomize_adapter, tiny_bert, tiny_gpt2, tiny_llama
from ..forked import run_clean
from ..properties import examples


def adapted(base: nn.Module, scale: float = 0.3, **kwargs) -> PeftModel:
    fields = {"r": 4, "num_heads": 3, **kwargs}
    model = get_peft_model(base, RavanConfig(**fields)).eval()
    randomize_adapter(model, scale=scale)
    return model


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model.eval()(x)
    return getattr(result, "logits", result)


def assert_same_output(
    twin: nn.Module, model: nn.Module, base: nn.Module, x: torch.Tensor, atol: float = 1e-5
) -> None:
    expected = output(model, x)
    assert not torch.allclose(expected, output(base, x), atol=100 * atol)
    torch.testing.assert_close(output(twin, x), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("source", ["model", "folder", "folder without bases"])
def test_the_twin_gives_the_same_output(make_causal_lm, input_ids, tmp_path, source):
    model = adapted(make_causal_lm(), task_type="CAUSAL_LM", save_projection=source != "folder without bases")
    model.save_pretrained(tmp_path / "ravan")
    config = to_lora(model if source == "model" else tmp_path / "ravan", tmp_path / "lora")
    assert config.r == config.lora_alpha == 12 and not config.rank_pattern
    twin = PeftModel.from_pretrained(make_causal_lm(), tmp_path / "lora")
    assert_same_output(twin, model, make_causal_lm(), input_ids)


WITHOUT_PEFT_RAVAN = """
import sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "peft_ravan":
            raise ImportError("blocked")

sys.meta_path.insert(0, Blocker())
try:
    import peft_ravan
except ImportError:
    pass
else:
    sys.exit("the import was not blocked")
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

tokens = load_file("tokens.safetensors")["tokens"]
for name in ("llama", "gpt2"):
    base = AutoModelForCausalLM.from_pretrained(f"{name}-base")
    model = PeftModel.from_pretrained(base, f"{name}-lora").eval()
    save_file({"logits": model(tokens).logits.detach()}, f"{name}-logits.safetensors")
assert not any(name.startswith("peft_ravan") for name in sys.modules)
"""


def test_the_twin_loads_where_peft_ravan_cannot_be_imported(input_ids, tmp_path):
    models = {"llama": tiny_llama(), "gpt2": tiny_gpt2()}
    for name, base in models.items():
        base.save_pretrained(tmp_path / f"{name}-base")
        models[name] = adapted(base, task_type="CAUSAL_LM")
        to_lora(models[name], tmp_path / f"{name}-lora")
    save_file({"tokens": input_ids}, tmp_path / "tokens.safetensors")
    exit_code, errors = run_clean(WITHOUT_PEFT_RAVAN, tmp_path)
    assert exit_code == 0, errors
    for name, model in models.items():
        logits = load_file(tmp_path / f"{name}-logits.safetensors")["logits"]
        torch.testing.assert_close(logits, output(model, input_ids), atol=1e-5, rtol=0)


def test_the_head_of_a_classifier_is_carried_over_or_left_out(input_ids, tmp_path):
    model = adapted(tiny_bert(), task_type="SEQ_CLS", target_modules=["query", "dense"])
    config = to_lora(model, tmp_path / "lora")
    assert config.modules_to_save == ["classifier", "score"]
    assert_same_output(PeftModel.from_pretrained(tiny_bert(), tmp_path / "lora"), model, tiny_bert(), input_ids)

    config = to_lora(model, tmp_path / "only_lora", include_modules_to_save=False)
    assert config.modules_to_save is None
    names = load_file(tmp_path / "only_lora" / "adapter_model.safetensors")
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": "all"},
        {"bias": "ravan_only"},
        {"trainable_token_indices": {"embed_tokens": [3, 5]}},
        {"target_modules": "all-linear", "layers_to_transform": None},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"], "save_projection": False},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"init_bases": "normal"},
        {"init_bases": "shared", "save_projection": False},
        {"init_bases": "weight_svd"},
    ],
    ids=str,
)
def test_fields_that_a_twin_takes_over(fields, input_ids, tmp_path):
    def base():
        torch.manual_seed(0)
        return tiny_llama()

    model = adapted(base(), task_type="CAUSAL_LM", **fields)
    model.save_pretrained(tmp_path / "ravan")
    to_lora(tmp_path / "ravan", tmp_path / "lora")
    twin = PeftModel.from_pretrained(base(), tmp_path / "lora")
    assert_same_output(twin, model, base(), input_ids)


@pytest.mark.parametrize("same_rank", [False, True])
def test_targets_of_different_rank(input_ids, tmp_path, same_rank):
    patterns = {"rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 3}, "heads_pattern": {"v_proj": 5}}
    model = adapted(tiny_llama(), task_type="CAUSAL_LM", **patterns)
    config = to_lora(model, tmp_path / "lora", same_rank=same_rank)
    assert config.r == 12
    assert sorted(config.rank_pattern.values()) == ([] if same_rank else [9, 10, 10])
    assert config.rank_pattern == config.alpha_pattern
    twin = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    assert_same_output(twin, model, tiny_llama(), input_ids)
    scalings = {module.scaling["default"] for module in twin.modules() if isinstance(module, LoraLayer)}
    assert scalings == {1.0}


def test_a_name_is_no_pattern_of_a_longer_name_that_ends_with_it(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 12), nn.Sequential(nn.Linear(12, 12)))

    model = adapted(base(), target_modules=["0", "1.0"], r=3, num_heads=2, rank_pattern={"^0": 2})
    config = to_lora(model, tmp_path, same_rank=False)
    assert config.rank_pattern == {"^0": 4}
    twin = PeftModel.from_pretrained(base(), tmp_path)
    assert_same_output(twin, model, base(), torch.randn(5, 12))


def scalings(config: LoraConfig, state: dict[str, torch.Tensor]) -> dict[str, set[float]]:
    """What PEFT, vLLM and llama.cpp multiply the products of a file with, all targets together."""
    ranks = {name: len(tensor) for name, tensor in state.items() if ".lora_A." in name}
    return {
        "peft": {config.lora_alpha / config.r, *(config.alpha_pattern[k] / r for k, r in config.rank_pattern.items())},
        "vllm": {config.lora_alpha / config.r},
        "llama.cpp": {config.lora_alpha / rank for rank in ranks.values()},
    }


@pytest.mark.parametrize("rank", [None, 3, 0.9])
def test_rules_of_vllm_and_llama_cpp(rank, tmp_path):
    """Read from their sources, see docs/sharing.md."""
    fields = {"modules_to_save": ["lm_head"], "rank_pattern": {"v_proj": 2}, "target_modules": "all-linear"}
    model = adapted(tiny_llama(), task_type="CAUSAL_LM", **fields)
    to_lora(model, tmp_path, rank=rank, include_modules_to_save=False)
    config, state = LoraConfig.from_pretrained(str(tmp_path)), load_file(tmp_path / "adapter_model.safetensors")
    assert set().union(*scalings(config, state).values()) == {1.0}
    # vLLM: the fields that it refuses, and the rank that it compares with `max_lora_rank`
    assert config.modules_to_save is None and config.bias == "none" and not (config.use_dora or config.use_rslora)
    assert config.r == max(len(tensor) for name, tensor in state.items() if ".lora_A." in name)
    # both: every name is that of a module, with A and B for each, of two dimensions, one rank and one dtype
    modules = {name for name, _ in tiny_llama().named_modules()}
    pattern = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
    found = {pattern.fullmatch(name).groups() for name in state}
    targets = {name for name, _ in found}
    assert found == {(name, letter) for name in targets for letter in "AB"}
    assert targets <= modules and targets == set(config.target_modules) and len(targets) == 14
    for name in targets:
        A, B = (state[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        assert A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1] and A.dtype == B.dtype == torch.float32


def test_llama_cpp_needs_the_same_rank():
    model = adapted(tiny_llama(), task_type="CAUSAL_LM", rank_pattern={"v_proj": 2})
    assert scalings(*lora_twin(model)) == {"peft": {1.0}, "vllm": {1.0}, "llama.cpp": {1.0}}
    assert scalings(*lora_twin(model, same_rank=False)) == {"peft": {1.0}, "vllm": {1.0}, "llama.cpp": {1.0, 2.0}}


class Convolutions(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, **kwargs)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("save_projection", [True, False])
def test_convolutions(tmp_path, save_projection):
    fields = {"target_modules": ["conv", "head"], "r": 2, "num_heads": 1, "save_projection": save_projection}
    model = adapted(Convolutions(), scale=1.0, **fields)
    model.save_pretrained(tmp_path / "ravan")
    to_lora(tmp_path / "ravan", tmp_path / "lora")
    twin = PeftModel.from_pretrained(Convolutions(), tmp_path / "lora")
    assert_same_output(twin, model, Convolutions(), torch.randn(2, 4, 9, 9))


@pytest.mark.parametrize("fields", [{"groups": 2}, {"dilation": 2}, {"padding_mode": "circular"}], ids=str)
def test_convolutions_that_lora_computes_in_another_way_are_refused(tmp_path, fields):
    model = adapted(Convolutions(**fields), target_modules=["conv"], r=2, num_heads=1)
    model.save_pretrained(tmp_path / "ravan")
    for source in (model, tmp_path / "ravan"):
        with pytest.raises(ValueError, match="LoRA cannot express the adapter of 'conv'"):
            to_lora(source, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


class Experts(nn.Module):
    def __init__(self, is_transposed: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.is_transposed = is_transposed
        shape = (3, 10, 12) if is_transposed else (3, 12, 10)
        self.up = nn.Parameter(torch.randn(shape))
        self.down = nn.Parameter(torch.randn(3, 12, 10) if is_transposed else torch.randn(3, 10, 12))

    def forward(self, x):
        up, down = (w if self.is_transposed else w.transpose(1, 2) for w in (self.up, self.down))
        return torch.einsum("eno,eod->nd", (x @ up).relu(), down)


class Mixture(nn.Module):
    def __init__(self, is_transposed: bool = False):
        super().__init__()
        self.experts = Experts(is_transposed)
        self.out = nn.Linear(10, 4)

    def forward(self, x):
        return self.out(self.experts(x))


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("rank", [None, 4])
def test_experts(tmp_path, is_transposed, rank):
    fields = {"target_parameters": ["experts.up", "experts.down"], "r": 2, "num_heads": 2}
    model = adapted(Mixture(is_transposed), **fields, target_modules=["out"], rank_pattern={"out": 1})
    model.save_pretrained(tmp_path / "ravan")
    to_lora(tmp_path / "ravan", tmp_path / "lora", rank=rank)
    twin = PeftModel.from_pretrained(Mixture(is_transposed), tmp_path / "lora")
    assert_same_output(twin, model, Mixture(is_transposed), torch.randn(5, 10), atol=1e-4)


def test_small_files_of_experts_need_the_model(tmp_path):
    fields = {"target_parameters": ["experts.up"], "r": 2, "num_heads": 2, "save_projection": False}
    model = adapted(Mixture(), **fields)
    model.save_pretrained(tmp_path / "ravan")
    with pytest.raises(ValueError, match="made from the name of the parameter"):
        to_lora(tmp_path / "ravan", tmp_path / "lora")
    to_lora(model, tmp_path / "lora")
    twin = PeftModel.from_pretrained(Mixture(), tmp_path / "lora")
    assert_same_output(twin, model, Mixture(), torch.randn(5, 10), atol=1e-4)


def test_bfloat16(input_ids, tmp_path):
    base = tiny_llama().to(torch.bfloat16)
    model = get_peft_model(base, RavanConfig(r=4, num_heads=3, task_type="CAUSAL_LM"), autocast_adapter_dtype=False)
    randomize_adapter(model, scale=0.3)
    to_lora(model, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}
    twin = PeftModel.from_pretrained(tiny_llama().to(torch.bfloat16), tmp_path, autocast_adapter_dtype=False)
    difference = (output(twin, input_ids) - output(model, input_ids)).abs().max()
    effect = (output(twin, input_ids) - output(tiny_llama().to(torch.bfloat16), input_ids)).abs().max()
    assert difference < 0.02 < 0.2 < effect

    to_lora(adapted(tiny_llama()), tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_all_heads_are_converted_while_only_some_are_trained(input_ids, tmp_path):
    model = adapted(tiny_llama(), task_type="CAUSAL_LM")
    model.set_trained_heads({name: [False, True, False] for name in model.trained_heads()})
    to_lora(model, tmp_path)
    assert_same_output(PeftModel.from_pretrained(tiny_llama(), tmp_path), model, tiny_llama(), input_ids)


def test_one_of_several_adapters_and_a_combination(input_ids, tmp_path):
    model = adapted(tiny_llama(), task_type="CAUSAL_LM")
    model.add_adapter("other", RavanConfig(r=4, num_heads=3, task_type="CAUSAL_LM", projection_seed=1))
    model.set_adapter("other")
    randomize_adapter(model, seed=1, scale=0.3)
    model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "both")
    for name, rank in (("other", 12), ("both", 24)):
        model.set_adapter(name)
        assert to_lora(model, tmp_path / name, adapter_name=name).r == rank
        assert_same_output(PeftModel.from_pretrained(tiny_llama(), tmp_path / name), model, tiny_llama(), input_ids)


def test_an_adapter_that_transformers_put_into_the_model(input_ids, tmp_path):
    model = tiny_llama()
    model.add_adapter(RavanConfig(r=4, num_heads=3, task_type="CAUSAL_LM"))
    randomize_adapter(model, scale=0.3)
    to_lora(model, tmp_path)
    assert_same_output(PeftModel.from_pretrained(tiny_llama(), tmp_path), model, tiny_llama(), input_ids)


def test_pefts_own_conversion_is_exact_at_the_full_rank(make_causal_lm, input_ids, tmp_path):
    model = adapted(make_causal_lm(), task_type="CAUSAL_LM")
    save_as_lora(tmp_path, model, rank=12)
    assert_same_output(PeftModel.from_pretrained(make_causal_lm(), tmp_path), model, make_causal_lm(), input_ids)


def delta(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return (state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]).double()


@pytest.mark.parametrize("init_bases", ["gram_schmidt", "normal", "constant"])
def test_a_truncated_twin_is_the_best_of_its_rank(init_bases):
    base = nn.Sequential(nn.Linear(20, 14))
    model = adapted(base, target_modules=["0"], r=3, num_heads=2, init_bases=init_bases)
    full = model.base_model.model[0].get_delta_weight("default").double()
    singular_values = torch.linalg.svdvals(full)
    for rank in (1, 2, 4):
        config, state = lora_twin(model, rank=rank)
        assert config.r == rank and state["base_model.model.0.lora_A.weight"].shape == (rank, 20)
        error = torch.linalg.norm(full - delta(state, "base_model.model.0"))
        torch.testing.assert_close(error, singular_values[rank:].norm(), atol=1e-5, rtol=1e-5)


def test_a_share_of_the_energy_at_each_target():
    base = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    model = adapted(base, target_modules=["0", "1"], r=2, num_heads=2)
    # singular values 10, 1, 0.1, 0: energies of 100, 1 and 0.01; and all the same
    for layer, values in zip(base, ([10.0, 1.0, 0.1, 0.0], [3.0, 3.0, 3.0, 3.0]), strict=True):
        layer.ravan_H["default"].data = torch.tensor(values).reshape(2, 2).diag_embed()
        layer.ravan_s["default"].data.fill_(1)
    for share, ranks in ((0.9, [1, 4]), (0.5, [1, 2]), (0.999, [2, 4]), (1.0, [3, 4])):
        _, state = lora_twin(model, rank=share, same_rank=False)
        assert [len(state[f"base_model.model.{name}.lora_A.weight"]) for name in "01"] == ranks


def test_an_adapter_of_zeros_has_a_twin(tmp_path):
    model = get_peft_model(tiny_llama(), RavanConfig(r=4, num_heads=3))
    assert to_lora(model, tmp_path, rank=0.99).r == 1
    PeftModel.from_pretrained(tiny_llama(), tmp_path)


@examples(20)
@given(
    num_heads=st.integers(1, 4),
    r=st.integers(1, 4),
    d_in=st.integers(2, 20),
    d_out=st.integers(2, 20),
    orthonormal=st.booleans(),
)
def test_the_decomposition_from_small_matrices_is_that_of_the_product(num_heads, r, d_in, d_out, orthonormal):
    A, B = torch.randn(num_heads * r, d_in), torch.randn(d_out, num_heads * r)
    if orthonormal and num_heads * r <= min(d_in, d_out):
        A, B = torch.linalg.qr(A.T).Q.T, torch.linalg.qr(B).Q
    products = torch.randn(num_heads, r, r)
    U, S, Vh = svd_of_heads(A, B, products)
    full = (B @ torch.block_diag(*products) @ A).double()
    torch.testing.assert_close((U * S) @ Vh, full, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(S, torch.linalg.svdvals(full)[: len(S)], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(U.T @ U, torch.eye(len(S), dtype=U.dtype), atol=1e-4, rtol=0)


def test_a_large_layer_is_never_decomposed_as_a_whole(monkeypatch):
    model = adapted(nn.Sequential(nn.Linear(600, 500, bias=False)), target_modules=["0"])
    shapes = []
    svd = torch.linalg.svd
    monkeypatch.setattr(
        torch.linalg, "svd", lambda matrix, **kwargs: (shapes.append(matrix.shape), svd(matrix, **kwargs))[1]
    )
    lora_twin(model, rank=5)
    assert shapes == [(3, 4, 4)]
    model.base_model.model[0].ravan_A["default"][0].mul_(2)  # no longer orthonormal, up to a scale
    lora_twin(model, rank=5)
    assert shapes[1:] == [(12, 12)]


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, True, "8"])
def test_ranks_out_of_range(tmp_path, rank):
    with pytest.raises(ValueError, match="`rank`"):
        to_lora(adapted(tiny_llama()), tmp_path / "lora", rank=rank)
    assert not (tmp_path / "lora").exists()


def test_what_is_no_ravan_adapter_is_refused(tmp_path):
    lora = get_peft_model(tiny_llama(), LoraConfig())
    with pytest.raises(ValueError, match="but this one is of LORA"):
        to_lora(lora, tmp_path / "lora")
    with pytest.raises(FileNotFoundError, match="has no adapter_config.json"):
        to_lora(tmp_path, tmp_path / "lora")
    with pytest.raises(ValueError, match=r"no adapter 'mine'. Its adapters are \['default'\]"):
        to_lora(adapted(tiny_llama()), tmp_path / "lora", adapter_name="mine")
    broken = adapted(tiny_llama())
    broken.base_model.model.model.layers[0].self_attn.q_proj.ravan_H["default"].data[0, 0, 0] = float("nan")
    with pytest.raises(
        ValueError, match="The core of 'model.layers.0.self_attn.q_proj' has entries that are not finite"
    ):
        to_lora(broken, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
