"""The two ways to compute a layer, compared with an explicit sum over heads in float64."""

from unittest.mock import patch

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from peft import get_peft_model
from torch import nn

from peft_ravan import RavanConfig
from peft_ravan.tuner.dense import adapted_linear, dense_is_cheaper
from peft_ravan.tuner.functional import delta_output, delta_weight

from ..conftest import randomize_adapter
from ..properties import examples
from .helpers import random_layer


def sum_over_heads(basis_A, basis_B, core, scaling):
    num_heads, r, _ = core.shape
    return sum(
        scaling[i] * basis_B[:, i * r : (i + 1) * r] @ core[i] @ basis_A[i * r : (i + 1) * r] for i in range(num_heads)
    )


SHAPES = {
    "leading": st.lists(st.integers(1, 5), min_size=0, max_size=3),
    "d_in": st.integers(1, 12),
    "d_out": st.integers(1, 12),
    "num_heads": st.integers(1, 4),
    "r": st.integers(1, 4),
    "seed": st.integers(0, 2**16),
}


@examples(40)
@given(**SHAPES)
def test_every_way_is_the_sum_over_heads(leading, d_in, d_out, num_heads, r, seed):
    weight, bias, *adapter = random_layer(d_in, d_out, num_heads, r, seed)
    x = torch.randn(*leading, d_in, dtype=torch.float64, requires_grad=True)
    update = sum_over_heads(*adapter)
    torch.testing.assert_close(delta_weight(*adapter), update)
    torch.testing.assert_close(delta_output(x, *adapter), x @ update.T)
    expected = x @ (weight + update).T + bias
    torch.testing.assert_close(adapted_linear(x, weight, bias, *adapter), expected)
    torch.testing.assert_close(adapted_linear(x, weight, None, *adapter), expected - bias)

    # the gradients of x, H and s, too
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, adapter[2], adapter[3]), cotangent)
    found = torch.autograd.grad(adapted_linear(x, weight, bias, *adapter), (x, adapter[2], adapter[3]), cotangent)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("num_tokens", [2, 20])
def test_gradients_of_everything_that_can_be_trained(num_tokens):
    # few tokens and many: both orders of the gradient of the cores
    weight, bias, basis_A, basis_B, core, scaling = random_layer(6, 5, 2, 3, seed=0)
    x = torch.randn(num_tokens, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, weight.requires_grad_(), bias.requires_grad_(), basis_A, basis_B, core, scaling)
    assert torch.autograd.gradcheck(adapted_linear, inputs)


def test_the_cheaper_way_depends_on_the_shape():
    assert not dense_is_cheaper(num_tokens=1, d_in=768, d_out=768, total_rank=220, training=True)
    assert dense_is_cheaper(num_tokens=4096, d_in=768, d_out=768, total_rank=220, training=True)
    assert dense_is_cheaper(num_tokens=500, d_in=768, d_out=768, total_rank=220, training=False)


def test_fewer_trained_heads_make_the_dense_way_cheaper():
    shape = {"num_tokens": 1000, "d_in": 768, "d_out": 768, "total_rank": 220, "training": True}
    ways = [dense_is_cheaper(**shape, trained_rank=trained_rank) for trained_rank in (220, 165, 110, 55)]
    assert dense_is_cheaper(**shape) == ways[0] and ways == sorted(ways)


def adapted_stack(**kwargs):
    model = get_peft_model(
        nn.Sequential(nn.Linear(16, 16)), RavanConfig(r=4, num_heads=2, target_modules=["0"], **kwargs)
    )
    randomize_adapter(model)
    return model, model.base_model.model[0]


def uses_dense_weight(layer, x) -> bool:
    # only the base layer is called where two thin products are added to its output
    with patch.object(layer.base_layer, "forward", side_effect=layer.base_layer.forward) as called:
        layer(x)
    return not called.called


def test_a_layer_gives_the_same_either_way():
    model, layer = adapted_stack()
    many = torch.randn(200, 16)
    assert uses_dense_weight(layer, many) and not uses_dense_weight(layer, many[:2])
    torch.testing.assert_close(model(many)[:2], model(many[:2]), atol=1e-5, rtol=1e-5)


def test_hooks_of_the_base_layer_are_called():
    model, layer = adapted_stack()
    calls = []
    layer.base_layer.register_forward_hook(lambda *args: calls.append(1))
    model(torch.randn(200, 16))
    assert calls == [1]


@pytest.mark.parametrize("case", ["dropout", "autocast", "bfloat16"])
def test_the_thin_way_where_the_dense_one_would_be_wrong(case):
    model, layer = adapted_stack(ravan_dropout=0.5 if case == "dropout" else 0.0)
    x = torch.randn(200, 16)
    if case == "bfloat16":
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    with torch.autocast("cpu", enabled=case == "autocast", dtype=torch.bfloat16):
        assert not uses_dense_weight(layer, x)
        assert torch.isfinite(model(x)).all()
    if case == "dropout":
        assert not uses_dense_weight(layer.train(), x) and uses_dense_weight(layer.eval(), x)
