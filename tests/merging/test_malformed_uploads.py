"""
Malformed uploads of every kind, in every place, to every method: each one loses its own contribution and nothing else.

`merge` is called as by a server, with `on_bad_update="drop"`. The result must be that of the clients with valid
updates alone. If none of them is left, the only possible result is an `UpdateError`.
"""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from safetensors.torch import save_file

from peft_ravan.merging import ClientUpdate, SafetensorsState, UpdateError, merge, plain_update

from ..properties import examples
from .malformed import malformed
from .reference import CASES, assert_same, effect_of, merge_faithfully, random_round


MAX_MALFORMED = 2  # of five: Krum needs three that fit


@examples(1400)  # of one or two malformed uploads, so that the deep run has 100,000 of them
@given(data=st.data(), case=st.sampled_from(CASES), num_malformed=st.integers(1, MAX_MALFORMED))
def test_malformed_uploads_cost_their_own_contribution(data, case, num_malformed):
    method, adapter = case
    global_state, updates = random_round(method, adapter, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in global_state.items()}
    arriving, places = list(updates), data.draw(st.permutations(range(len(updates))))[:num_malformed]
    for place in places:
        arriving[place] = data.draw(malformed(updates[place]))
    result = merge_faithfully(method, global_state, arriving, on_bad_update="drop")

    assert all(torch.isfinite(tensor).all() for tensor in result.state.values())
    assert all(torch.equal(global_state[name], tensor) for name, tensor in before.items())
    dropped = [entry["client"] for entry in result.diagnostics["dropped"]]
    assert result.diagnostics["num_clients"] == len(updates) - len(dropped)
    whole = [update for index, update in enumerate(updates) if index not in places]
    if len(dropped) == len(places) and not {update.client_id for update in whole} & set(dropped):
        assert_same(effect_of(result), effect_of(merge_faithfully(method, global_state, whole)), 0.0)


@examples(200)
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
