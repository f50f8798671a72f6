"""Combined adapters: their weight update is the weighted sum, whether or not the bases are the same."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_ravan import RavanConfig

from ..conftest import randomize_adapter


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.value = nn.Linear(24, 24), nn.Linear(24, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.query(x)) + self.value(x))


def config(**kwargs) -> RavanConfig:
    return RavanConfig(**{"r": 3, "num_heads": 2, "target_modules": ["query", "value"], **kwargs})


def two_adapters(**second) -> PeftModel:
    model = get_peft_model(Model(), config(), adapter_name="a")
    model.add_adapter("b", config(**second))
    for seed, name in enumerate("ab"):
        model.set_adapter(name)
        randomize_adapter(model, seed)
    return model


def delta(model, name, target="query"):
    return getattr(model.base_model.model, target).get_delta_weight(name)


def test_adapters_with_the_same_bases_are_added_exactly_and_keep_their_size():
    model = two_adapters()
    model.add_weighted_adapter(["a", "b"], [0.3, -2.0], "c")
    layer = model.base_model.model.query
    assert layer.ravan_H["c"].shape == (2, 3, 3) and torch.equal(layer.ravan_s["c"], torch.ones(2))
    assert torch.equal(layer.ravan_A["c"], layer.ravan_A["a"])
    for target in ("query", "value"):
        expected = 0.3 * delta(model, "a", target) - 2.0 * delta(model, "b", target)
        torch.testing.assert_close(delta(model, "c", target), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "second",
    [
        {"projection_seed": 1},
        {"r": 5, "num_heads": 1},
        {"init_bases": "normal"},
        {"target_modules": ["query"], "r": 2},
    ],
    ids=str,
)
def test_adapters_with_other_bases_are_stacked_exactly(second):
    model = two_adapters(**second)
    model.add_weighted_adapter(["a", "b"], [0.3, -2.0], "c")
    expected = 0.3 * delta(model, "a") - 2.0 * delta(model, "b")
    torch.testing.assert_close(delta(model, "c"), expected, atol=1e-5, rtol=1e-5)
    if second.get("target_modules") == ["query"]:
        torch.testing.assert_close(delta(model, "c", "value"), 0.3 * delta(model, "a", "value"), atol=1e-5, rtol=1e-5)


def test_stacking_can_be_asked_for():
    model = two_adapters()
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", combination_type="cat")
    assert model.base_model.model.query.ravan_H["c"].shape == (4, 3, 3)
    torch.testing.assert_close(delta(model, "c"), delta(model, "a") + delta(model, "b"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("second", [{}, {"projection_seed": 1, "r": 4}])
def test_a_combined_adapter_is_saved_and_loaded(second, tmp_path):
    model = two_adapters(**second)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c")
    model.set_adapter("c")
    x = torch.randn(5, 24)
    expected = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["c"])
    assert torch.equal(PeftModel.from_pretrained(Model(), tmp_path / "c")(x), expected)


@pytest.mark.parametrize("combination_type", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_pruning_combinations_act_on_the_products(combination_type):
    model = two_adapters()
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", combination_type=combination_type, density=1.0)
    # without pruning, the result is the sum, except for the signs that TIES elects
    layer = model.base_model.model.query
    products = [layer.ravan_s[n][:, None, None] * layer.ravan_H[n] for n in "ab"]
    if "ties" in combination_type:
        agree = products[0].sign() == products[1].sign()
        torch.testing.assert_close(layer.ravan_H["c"][agree], (sum(products) / 2)[agree], atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(layer.ravan_H["c"], sum(products), atol=1e-5, rtol=1e-5)


def test_the_new_adapter_is_not_trained_and_the_others_stay():
    model = two_adapters()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert not [n for n, p in model.named_parameters() if p.requires_grad and n.endswith(".c")]
    assert model.active_adapter == "b"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["a", "x"], [1.0, 1.0], "c"), "Adapter x does not exist"),
        ((["a"], [1.0, 1.0], "c"), "one weight per adapter, got 2 for 1 adapters"),
        (([], [], "c"), "needs at least one, got none"),
        ((["a", "b"], [1.0, 1.0], "c", "svd"), "Invalid combination_type: svd. Choose one of linear, ties"),
        ((["a", "b"], [1.0, 1.0], "c", "ties"), "combination_type='ties' needs a `density`"),
        (
            (["a", "b"], [1.0, 1.0], "c", "linear"),
            "'linear' needs adapters with the same bases, but at 'query' they differ",
        ),
    ],
)
def test_errors_leave_the_model_as_it_was(arguments, message):
    model = two_adapters(projection_seed=1)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["a", "b"]


def test_stacked_bases_must_be_saved():
    model = get_peft_model(Model(), config(save_projection=False), adapter_name="a")
    model.add_adapter("b", config(save_projection=False, projection_seed=1))
    with pytest.raises(ValueError, match="only with `save_projection=True`"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c")
    assert list(model.peft_config) == ["a", "b"]
