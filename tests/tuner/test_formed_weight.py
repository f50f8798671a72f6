"""How long the formed weight of a layer is kept, and that it is never an old one."""

import copy
import gc
import pickle
import weakref
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_ravan import RavanConfig
from peft_ravan.tuner import dense, linear
from peft_ravan.tuner.dense import adapted_linear, dense_is_cheaper, form_weight, is_kept
from peft_ravan.tuner.functional import delta_weight

from ..conftest import randomize_adapter
from ..properties import examples
from .helpers import random_layer


D, TOKENS = 16, 64


def adapted(until="changed", **kwargs):
    config = RavanConfig(r=4, num_heads=2, target_modules=["0"], **kwargs)
    model = get_peft_model(nn.Sequential(nn.Linear(D, D), nn.GELU()), config)
    randomize_adapter(model)
    model.keep_formed_weights(until)
    return model


def layer_of(model):
    return model.base_model.model[0]


def inputs(requires_grad=False):
    return torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(1)).requires_grad_(requires_grad)


def gradients(model, x):
    """The output, and the gradients of x and of all that is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    output = model(x)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [x, *trained])]


def forms(run) -> int:
    """How often a weight is formed."""
    with (
        patch.object(dense, "form_weight", wraps=form_weight) as within,
        patch.object(linear, "form_weight", wraps=form_weight) as before,
    ):
        run()
    return within.call_count + before.call_count


# ---- From the forward to the backward pass -----------------------------------------


@pytest.mark.parametrize("until, times", [(None, 2), ("backward", 1), ("changed", 1)])
def test_how_often_a_step_forms_the_weight(until, times):
    model, x = adapted(until), inputs(requires_grad=True)
    assert forms(lambda: gradients(model, x)) == times


@pytest.mark.parametrize("until", [None, "backward", "changed"])
@pytest.mark.parametrize("masks", [None, {"0": [True, False]}])
def test_gradients_are_those_of_the_formed_weight(until, masks):
    model, x = adapted(until).double(), inputs().double().requires_grad_()
    model.set_trained_heads(masks)
    layer = layer_of(model)
    found = gradients(model, x)
    trained = [layer.ravan_H["default"], layer.ravan_s["default"]]
    weight = layer.base_layer.weight + delta_weight(*layer.adapter_tensors("default"))
    output = nn.functional.gelu(nn.functional.linear(x, weight, layer.base_layer.bias))
    expected = [output.detach(), *torch.autograd.grad(output.square().sum(), [x, *trained])]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("is_given", [False, True])
@pytest.mark.parametrize("num_tokens", [3, 30], ids=["from projections", "from x"])
def test_first_and_second_derivatives(keep, is_given, num_tokens):
    weight, bias, basis_A, basis_B, core, scaling = random_layer(4, 3, 2, 2, seed=0)
    x = torch.randn(num_tokens, 4, dtype=torch.float64, requires_grad=True)

    def run(x, weight, core, scaling):
        formed = None
        if is_given:
            formed = form_weight(weight, basis_A, basis_B, scaling[:, None, None] * core).detach()
        return adapted_linear(x, weight, bias, basis_A, basis_B, core, scaling, None, keep, formed)

    inputs = (x, weight.requires_grad_(), core, scaling)
    if not is_given:  # a given weight does not follow small changes, which gradcheck makes in place
        assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("heads", [[True, True], [True, False]], ids=["all heads", "one head"])
def test_instead_of_the_input_its_projections_are_kept(heads):
    config = RavanConfig(r=2, num_heads=2, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(D, D)), config)
    model.set_trained_heads({"0": heads})
    x, shapes = inputs(requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        model(x)
    assert (TOKENS, D) not in shapes and (2 * sum(heads), TOKENS) in shapes


def test_what_is_kept_is_freed_by_the_backward_pass():
    model, x = adapted("backward"), inputs(requires_grad=True)
    kept = []

    def pack(tensor):
        # base weight and formed weight have the same shape
        if tensor.shape == (D, D) and tensor.data_ptr() != layer_of(model).base_layer.weight.data_ptr():
            kept.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).sum()
    assert len(kept) == 1 and kept[0]() is not None
    loss.backward()
    gc.collect()
    assert kept[0]() is None


@examples(60)
@given(T=st.integers(1, 3000), d_in=st.integers(8, 1500), d_out=st.integers(8, 1500), rank=st.integers(1, 400))
def test_what_is_kept_is_not_larger_than_input_and_output(T, d_in, d_out, rank):
    shape = {"num_tokens": T, "d_in": d_in, "d_out": d_out, "total_rank": rank, "training": True}
    if is_kept(T, d_in, d_out):
        assert d_in * d_out <= T * (d_in + d_out)
    elif T * (d_in + d_out) < (T + rank) * d_in * d_out / rank:
        # the two conditions are one if the gradient of the cores is computed with thin products
        assert not dense_is_cheaper(**shape, keep=True)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("until", ["backward", "changed"])
def test_gradient_checkpointing_keeps_nothing_until_the_block_is_computed_again(until, use_reentrant):
    model, x = adapted(until), inputs(requires_grad=True)
    expected = gradients(model, x)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layer_of(model).formed_weight.clear()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        output = checkpoint(model, x, use_reentrant=use_reentrant)
    assert (D, D) not in kept
    output.square().sum().backward()
    for one, other in zip([x.grad, *(p.grad for p in trained)], expected[1:], strict=True):
        torch.testing.assert_close(one, other)


# ---- For further passes ------------------------------------------------------------


def test_accumulation_steps_and_evaluation_form_once():
    model, x = adapted(), inputs(requires_grad=True)

    def passes():
        for _ in range(3):
            gradients(model, x)
        with torch.no_grad():
            model.eval()(x)
            # few tokens, for which forming would not pay
            torch.testing.assert_close(model(x[:2]), model(x)[:2])

    assert forms(passes) == 1


def test_nothing_is_held_by_default():
    model, x = get_peft_model(nn.Sequential(nn.Linear(D, D)), RavanConfig(r=4, target_modules=["0"])), inputs()
    randomize_adapter(model)
    assert forms(lambda: [model(x) for _ in range(2)]) == 2
    with pytest.raises(ValueError, match="must be 'backward', 'changed' or None, got 'always'"):
        model.keep_formed_weights("always")


def step(model, optimizer):
    optimizer(p for p in model.parameters() if p.requires_grad).step()


def set_to(model, scale):
    state = {name: scale * tensor for name, tensor in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, state)


def add_and_activate(model):
    model.add_adapter("other", RavanConfig(r=4, num_heads=2, target_modules=["0"], init_weights=False))
    model.set_adapter("other")


def assign(model):
    state = {name: 1.5 * tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def write_in_inference_mode(model):
    with torch.inference_mode():
        layer_of(model).base_layer.weight.mul_(2)


def swap_rows(model):
    weight = layer_of(model).base_layer.weight
    weight.data.copy_(weight.data.flip(0))


def merge_and_forget(model):
    layer = layer_of(model)
    layer.merge()
    layer.merged_adapters.clear()


CHANGES = {
    "SGD": lambda model: step(model, lambda p: torch.optim.SGD(p, 0.1)),
    "AdamW": lambda model: step(model, lambda p: torch.optim.AdamW(p, 0.1)),
    "AdamW, one by one": lambda model: step(model, lambda p: torch.optim.AdamW(p, 0.1, foreach=False)),
    "AdamW, fused": lambda model: step(model, lambda p: torch.optim.AdamW(p, 0.1, fused=True)),
    "H through data": lambda model: layer_of(model).ravan_H["default"].data.mul_(2),
    "one entry of H": lambda model: layer_of(model).ravan_H["default"].data[0, 0, 0].add_(0.5),
    "s through data": lambda model: layer_of(model).ravan_s["default"].data.mul_(2),
    "s in place": lambda model: layer_of(model).ravan_s["default"].detach().add_(1),
    "loaded adapter": lambda model: set_to(model, 1.5),
    "loaded and assigned": assign,
    "another adapter": add_and_activate,
    "base weight in place": lambda model: layer_of(model).base_layer.weight.detach().mul_(2),
    "base weight through data": lambda model: layer_of(model).base_layer.weight.data.mul_(2),
    "base weight in inference mode": write_in_inference_mode,
    "one entry of the base weight": lambda model: layer_of(model).base_layer.weight.data[3, 5].add_(0.1),
    "rows of the base weight swapped": swap_rows,
    "new base weight": lambda model: setattr(layer_of(model).base_layer.weight, "data", torch.randn(D, D)),
    "A": lambda model: layer_of(model).ravan_A["default"].mul_(2),
    "A through data": lambda model: layer_of(model).ravan_A["default"].data.mul_(2),
    "B through data": lambda model: layer_of(model).ravan_B["default"].data.mul_(2),
    "new bases": lambda model: layer_of(model).ravan_B.update({"default": torch.randn(D, 8)}),
    "float64": lambda model: model.double(),
    "there and back": lambda model: model.bfloat16().float(),
    "merged": merge_and_forget,
    "merged and unmerged": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "only one head trained": lambda model: model.set_trained_heads({"0": [True, False]}),
}


@pytest.mark.parametrize("grad", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_served_after_a_change_is_formed_anew(change, grad):
    model, x = adapted(), inputs(requires_grad=True)
    with torch.set_grad_enabled(grad):
        first = model(x)
    if grad:
        first.sum().backward()
    else:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    CHANGES[change](model)
    x = x.detach().to(layer_of(model).base_layer.weight.dtype)
    fresh = copy.deepcopy(model)
    fresh.keep_formed_weights(None)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(x), fresh(x))
        if change not in ("merged and unmerged", "only one head trained", "there and back"):
            assert not torch.allclose(model(x).float(), first, atol=1e-3) or change in ("float64", "merged")
        torch.testing.assert_close(model(x), fresh(x))


def test_a_change_of_trained_and_of_frozen_heads_is_seen():
    model, x = adapted(), inputs()
    model.set_trained_heads({"0": [True, False]})
    for tensor in (layer_of(model).ravan_H["default"], layer_of(model).all_heads["default"].core):
        before = model(x)
        tensor.data.add_(0.5)
        fresh = copy.deepcopy(model)
        fresh.keep_formed_weights(None)
        assert not torch.allclose(model(x), before, atol=1e-3)
        torch.testing.assert_close(model(x), fresh(x))


def test_training_after_inference_mode():
    model, x = adapted(), inputs(requires_grad=True)
    plain = copy.deepcopy(model)
    plain.keep_formed_weights(None)
    expected = gradients(plain, x)
    with torch.inference_mode():
        model(x.detach())
    for one, other in zip(gradients(model, x), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_disabled_and_mixed_adapters_do_not_see_it():
    model, x = adapted().eval(), inputs()
    plain = copy.deepcopy(model)
    plain.keep_formed_weights(None)
    for _ in range(2):
        torch.testing.assert_close(model(x), plain(x))
        with model.disable_adapter(), plain.disable_adapter():
            assert torch.equal(model(x), plain(x))
        names = ["default", "__base__"] * (TOKENS // 2)
        torch.testing.assert_close(model(x, adapter_names=names), plain(x, adapter_names=names))


def test_copies_and_files_do_not_contain_it(tmp_path):
    model, x = adapted(), inputs()
    names = set(model.state_dict())
    model(x)
    layer = layer_of(model)
    assert set(model.state_dict()) == names
    assert forms(lambda: model(x)) == 0 and forms(lambda: copy.deepcopy(model)(x)) == 1
    held = layer.formed_weight
    assert not torch.is_tensor(pickle.loads(pickle.dumps(held))._formed)
    assert len(pickle.dumps(held)) < 200


def test_it_is_freed_when_something_has_changed_and_when_told_to():
    model, x = adapted(), inputs()
    layer = layer_of(model)
    model(x)
    held = weakref.ref(layer.formed_weight._formed)
    layer.ravan_H["default"].grad = torch.ones_like(layer.ravan_H["default"])
    step(model, lambda p: torch.optim.SGD(p, 0.1))
    # few tokens: nothing is formed, and what is held is no longer right
    model(x[:2])
    assert held() is None
    model(x)
    held = weakref.ref(layer.formed_weight._formed)
    model.keep_formed_weights()
    assert held() is None
