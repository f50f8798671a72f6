import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_ravan.merging import ClientUpdate
from peft_ravan.trainers import FederatedArguments
from peft_ravan.trainers.schedule import is_due, learning_rate_factors, mean_train_loss
from peft_ravan.trainers.seeds import derive_seed
from peft_ravan.trainers.serialized import serialized_bytes
from peft_ravan.trainers.server.rounds import Round

from ..properties import examples


CLIENTS = [f"client_{index}" for index in range(10)]


def test_seeds_depend_on_their_name_only():
    seeds = {derive_seed(0, "client", round_, client) for round_ in range(20) for client in CLIENTS}
    assert len(seeds) == 200 and all(0 <= seed < 2**32 for seed in seeds)
    assert derive_seed(0, "client", 3, "a") == derive_seed(0, "client", 3, "a") != derive_seed(1, "client", 3, "a")


def test_schedules_act_over_rounds():
    assert learning_rate_factors(FederatedArguments("out"), 3) == [1, 1, 1]
    linear = FederatedArguments("out", lr_scheduler_type="linear")
    assert learning_rate_factors(linear, 4) == pytest.approx([1, 0.75, 0.5, 0.25])
    warmup = FederatedArguments("out", lr_scheduler_type="constant_with_warmup", warmup_steps=2)
    assert learning_rate_factors(warmup, 4) == pytest.approx([0, 0.5, 1, 1])


@pytest.mark.parametrize(
    "strategy, every, expected",
    [("no", 1, []), ("epoch", 500, [1, 2, 3, 4, 5]), ("steps", 2, [2, 4]), ("steps", 0.4, [2, 4]), ("steps", 9, [])],
)
def test_what_is_due_after_a_round(strategy, every, expected):
    assert [number for number in range(1, 6) if is_due(strategy, every, number, last=5)] == expected


def test_the_last_round_can_be_due_besides():
    assert is_due("steps", 500, 5, last=5, also_last=True) and not is_due("no", 500, 5, last=5, also_last=True)


def test_the_record_weighs_losses_and_counts_what_was_sent():
    this_round = Round(3, ["a", "b"], download_bytes=11, upload_bytes=7)
    this_round.add(ClientUpdate({"w": torch.zeros(1000)}, 30, "a"), train_loss=1.0)
    this_round.add(ClientUpdate({"w": torch.zeros(1000)}, 10, "b"), train_loss=2.0)
    record = this_round.record()
    assert (record["round"], record["clients"], record["num_examples"]) == (3, ["a", "b"], 40)
    assert record["train_loss"] == pytest.approx(1.25)
    assert (record["download_bytes"], record["upload_bytes"]) == (11, 7)


DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
]  # fmt: skip
TENSORS = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    st.lists(st.integers(0, 12), max_size=4),
    st.sampled_from(DTYPES),
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@examples(300)
@given(st.dictionaries(NAMES, TENSORS, max_size=12))
def test_bytes_are_those_of_a_safetensors_file(state):
    assert serialized_bytes(state) == len(safetensors.torch.save(state))


def test_bytes_are_counted_of_tensors_that_a_file_would_need_to_copy():
    transposed = torch.zeros(3, 5).T
    assert serialized_bytes({"w": transposed}) == len(safetensors.torch.save({"w": transposed.contiguous()}))


def test_bytes_of_a_dtype_without_a_known_place_in_the_file_are_counted_too():
    state = {"w": torch.zeros(4, dtype=torch.float32), "scales": torch.zeros(6).to(torch.float8_e8m0fnu)}
    assert serialized_bytes(state) == len(safetensors.torch.save(state))


def test_a_round_in_which_nobody_trained_has_no_loss():
    skipped, trained = Round(1, []), Round(2, ["a"])
    trained.add(ClientUpdate({"w": torch.zeros(1)}, 30, "a"), train_loss=1.5)
    assert skipped.record() == {
        "round": 1, "clients": [], "failed_clients": [], "attempts": 1, "num_examples": 0, "upload_bytes": 0,
        "download_bytes": 0,
    }  # fmt: skip
    assert mean_train_loss([skipped.record(), trained.record()], min_clients=3) == 1.5
    with pytest.raises(RuntimeError, match="in none of the 1 rounds were min_clients=3 clients available"):
        mean_train_loss([skipped.record()], min_clients=3)
