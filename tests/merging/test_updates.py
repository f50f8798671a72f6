"""Uploads that do not fit are refused by name, before anything is merged."""

import pytest
import torch

from peft_ravan.merging import ClientUpdate, MergeResult, UpdateError, merge


CORE = "base_model.model.q.ravan_H"
HEAD = "base_model.model.classifier.weight"


def global_state() -> dict[str, torch.Tensor]:
    return {CORE: torch.zeros(3, 2, 2), HEAD: torch.zeros(4)}


def good(client_id: str = "good") -> ClientUpdate:
    return ClientUpdate({CORE: torch.ones(3, 2, 2), HEAD: torch.ones(4)}, num_examples=10, client_id=client_id)


def bad(num_examples=10, trained_heads=None, drop=None, **tensors) -> ClientUpdate:
    state = {CORE: torch.ones(3, 2, 2), HEAD: torch.ones(4), **tensors}
    state = {name: tensor for name, tensor in state.items() if name != drop}
    return ClientUpdate(state, num_examples, "ward_7", trained_heads)


def with_entry(value: float) -> torch.Tensor:
    tensor = torch.ones(3, 2, 2)
    tensor[1, 0, 1] = value
    return tensor


@pytest.mark.parametrize("method", ["fedavg", "ravan", "fedrpca"])
@pytest.mark.parametrize(
    "update, message",
    [
        (bad(drop=HEAD), f"'{HEAD}': missing from the update"),
        (bad(extra=torch.ones(1)), "'extra': not expected in the update: the global state has no such tensor"),
        (bad(**{"q.ravan_s": torch.ones(3)}), "'q.ravan_s': not expected in the update: scalings and bases are never"),
        (bad(**{"q.ravan_A": torch.ones(3)}), "'q.ravan_A': not expected in the update: scalings and bases are never"),
        (bad(**{HEAD: torch.ones(5)}), rf"'{HEAD}': must have shape \(4,\), got \(5,\)"),
        (bad(**{CORE: torch.ones(2, 2, 2)}), rf"'{CORE}': must have shape \(3, 2, 2\), got \(2, 2, 2\)"),
        (bad(**{CORE: with_entry(torch.nan)}), f"'{CORE}': 1 of 12 entries are NaN or infinite"),
        (bad(**{CORE: with_entry(torch.inf)}), f"'{CORE}': 1 of 12 entries are NaN or infinite"),
        (
            bad(**{HEAD: torch.ones(4, dtype=torch.int64)}),
            f"'{HEAD}': must be a floating point tensor, got torch.int64",
        ),
        (bad(num_examples=0), "num_examples must be an integer of 1 or more, .* got 0"),
        (bad(num_examples=-3), "num_examples must be an integer of 1 or more, .* got -3"),
        (bad(num_examples=2.5), "num_examples must be an integer of 1 or more, .* got 2.5"),
        (
            bad(trained_heads={CORE: torch.tensor([True, False, True])}),
            rf"'{CORE}': (must have shape \(2, 2, 2\), got \(3, 2, 2\)|only some heads were trained)",
        ),
        (bad(trained_heads={CORE: torch.ones(3)}), f"'{CORE}': trained_heads must be a bool tensor of shape"),
        (bad(trained_heads={CORE: torch.ones(2, dtype=torch.bool)}), f"'{CORE}': trained_heads must be a bool tensor"),
        (bad(trained_heads={HEAD: torch.ones(4, dtype=torch.bool)}), f"'{HEAD}': trained_heads names it"),
    ],
)
def test_bad_updates_are_refused_by_client_and_tensor(method, update, message):
    state = global_state()
    with pytest.raises(UpdateError, match=f"client 'ward_7'.*{message}"):
        merge(state, [good(), update], method=method)
    assert all(torch.equal(state[name], tensor) for name, tensor in global_state().items())


def test_a_client_without_a_name_is_told_by_its_number():
    nameless = ClientUpdate({CORE: torch.full((3, 2, 2), torch.nan), HEAD: torch.ones(4)}, 1)
    with pytest.raises(UpdateError, match="client number 1 .without a name."):
        merge(global_state(), [good(), nameless])


def test_a_merge_needs_updates():
    with pytest.raises(UpdateError, match="at least one client update, got none"):
        merge(global_state(), [])


def test_unknown_methods_and_options_are_told_with_those_that_exist():
    with pytest.raises(ValueError, match="no merge method 'average'. Choose one of: fedavg, ravan, fedrpca"):
        merge(global_state(), [good()], method="average")
    with pytest.raises(TypeError, match="'fedrpca' has no option 'betta'. Its options are: beta, beta_max"):
        merge(global_state(), [good()], method="fedrpca", betta=2)


@pytest.mark.parametrize("method", ["fedavg", "ravan", "fedrpca"])
def test_a_merge_is_a_pure_function(method):
    state, update = global_state(), good()
    result = merge(state, [update, good("other")], method=method)
    assert isinstance(result, MergeResult)
    assert list(result.state) == list(state)
    for name, tensor in global_state().items():
        assert torch.equal(state[name], tensor)
        assert torch.equal(update.state[name], torch.ones_like(tensor))
        assert result.state[name].shape == tensor.shape and result.state[name].dtype == tensor.dtype
        result.state[name].zero_()  # the result shares no memory with what went in
        assert torch.equal(update.state[name], torch.ones_like(tensor))


@pytest.mark.parametrize("method", ["fedavg", "ravan", "fedrpca"])
def test_diagnostics_tell_the_method_and_can_be_written_as_json(method):
    import json

    diagnostics = merge(global_state(), [good(), good("other")], method=method).diagnostics
    assert (diagnostics["method"], diagnostics["num_clients"], diagnostics["num_examples"]) == (method, 2, 20)
    json.dumps(diagnostics)


def test_a_whole_checkpoint_can_be_the_global_state():
    checkpoint = {
        CORE: torch.ones(1, 2, 2),
        "base_model.model.q.ravan_s": torch.tensor([3.0]),
        "base_model.model.q.ravan_A": torch.ones(2, 5),
    }
    # nobody trained the head: its product 3 * 1 stays, with a scaling of 1
    update = ClientUpdate({CORE: torch.empty(0, 2, 2)}, 5, "c", {CORE: torch.zeros(1, dtype=torch.bool)})
    state = merge(checkpoint, [update]).state
    assert torch.equal(state[CORE], torch.full((1, 2, 2), 3.0))
    assert state["base_model.model.q.ravan_s"].tolist() == [1.0]
    assert torch.equal(state["base_model.model.q.ravan_A"], torch.ones(2, 5))
