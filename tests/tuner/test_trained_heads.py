"""Training only some heads, compared with the same heads when all are trained."""

import copy
import itertools

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_ravan import RavanConfig, optimizer_parameter_groups
from peft_ravan.tuner.dense import adapted_linear
from peft_ravan.tuner.functional import delta_output

from ..conftest import classification_dataset, randomize_adapter, tiny_bert, tiny_llama
from .helpers import LAYERS, random_layer


NUM_HEADS = 3
MASKS = [list(mask) for mask in itertools.product([False, True], repeat=NUM_HEADS)]
LAYERS = {
    **LAYERS,
    # enough tokens for the dense way
    "Linear with many tokens": (lambda: nn.Linear(20, 14), lambda: torch.randn(400, 20)),
}


def adapted_model(kind: str, r: int = 2, **kwargs) -> tuple[PeftModel, torch.Tensor]:
    make_layer, make_input = LAYERS[kind]
    torch.manual_seed(0)
    config = RavanConfig(r=r, num_heads=NUM_HEADS, target_modules=["0"], init_bases="normal", **kwargs)
    model = get_peft_model(nn.Sequential(make_layer()), config)
    randomize_adapter(model)
    return model, make_input()


def layer_of(model: PeftModel):
    return model.base_model.model[0]


def gradients(model: PeftModel, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    layer = layer_of(model)
    core, scaling = layer.ravan_H["default"], layer.ravan_s["default"]
    output = model(x)
    if output.requires_grad:
        output.square().sum().backward()
    found = (core.grad, scaling.grad, x.grad)
    core.grad = scaling.grad = None
    return output.detach(), *found


# ---- Forward and backward ---------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_trained_heads_have_the_gradients_they_have_among_all(kind):
    model, x = adapted_model(kind)
    output, core_gradient, scaling_gradient, x_gradient = gradients(model, x)
    for mask in MASKS:
        model.set_trained_heads({"0": mask})
        output_found, core_found, scaling_found, x_found = gradients(model, x)
        torch.testing.assert_close(output_found, output)
        if x_gradient is not None:
            torch.testing.assert_close(x_found, x_gradient, rtol=1e-4, atol=1e-4)
        if not any(mask):
            assert core_found is None and scaling_found is None
            continue
        assert core_found.shape == (sum(mask), 2, 2) and scaling_found.shape == (sum(mask),)
        torch.testing.assert_close(core_found, core_gradient[mask], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scaling_found, scaling_gradient[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", [adapted_linear, delta_output])
@pytest.mark.parametrize("num_tokens", [2, 20])
def test_gradients_of_the_arithmetic(way, num_tokens):
    # few tokens and many: both orders of the gradient of the cores
    weight, bias, basis_A, basis_B, core, scaling = random_layer(6, 5, 3, 2, seed=0)
    frozen_core, frozen_scaling = core.detach(), scaling.detach()
    heads = torch.tensor([0, 2])
    x = torch.randn(num_tokens, 6, dtype=torch.float64, requires_grad=True)
    base = (weight, bias) if way is adapted_linear else ()

    def layer(x, core_of_heads, scaling_of_heads):
        tensors = (
            frozen_core.index_copy(0, heads, core_of_heads),
            frozen_scaling.index_copy(0, heads, scaling_of_heads),
        )
        return way(x, *base, basis_A, basis_B, *tensors, heads)

    assert torch.autograd.gradcheck(layer, (x, core[heads].detach().requires_grad_(), scaling[heads]))


def test_what_is_kept_for_the_backward_pass_has_only_the_trained_heads():
    model, x = adapted_model("Conv1D")
    kept = {}
    for name, mask in (("all", [True] * 3), ("one", [False, True, False])):
        model.set_trained_heads({"0": mask})
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, into=shapes: into.append(tensor.shape), id):
            model(x)
        kept[name] = shapes
    tokens = x.shape[:-1].numel()
    assert (3, 2, tokens) in kept["all"] and (3, 2, tokens) not in kept["one"] and (1, 2, tokens) in kept["one"]


@pytest.mark.parametrize("kind", LAYERS)
def test_all_heads_in_the_mask_is_no_mask_bit_for_bit(kind):
    model, x = adapted_model(kind)
    expected = gradients(model, x)
    parameters = [id(parameter) for parameter in model.parameters()]
    model.set_trained_heads({"0": torch.ones(NUM_HEADS, dtype=torch.bool)})
    assert [id(parameter) for parameter in model.parameters()] == parameters
    for one, other in zip(gradients(model, x), expected, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Embedding"])
@pytest.mark.parametrize("precision", ["autocast", "bfloat16", "no casts of the input"])
def test_half_precision(kind, precision):
    model, x = adapted_model(kind)
    if precision == "bfloat16":
        model = model.to(torch.bfloat16)
        x = x.to(torch.bfloat16) if x.is_floating_point() else x
    layer_of(model).cast_input_dtype_enabled = precision != "no casts of the input"

    def run():
        with torch.autocast("cpu", enabled=precision == "autocast", dtype=torch.bfloat16):
            return gradients(model, x)

    output, core_gradient, scaling_gradient, x_gradient = run()
    mask = [True, False, True]
    model.set_trained_heads({"0": mask})
    output_found, core_found, scaling_found, x_found = run()
    assert output_found.dtype == output.dtype and core_found.dtype == core_gradient.dtype
    for found, expected in (
        (output_found, output),
        (core_found, core_gradient[mask]),
        (scaling_found, scaling_gradient[mask]),
        (x_found, x_gradient),
    ):
        assert found is expected is None or (found - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    model = get_peft_model(tiny_llama(), RavanConfig(r=3, num_heads=NUM_HEADS, task_type="CAUSAL_LM"))
    randomize_adapter(model)
    model.set_trained_heads(dict.fromkeys(model.trained_heads(), [False, True, True]))
    batch = {"input_ids": torch.randint(0, 64, (2, 7)), "labels": torch.randint(0, 64, (2, 7))}
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()(**batch).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert len(found[0]) == 8
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


# ---- Training ----------------------------------------------------------------------


def test_frozen_heads_have_no_gradient_and_no_optimizer_state():
    model, x = adapted_model("Linear")
    before = [tensor.clone() for tensor in layer_of(model).adapter_tensors("default")[2:]]
    mask = [False, True, False]
    model.set_trained_heads({"0": mask})
    optimizer = torch.optim.AdamW(optimizer_parameter_groups(model, 0.1, weight_decay=0.1))
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    assert {group["name"] for group in optimizer.param_groups} == {"cores", "scalings"}
    moments = [state["exp_avg"].shape for state in optimizer.state.values()]
    assert moments == [(1, 2, 2), (1,)]
    model.set_trained_heads(None)
    for old, new in zip(before, layer_of(model).adapter_tensors("default")[2:], strict=True):
        assert [not torch.equal(old[head], new[head]) for head in range(NUM_HEADS)] == mask


def test_the_tensors_of_all_heads_keep_their_memory():
    model, _ = adapted_model("Linear")
    layer = layer_of(model)
    memory = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    core = layer.ravan_H["default"]
    model.set_trained_heads({"0": [True, False, True]})
    layer.ravan_H["default"].data.fill_(7)
    model.set_trained_heads({"0": [False, False, True]})  # another choice goes on from the trained values
    layer.ravan_H["default"].data.fill_(8)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == memory
    model.set_trained_heads(None)
    assert layer.ravan_H["default"] is core and core.requires_grad and not layer.all_heads
    assert (core[0] == 7).all() and (core[2] == 8).all() and not (core[1] == 7).any()


def test_a_trainer_trains_some_heads(tmp_path):
    model = get_peft_model(tiny_bert(), RavanConfig(r=3, num_heads=2, task_type="SEQ_CLS"))
    randomize_adapter(model, scale=0.1)
    state = get_peft_model_state_dict(model)
    start = {name: tensor.clone() for name, tensor in state.items()}
    model.set_trained_heads(dict.fromkeys(model.trained_heads(), [True, False]))
    args = TrainingArguments(
        str(tmp_path), max_steps=4, learning_rate=0.05, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, load_best_model_at_end=True, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    dataset = classification_dataset(80)
    trainer = Trainer(model, args, train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    model.set_trained_heads(None)
    cores = [name for name in state if name.endswith("ravan_H")]
    assert all(torch.equal(state[name][1], start[name][1]) for name in cores)
    assert all(not torch.equal(state[name][0], start[name][0]) for name in cores)


# ---- Interaction with other features -------------------------------------------------


def test_what_is_saved_has_all_heads_with_the_trained_values(tmp_path):
    model, x = adapted_model("Linear")
    names = [(name, tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()]
    model.set_trained_heads({"0": [False, True, False]})
    randomize_adapter(model, seed=1)
    expected = model(x)
    assert [(name, tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()] == names
    model.save_pretrained(tmp_path)
    base = nn.Sequential(copy.deepcopy(layer_of(model).base_layer))
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path)(x), expected)


def test_a_checkpoint_can_be_loaded_meanwhile():
    model, x = adapted_model("Linear")
    expected = model(x)
    checkpoint = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    randomize_adapter(model, seed=1)
    model.set_trained_heads({"0": [False, True, False]})
    set_peft_model_state_dict(model, checkpoint)
    assert layer_of(model).ravan_H["default"].shape == (1, 2, 2)
    torch.testing.assert_close(model(x), expected)
    model.set_trained_heads(None)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_merging_and_unloading(kind):
    model, x = adapted_model(kind)
    model.eval().set_trained_heads({"0": [False, True, True]})
    randomize_adapter(model, seed=1)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("combination_type", ["linear", "cat"])
def test_combining_adapters(combination_type):
    model, _ = adapted_model("Linear")
    layer = layer_of(model)
    model.set_trained_heads({"0": [False, True, False]})
    randomize_adapter(model, seed=1)
    model.base_model.add_weighted_adapter(["default"], [2.0], "both", combination_type)
    torch.testing.assert_close(layer.get_delta_weight("both"), 2 * layer.get_delta_weight("default"))


def test_the_model_can_be_cast_copied_and_moved_meanwhile():
    model, x = adapted_model("Linear")
    expected = model(x)
    model.set_trained_heads({"0": [False, True, False]})
    model = copy.deepcopy(model).double()
    torch.testing.assert_close(model(x.double()).float(), expected)
    assert model.to("meta").base_model.model[0].all_heads["default"].heads.device.type == "meta"
    model, _ = adapted_model("Linear")
    model.double().set_trained_heads(None)
    assert layer_of(model).ravan_H["default"].dtype == torch.float64


def test_other_adapters_are_left_alone():
    model, x = adapted_model("Linear")
    model.add_adapter("other", RavanConfig(r=2, num_heads=NUM_HEADS, target_modules=["0"], init_bases="normal"))
    model.set_trained_heads({"0": [False, True, False]})
    assert model.trained_heads("other")["0"].all() and not model.trained_heads()["0"].all()
    model.set_adapter("other")
    model.set_trained_heads(None, adapter_name="default")
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "base_model.model.0.ravan_H.other",
        "base_model.model.0.ravan_s.other",
    ]
    model.set_adapter("default")
    model.set_trained_heads({"0": [False, True, False]})
    model.delete_adapter("default")
    assert not layer_of(model).all_heads
    model.add_adapter("default", RavanConfig(r=2, num_heads=NUM_HEADS, target_modules=["0"], init_bases="normal"))
    assert model.trained_heads("default")["0"].all()


def test_targets_without_a_trained_head_train_nothing():
    model, x = adapted_model("Linear")
    model.set_trained_heads({"0": [False] * 3})
    model.set_adapter("default")  # which makes all parameters of the adapter trainable
    assert not model(x).requires_grad
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 0


# ---- Refusals -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "masks, adapter_name, message",
    [
        ({"1": [True] * 3}, None, "'1' is not a target of the adapter 'default'. Its targets are the keys of"),
        ({"0": [True]}, None, r"one bool for each head, but for the target '0', which has 3 heads, got torch.bool of shap"),
        ({"0": [1, 0, 1]}, None, "which has 3 heads, got torch.int64 of shape"),
        ({"0": [True] * 3}, "other", "There is no adapter 'other', only .'default'."),
    ],
)  # fmt: skip
def test_masks_that_do_not_fit_are_reported(masks, adapter_name, message):
    model, _ = adapted_model("Linear")
    model.set_trained_heads({"0": [True, False, True]})
    with pytest.raises(ValueError, match=message):
        model.set_trained_heads(masks, adapter_name)
    assert model.trained_heads()["0"].tolist() == [True, False, True]


def test_several_active_adapters_need_a_name():
    model, _ = adapted_model("Linear")
    model.add_adapter("other", RavanConfig(r=2, num_heads=1, target_modules=["0"], init_bases="normal"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="exactly one adapter must be active, got .'default', 'other'.. Name one."):
        model.set_trained_heads(None)


def test_parameters_train_all_their_heads():
    config = RavanConfig(r=2, num_heads=2, target_modules=["0"], target_parameters=["1.weight"])
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config)
    with pytest.raises(ValueError, match="the target '1' is a parameter .`target_parameters`.. Leave it out"):
        model.set_trained_heads({"0": [True, False], "1": [True, False]})
    assert all(mask.all() for mask in model.trained_heads().values())
    model.set_trained_heads({"0": [True, False]})
    assert model.trained_heads()["1"].all() and not model.trained_heads()["0"].all()
