"""Limits on the influence of one client on a mean: the norm of its change, and the examples it is weighted with."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from peft import LoraConfig

from peft_ravan.merging import ClientUpdate, UpdateError, UpdateLimits, merge
from peft_ravan.merging.changes import change_norm

from ..properties import examples
from .reference import a_name, b_name, client, every_case, merge_faithfully, random_round


CORE = "q.ravan_H"


def update(*values: float, num_examples: int = 1, index: int = 0) -> ClientUpdate:
    return client({"w": torch.tensor(values, dtype=torch.float64)}, num_examples, index)


def merged(updates, **limits) -> list[float]:
    start = {"w": torch.tensor([1.0, 0.0], dtype=torch.float64)}
    return merge(start, updates, "fedavg", limits=UpdateLimits(**limits)).state["w"].tolist()


def test_a_change_is_scaled_down_to_the_limit():
    # from [1, 0] the changes are [3, 4], of norm 5, and [0, 1]
    updates = [update(4.0, 4.0, index=0), update(1.0, 1.0, index=1)]
    assert merged(updates, max_update_norm=10) == [2.5, 2.5]
    assert merged(updates, max_update_norm=2.5) == [1.75, 1.5]
    result = merge({"w": torch.tensor([1.0, 0.0]).double()}, updates, "fedavg", limits=UpdateLimits(2.5))
    assert result.diagnostics["clipped"] == [{"client": "client_0", "norm": 5.0}]
    assert "clipped" not in merge({"w": torch.zeros(2).double()}, updates, "fedavg").diagnostics


def test_a_multiple_of_the_median_is_of_the_clients_that_fit():
    # norms 1, 2, 3 and 100: the lower median is 2
    updates = [update(1.0, norm, index=index) for index, norm in enumerate((1.0, 2.0, 3.0, 100.0))]
    assert merged(updates, max_update_norm="2*median") == [1.0, (1 + 2 + 3 + 4) / 4]
    broken = update(torch.nan, 1.0, index=9)
    result = merge(
        {"w": torch.tensor([1.0, 0.0]).double()}, iter([broken, *updates]), "fedavg", on_bad_update="drop",
        limits=UpdateLimits("0.5*median"),
    )  # fmt: skip
    assert result.state["w"].tolist() == [1.0, 1.0]
    assert [entry["client"] for entry in result.diagnostics["clipped"]] == ["client_1", "client_2", "client_3"]


def test_a_large_update_can_be_refused():
    updates = [update(1.0, 1.0, index=0), update(1.0, 50.0, index=1)]
    limits = UpdateLimits(2.0, "refuse")
    start = {"w": torch.tensor([1.0, 0.0]).double()}
    with pytest.raises(UpdateError, match="client 'client_1': its update has a norm of 50, above the limit of 2"):
        merge(start, updates, "fedavg", limits=limits)
    result = merge(start, updates, "fedavg", limits=limits, on_bad_update="drop")
    assert result.state["w"].tolist() == [1.0, 1.0]
    assert [entry["client"] for entry in result.diagnostics["dropped"]] == ["client_1"]


def test_examples_count_up_to_the_limit():
    updates = [update(2.0, 0.0, num_examples=1, index=0), update(100.0, 0.0, num_examples=10**15, index=1)]
    assert merged(updates)[0] > 99.99
    assert merged(updates, max_examples=1) == [51.0, 0.0]
    result = merge({"w": torch.zeros(2).double()}, updates, "fedavg", limits=UpdateLimits(max_examples=3))
    assert result.diagnostics["num_examples"] == 4


def test_heads_that_were_not_trained_are_not_changed():
    start = {CORE: torch.ones(3, 1, 1)}
    mask = torch.tensor([True, False, True])
    far = ClientUpdate({CORE: torch.tensor([[[4.0]], [[5.0]]])}, 1, "far", {CORE: mask})
    assert change_norm(far, start) == 5.0
    state = merge(start, [far], "ravan", limits=UpdateLimits(2.5)).state
    assert state[CORE].flatten().tolist() == [2.5, 1.0, 3.0]


def test_an_update_of_another_rank_is_refused_and_not_clipped():
    config = LoraConfig(r=2, lora_alpha=4)
    start = {a_name("m"): torch.eye(2, 3), b_name("m"): torch.zeros(3, 2)}
    narrow = ClientUpdate(
        {a_name("m"): torch.eye(1, 3), b_name("m"): torch.full((3, 1), 9.0)}, 1, "narrow", config=LoraConfig(r=1)
    )
    with pytest.raises(UpdateError, match="'narrow'.*with another rank than the global adapter it cannot be scaled"):
        merge(start, [narrow], "flexlora", config=config, limits=UpdateLimits(1.0))
    assert merge(start, [narrow], "flexlora", config=config, limits=UpdateLimits(100.0)).diagnostics["clipped"] == []


@every_case
def test_limits_that_nobody_reaches_change_nothing(method, adapter):
    global_state, updates = random_round(method, adapter)
    without = merge_faithfully(method, global_state, updates)
    for limits in (UpdateLimits(1e9, max_examples=10**9), UpdateLimits("1000000*median")):
        result = merge_faithfully(method, global_state, updates, limits=limits)
        assert all(torch.equal(result.state[name], tensor) for name, tensor in without.state.items())
        assert result.diagnostics["clipped"] == []


@examples(60)
@given(st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4), st.floats(0.01, 100.0))
def test_whatever_a_client_uploads_the_mean_moves_by_its_share_of_the_limit(values, limit):
    start = {"w": torch.zeros(4, dtype=torch.float64)}
    honest = [ClientUpdate({"w": torch.zeros(4, dtype=torch.float64)}, 10, f"client_{i}") for i in range(3)]
    attacker = ClientUpdate({"w": torch.tensor(values, dtype=torch.float64)}, 10**12, "attacker")
    state = merge(start, [*honest, attacker], "fedavg", limits=UpdateLimits(limit, max_examples=10)).state
    assert state["w"].norm() <= limit / 4 * (1 + 1e-9)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"max_update_norm": 0}, "`max_update_norm` must be a number above 0, or a multiple of the median norm"),
        ({"max_update_norm": -1.0}, "got -1.0"),
        ({"max_update_norm": float("nan")}, "got nan"),
        ({"max_update_norm": float("inf")}, "got inf"),
        ({"max_update_norm": True}, "got True"),
        ({"max_update_norm": "median"}, "got 'median'"),
        ({"max_update_norm": "0*median"}, "got '0.median'"),
        ({"large_updates": "shrink"}, "`large_updates` must be 'clip' or 'refuse', got 'shrink'"),
        ({"max_examples": 0}, "`max_examples` must be an integer of 1 or more, got 0"),
        ({"max_examples": 2.5}, "got 2.5"),
        ({"max_examples": True}, "got True"),
    ],
)
def test_limits_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UpdateLimits(**arguments)


def test_a_number_may_come_as_text():
    assert UpdateLimits("2.5") == UpdateLimits(2.5)
    assert UpdateLimits(" 3 * median").largest_norm([1.0, 2.0]) == 3.0
