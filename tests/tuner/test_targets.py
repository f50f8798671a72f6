"""The modules that are adapted, also with existing adapters, and with patterns or sizes from an untrusted source."""

import json
import time
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import FalconMambaConfig, FalconMambaForCausalLM

from peft_ravan import RavanConfig
from peft_ravan.tuner import patterns
from peft_ravan.tuner.bases import MAX_EXCESS, BasesShape, check_bases_fit
from peft_ravan.tuner.layer import RavanLayer

from ..conftest import tiny_bert, tiny_llama


SMALL = {"r": 2, "num_heads": 2}
# patterns that PEFT would match; none of them finishes in a reasonable time
ENDLESS = {
    "target_modules": r"(([a-z_.]+)+)+X",
    "exclude_modules": r"([\w.]*)*X",
    "modules_to_save": [r"(.+)+\1X"],
    "rank_pattern": {r"([\w.]{1,9}){1,9}[A-Z]": 1},
    "heads_pattern": {r".*.*.*.*.*.*.*.*.*.*.*.*X": 1},
}


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.l1, self.l2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.l2(self.l1(x))


@pytest.mark.parametrize("target_modules", ["l1.*", ".*", "l1|l1.*base_layer"])
def test_a_second_adapter_does_not_adapt_the_first_one(target_modules):
    model = get_peft_model(TwoLayers(), RavanConfig(target_modules=["l1"], **SMALL))
    model.add_adapter("second", RavanConfig(target_modules=target_modules, **SMALL))
    adapted = {name for name, module in model.named_modules() if isinstance(module, RavanLayer)}
    assert not [name for name in adapted if any(name.startswith(f"{other}.") for other in adapted)]


def test_a_second_adapter_of_the_same_pattern_goes_to_the_same_layers():
    model = get_peft_model(TwoLayers(), RavanConfig(target_modules="l1.*", ravan_dropout=0.1, **SMALL))
    model.add_adapter("second", RavanConfig(target_modules="l1.*", ravan_dropout=0.1, **SMALL))
    [layer] = [module for module in model.modules() if isinstance(module, RavanLayer)]
    assert set(layer.ravan_H) == {"default", "second"}


@pytest.mark.parametrize("field", ENDLESS)
def test_a_pattern_that_does_not_end_is_refused(monkeypatch, field):
    monkeypatch.setattr(patterns, "LIMIT_IN_SECONDS", 1.0)
    model, before = tiny_llama(), time.monotonic()
    fields = {"target_modules": ["q_proj"], "r": 2, "num_heads": 2, field: ENDLESS[field]}
    with pytest.raises(ValueError, match=rf"`{field}` has '.*longer than 1 s. Write the pattern without repetitions"):
        get_peft_model(model, RavanConfig(**fields))
    assert time.monotonic() - before < 60
    assert not any(isinstance(module, RavanLayer) for module in model.modules())


def test_the_limit_holds_where_other_patterns_are_fast(monkeypatch):
    monkeypatch.setattr(patterns, "LIMIT_IN_SECONDS", 2.0)
    config = RavanConfig(target_modules=r".*\.(q|v)_proj", exclude_modules=ENDLESS["target_modules"], **SMALL)
    with pytest.raises(ValueError, match="`exclude_modules` has"):
        get_peft_model(tiny_llama(), config)


@pytest.mark.parametrize("expression", ["(", "*x", "(" * 5000, "(?P<a>x"])
def test_what_is_no_pattern_is_refused(expression):
    with pytest.raises(ValueError, match="`target_modules` has .* which is not a regular expression"):
        get_peft_model(tiny_llama(), RavanConfig(target_modules=expression, **SMALL))


def test_patterns_that_end_are_matched_as_by_peft():
    config = RavanConfig(
        target_modules=r".*layers\.\d+\..*(q|v)_proj$", exclude_modules=r".*\.1\..*", rank_pattern={r".*\.v_proj": 3}, **SMALL
    )  # fmt: skip
    model = get_peft_model(tiny_llama(), config)
    ranks = {
        name[-18:]: module.r["default"] for name, module in model.named_modules() if isinstance(module, RavanLayer)
    }
    assert ranks == {"0.self_attn.q_proj": 2, "0.self_attn.v_proj": 3}


def test_names_need_no_other_process(monkeypatch):
    monkeypatch.setattr(patterns.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a process was started"))
    get_peft_model(tiny_llama(), RavanConfig(target_modules=["q_proj"], rank_pattern={r"^model\.x": 3}, **SMALL))
    get_peft_model(tiny_llama(), RavanConfig(target_modules="all-linear", **SMALL))


@pytest.mark.parametrize("size", [{"r": 10**9, "num_heads": 1}, {"r": 1, "num_heads": 10**9}, {"r": 10**30}])
@pytest.mark.parametrize("init_bases", ["normal", "constant", "shared", "gram_schmidt", "weight_svd"])
def test_sizes_beyond_all_sense_are_refused_before_anything_is_made(tmp_path, init_bases, size):
    model = get_peft_model(tiny_bert(), RavanConfig(task_type="SEQ_CLS", init_bases=init_bases, **SMALL))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **size}))
    with pytest.raises(ValueError, match=r"num_heads \* r at most 16 times that, but for the target 'bert.enc"):
        PeftModel.from_pretrained(tiny_bert(), tmp_path)
    wide = {"rank_pattern": {".*query": size.get("r", 1)}, "heads_pattern": {".*query": size.get("num_heads", 1)}}
    with pytest.raises(ValueError, match="at most 16 times that"):
        get_peft_model(tiny_bert(), RavanConfig(task_type="SEQ_CLS", init_bases=init_bases, **wide))


def test_the_largest_sizes_that_are_allowed():
    check_bases_fit("normal", BasesShape(d_in=8, d_out=2, num_heads=MAX_EXCESS, r=8), "layer")
    for num_heads, r in ((MAX_EXCESS + 1, 8), (1, 9)):
        with pytest.raises(
            ValueError, match=f"'layer' num_heads \\* r = {num_heads} \\* {r} = .*d_in = 8 and d_out = 2"
        ):
            check_bases_fit("normal", BasesShape(d_in=8, d_out=2, num_heads=num_heads, r=r), "layer")


def test_parameters_are_checked_too():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 8, 8))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Experts()

    config = RavanConfig(target_parameters=["experts.weight"], r=10**9, init_bases="normal")
    with pytest.raises(ValueError, match="at most 16 times that"):
        get_peft_model(Model(), config)


# ---- What PEFT tests with the names of LoRA's tensors -----------------------------------


def test_a_missing_tensor_is_told_when_an_adapter_is_loaded(tmp_path):
    get_peft_model(tiny_llama(), RavanConfig(**SMALL)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    missing = next(name for name in state if name.endswith("v_proj.ravan_H"))
    save_file({name: tensor for name, tensor in state.items() if name != missing}, path)
    with pytest.warns(UserWarning, match=f"Found missing adapter keys .*{missing}"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_what_is_trained_can_be_left_on_the_meta_device(task_type):
    config = RavanConfig(target_modules="all-linear", task_type=task_type, **SMALL)
    model = get_peft_model(tiny_llama(), config, low_cpu_mem_usage=True)
    tensors = [tensor for name, tensor in model.named_parameters() if ".ravan_" in name]
    assert tensors and {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_parameter_that_is_the_weight_of_a_layer_is_adapted_as_the_layer():
    layers = get_peft_model(tiny_llama(), RavanConfig(target_modules=["gate_proj"], **SMALL)).eval()
    parameters = RavanConfig(target_modules=[], target_parameters=["gate_proj.weight"], **SMALL)
    parameters = get_peft_model(tiny_llama(), parameters).eval()
    tokens = torch.arange(10).view(2, 5)
    base = layers(tokens).logits
    pairs = list(zip(adapted_layers(layers), adapted_layers(parameters), strict=True))
    for layer, parameter in pairs:
        nn.init.normal_(layer.ravan_H["default"])
        for name in ("ravan_A", "ravan_B", "ravan_H"):
            getattr(parameter, name)["default"].data.copy_(getattr(layer, name)["default"])
    assert len(pairs) == 2 and not torch.allclose(layers(tokens).logits, base, atol=1e-3)
    torch.testing.assert_close(parameters(tokens).logits, layers(tokens).logits, atol=1e-5, rtol=1e-5)


def adapted_layers(model):
    return [module for module in model.modules() if isinstance(module, RavanLayer)]


def test_a_parameter_that_is_parametrized_is_refused():
    model = TwoLayers()
    nn.utils.parametrizations.weight_norm(model.l1)
    with pytest.raises(ValueError, match="'weight' of .*Linear is parametrized, which Ravan does not support"):
        get_peft_model(model, RavanConfig(target_parameters=["l1.weight"], **SMALL))


# ---- Mistakes ------------------------------------------------------------------------------


def test_weights_that_kernels_read_by_themselves_are_refused():
    config = FalconMambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    model = FalconMambaForCausalLM(config)
    with pytest.raises(ValueError, match="'backbone.layers.0.mixer.out_proj' is incompatible with Mamba-based models"):
        get_peft_model(model, RavanConfig(target_modules=["in_proj", "out_proj"], **SMALL))
    assert not adapted_layers(model)
    assert adapted_layers(get_peft_model(model, RavanConfig(target_modules=["in_proj"], **SMALL)))


def test_patterns_that_match_no_target_are_reported():
    fields = {"target_modules": ["q_proj"], "r": 2, "num_heads": 2}
    with pytest.warns(RuntimeWarning, match=r"heads_pattern keys did not match any targeted module .*: \['k_proj'\]"):
        get_peft_model(tiny_llama(), RavanConfig(heads_pattern={"k_proj": 3, r"0\.self_attn\.q_proj": 1}, **fields))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        get_peft_model(tiny_llama(), RavanConfig(heads_pattern={"q_proj": 3}, **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": 5}, {"target_modules": ["q_proj", 5]}, {"modules_to_save": "classifier"}, {"rank_pattern": ["q"]},
        {"save_projection": "no"}, {"layer_replication": [5]}, {"trainable_token_indices": ["a"]}, {"projection_seed": "x"},
        {"init_bases": None}, {"ravan_dropout": "0.1"}, {"fan_in_fan_out": 1}, {"train_scaling": 0}, {"bias": None}, {"heads_pattern": {"q": "2"}},
    ],
)  # fmt: skip
def test_fields_of_another_type_are_refused(fields):
    [name] = fields
    with pytest.raises(ValueError, match=rf"`{name}.*` must be .*, got "):
        RavanConfig(**fields)


def test_a_string_of_parameters_is_refused_as_by_lora():
    with pytest.raises(TypeError, match="`target_parameters` must be a list of strings or None."):
        RavanConfig(target_parameters="linear.weight")
