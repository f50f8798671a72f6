"""Methods that freeze different parts in each round, depending on the number of the round."""

from dataclasses import replace

import pytest
import torch

from peft_ravan.merging import MERGE_METHODS, UpdateError
from peft_ravan.merging.checking import UpdateChecker
from peft_ravan.merging.server_step import ServerStep
from peft_ravan.merging.updates import MergeResult

from .reference import CONFIG, client, lora_state


CYCLE = ((".lora_A.",), (".lora_B.",))
ALTERNATING = replace(MERGE_METHODS["fedit"], frozen_parts=("norm",), frozen_cycle=CYCLE)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def checked(update, round_number):
    checker = UpdateChecker(lora_state(seeded()), ALTERNATING, config=CONFIG, round_number=round_number)
    return list(checker.passing([update]))


def trained(global_state, part):
    """A client that has changed the tensors with a part in their name, and all tensors that are not factors."""
    moved = lora_state(seeded(1))
    return {n: moved[n] if part in n or ".lora_" not in n else tensor for n, tensor in global_state.items()}


def test_a_round_has_its_entry_of_the_cycle_and_what_is_always_frozen():
    assert [ALTERNATING.frozen_in(n) for n in (1, 2, 3, 8)] == [
        ("norm", ".lora_A."), ("norm", ".lora_B."), ("norm", ".lora_A."), ("norm", ".lora_B.")
    ]  # fmt: skip
    assert MERGE_METHODS["ffa_lora"].frozen_in(7) == MERGE_METHODS["ffa_lora"].frozen_parts
    assert MERGE_METHODS["fedavg"].frozen_in(7) == ()


@pytest.mark.parametrize("round_number, part, other", [(1, ".lora_B.", ".lora_A."), (2, ".lora_A.", ".lora_B.")])
def test_an_upload_may_lack_what_is_frozen_in_its_round_and_nothing_else(round_number, part, other):
    global_state = lora_state(seeded())
    state = trained(global_state, part)
    assert len(checked(client(state), round_number)) == 1
    slim = {name: tensor for name, tensor in state.items() if other not in name}
    assert len(checked(client(slim), round_number)) == 1
    with pytest.raises(UpdateError, match=rf"{other}.*: missing from the update"):
        checked(client(slim), round_number + 1)
    with pytest.raises(
        UpdateError, match=rf"{part}.*differs from the global one.*frozen in round {round_number + 1}. Fr"
    ):
        checked(client(state), round_number + 1)


def test_another_alpha_is_refused_also_where_b_is_not_uploaded():
    state = {
        name: tensor for name, tensor in trained(lora_state(seeded()), ".lora_A.").items() if ".lora_B." not in name
    }
    with pytest.raises(UpdateError, match="its scaling alpha / r is 4"):
        checked(client(state, config=replace(CONFIG, lora_alpha=12)), round_number=2)


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam", "fedyogi"])
def test_the_moments_of_what_rests_wait_for_its_next_round(optimizer):
    """Two rounds of B with one of A between them move B as two rounds that follow each other would."""
    start = {"m.lora_A.weight": torch.zeros(1, 2), "m.lora_B.weight": torch.zeros(2, 1)}

    def step(state, server_state, round_number):
        part = CYCLE[round_number % 2][0]  # what is not frozen
        moved = {name: tensor + 1 if part in name else tensor for name, tensor in state.items()}
        return ServerStep(optimizer, state=server_state, round_number=round_number).take(
            ALTERNATING, {}, state, MergeResult(moved)
        )

    one, remembered = step(start, {}, 1)
    two, later = step(one, remembered, 2)
    three, _ = step(two, later, 3)
    assert torch.equal(two["m.lora_B.weight"], one["m.lora_B.weight"])
    assert all(torch.equal(later[key], tensor) for key, tensor in remembered.items())
    at_once, _ = step(one, remembered, 3)
    assert torch.equal(three["m.lora_B.weight"], at_once["m.lora_B.weight"])
    assert torch.equal(three["m.lora_A.weight"], two["m.lora_A.weight"]) and two["m.lora_A.weight"].all()
