"""
Malformed uploads of every kind, in every place, to every method: each one loses its own contribution and nothing else.

`merge` is called as by a server, with `on_bad_update="drop"`. The result must be that of the clients with valid
updates alone. If none of them is left, the only possible result is an `UpdateError`.
"""

import itertools
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from safetensors.torch import save_file

from peft_ravan.merging import ClientUpdate, SafetensorsState, UpdateError, merge, plain_update

from ..properties import examples
from .malformed import every_kind, malformed
from .reference import CASES, State, assert_same, effect_of, merge_faithfully, random_round


MAX_MALFORMED = 2  # of five: Krum needs three that fit


def check_malformed_uploads(
    case: tuple[str, str], global_state: State, updates: list[ClientUpdate], made: dict[int, Any]
) -> None:
    """Merge updates, those in some places replaced with malformed ones."""
    before = {name: tensor.clone() for name, tensor in global_state.items()}
    arriving = [made.get(place, update) for place, update in enumerate(updates)]
    result = merge_faithfully(case[0], global_state, arriving, on_bad_update="drop")

    assert all(torch.isfinite(tensor).all() for tensor in result.state.values())
    assert all(torch.equal(global_state[name], tensor) for name, tensor in before.items())
    dropped = [entry["client"] for entry in result.diagnostics["dropped"]]
    assert result.diagnostics["num_clients"] == len(updates) - len(dropped)
    whole = [update for index, update in enumerate(updates) if index not in made]
    if len(dropped) == len(made) and not {update.client_id for update in whole} & set(dropped):
        assert_same(effect_of(result), effect_of(merge_faithfully(case[0], global_state, whole)), 0.0)


def test_every_kind_costs_its_own_contribution():
    _, [update] = random_round(*CASES[0], num_clients=1)
    for number in range(len(list(every_kind(update)))):
        case, place = CASES[number % len(CASES)], number % 5
        global_state, updates = random_round(*case, dtype=torch.float32)
        make = next(itertools.islice(every_kind(updates[place]), number, None))
        check_malformed_uploads(case, global_state, updates, {place: make(updates[place])})


@examples(100, deep=70_000)  # of one or two malformed uploads, so that the deep run has 100,000 of them
@given(data=st.data(), case=st.sampled_from(CASES), num_malformed=st.integers(1, MAX_MALFORMED))
def test_malformed_uploads_cost_their_own_contribution(data, case, num_malformed):
    global_state, updates = random_round(*case, dtype=torch.float32)
    places = data.draw(st.permutations(range(len(updates))))[:num_malformed]
    made = {place: data.draw(malformed(updates[place])) for place in places}
    check_malformed_uploads(case, global_state, updates, made)


@examples(50, deep=10_000)
@given(data=st.data(), case=st.sampled_from(CASES))
def test_a_malformed_upload_alone_is_an_update_error_or_merged(data, case):
    method, adapter = case
    global_state, [update] = random_round(method, adapter, num_clients=1, dtype=torch.float32)
    try:
        result = merge_faithfully(method, global_state, [data.draw(malformed(update))])
    except UpdateError as error:
        assert len(str(error)) < 2000
    else:
        assert all(torch.isfinite(tensor).all() for tensor in result.state.values())


def test_an_update_is_read_once_and_detached():
    reads = []

    class Counting(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    weight = torch.nn.Parameter(torch.ones(2))
    arrived = ClientUpdate(Counting(w=weight), np.int64(5), "north")
    update = plain_update(arrived)
    assert reads == ["w"] and type(update.state) is dict
    assert type(update.state["w"]) is torch.Tensor and not update.state["w"].requires_grad
    assert update.state["w"].data_ptr() == weight.data_ptr()  # no copy of the values
    assert type(update.num_examples) is int and update.num_examples == 5


def test_integers_of_numpy_count_examples():
    updates = [ClientUpdate({"w": torch.tensor([float(n)])}, np.int64(n), f"client_{n}") for n in (1, 3)]
    result = merge({"w": torch.zeros(1)}, updates, "fedavg")
    assert result.state["w"].item() == 2.5 and result.diagnostics["num_examples"] == 4
    assert type(result.diagnostics["num_examples"]) is int


@pytest.mark.parametrize("what", [None, "update", {"w": torch.ones(1)}])
def test_what_is_not_an_update_is_reported_by_number(what):
    with pytest.raises(UpdateError, match="client number 1 .without a name.: must upload a ClientUpdate, got"):
        merge({"w": torch.zeros(1)}, [ClientUpdate({"w": torch.ones(1)}, 1), what], "fedavg")


def test_a_file_stays_a_file(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "update.safetensors")
    state = SafetensorsState(tmp_path / "update.safetensors")
    assert plain_update(ClientUpdate(state, 1)).state is state
