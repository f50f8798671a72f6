"""A failing client loses its own contribution, but not the round. Too many fail an attempt, and then the run."""

from dataclasses import replace

import pytest
import torch

from peft_ravan.merging import ClientUpdate, merge
from peft_ravan.trainers import FederatedCallback, RoundFailedError
from peft_ravan.trainers.client import faults

from ..conftest import classification_dataset
from ..merging.malformed import every_kind
from .helpers import adapter_state, assert_same, lora, make_trainer, ravan


def out_of_memory(update):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def raises(update):
    raise RuntimeError("out of paper")


def diverges(update):
    for tensor in update.state.values():
        tensor.view(-1)[0] = torch.nan
    return update


def uploads_another_shape(update):
    update.state[next(iter(update.state))] = torch.zeros(3)


class Clock:
    """Takes the place of `time`, so that clients are as fast as a test says, however busy the machine is."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


CLOCK = Clock()


@pytest.fixture(autouse=True)
def _own_clock(monkeypatch):
    monkeypatch.setattr(faults, "time", CLOCK)


def is_slow(update):
    CLOCK.now += 0.3


FAULTS = {
    raises: "RuntimeError: out of paper",
    out_of_memory: "OutOfMemoryError: CUDA out of memory",
    diverges: "entries are NaN or infinite",
    uploads_another_shape: "must have shape",
    is_slow: "ClientTimeoutError: It took .* longer than `client_timeout` of 0.25 s",
}


def fault_at(fault, bad_clients, rounds=(1, 2)):
    def client_fault(client, round_number, update):
        if client in bad_clients and round_number in rounds:
            return fault(update)

    return client_fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("adapter", [ravan, lora])
def test_a_failing_client_costs_its_own_contribution(tmp_path, fault, adapter, caplog):
    updates, timeout = {}, 0.25 if fault is is_slow else None

    def client_fault(client, round_number, update):
        if client == "client_1":
            return fault(update)
        updates[client] = update

    trainer = make_trainer(
        tmp_path, adapter(), client_fault=client_fault, num_rounds=1, max_steps=1, client_timeout=timeout
    )
    start = adapter_state(trainer)
    trainer.train()
    [record] = trainer.state.log_history
    assert record["clients"] == ["client_0", "client_2", "client_3"]
    [failed] = record["failed_clients"]
    assert failed["client"] == "client_1"
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        raise AssertionError(failed["reason"])
    # the round is what it would have been without the client
    others = [updates[client] for client in record["clients"]]
    assert_same(adapter_state(trainer), merge(start, others, trainer.merge_method).state)
    assert record["num_examples"] == sum(update.num_examples for update in others)


def test_a_round_with_too_few_clients_is_repeated_with_others(tmp_path):
    seen = []

    class Rounds(FederatedCallback):
        def on_round_begin(self, args, state, control, clients, **kwargs):
            seen.append(clients)

    bad = []

    def client_fault(client, round_number, update):
        if round_number == 1 and (len(seen) == 1 or client in bad):
            bad.append(client)
            raise RuntimeError("gone")

    trainer = make_trainer(
        tmp_path, callbacks=[Rounds()], client_fault=client_fault, num_clients=8, clients_per_round=3, max_steps=1,
        min_successful_clients=2,
    )  # fmt: skip
    trainer.train()
    first, second = trainer.state.log_history
    assert len(seen) == 3 and len(bad) == 3
    assert not set(seen[0]) & set(seen[1])  # others
    assert first["attempts"] == 2 and first["clients"] == seen[1]
    assert [failed["client"] for failed in first["failed_clients"]] == seen[0]
    assert second["attempts"] == 1 and not second["failed_clients"]


def test_a_run_ends_when_every_attempt_fails_and_keeps_the_last_merge(tmp_path):
    everybody = [f"client_{index}" for index in range(4)]
    trainer = make_trainer(
        tmp_path, client_fault=fault_at(raises, everybody, rounds=(2,)), max_steps=1, max_round_attempts=2
    )
    with pytest.raises(RoundFailedError, match="Round 2: fewer than 1 clients .* in each of 2 attempts") as caught:
        trainer.train()
    assert "'client_3' (RuntimeError: out of paper)" in str(caught.value)
    assert "out of paper" in str(caught.value.__cause__)
    assert_same(adapter_state(trainer), trainer.last_global_state)
    assert len(trainer.state.log_history) == 1


def test_all_uploads_bad_is_a_failed_attempt(tmp_path):
    everybody = [f"client_{index}" for index in range(4)]
    trainer = make_trainer(tmp_path, client_fault=fault_at(diverges, everybody), max_steps=1, max_round_attempts=1)
    start = adapter_state(trainer)
    with pytest.raises(RoundFailedError, match="'client_0' .*entries are NaN or infinite"):
        trainer.train()
    assert_same(adapter_state(trainer), start)


def test_a_client_is_timed_out_between_its_steps(tmp_path):
    steps = []

    class Slow(FederatedCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step)
            if len(steps) == 2:
                CLOCK.now += 0.6

    trainer = make_trainer(tmp_path, callbacks=[Slow()], num_rounds=1, max_steps=5, client_timeout=0.5)
    trainer.train()
    [record] = trainer.state.log_history
    assert [failed["client"] for failed in record["failed_clients"]] == ["client_0"]
    assert steps[:3] == [0, 1, 0]  # it did not go on after its second step


def test_malformed_uploads_cost_only_their_client(tmp_path):
    """A different kind in each round; `tests/merging` has all of them."""
    names = ClientUpdate(adapter_state(make_trainer(tmp_path)), 1)
    kinds = list(every_kind(names))[::12]

    def client_fault(client, round_number, update):
        return kinds[round_number - 1](update) if client == "client_1" else None

    trainer = make_trainer(
        tmp_path, client_fault=client_fault, num_rounds=len(kinds), num_clients=2, max_steps=1, max_round_attempts=1
    )
    trainer.train()
    history = trainer.state.log_history
    assert len(history) == len(kinds) > 30
    assert all("client_0" in record["clients"] for record in history)
    assert all(torch.isfinite(tensor).all() for tensor in adapter_state(trainer).values())
    assert sum(bool(record["failed_clients"]) for record in history) > 0.8 * len(kinds)


@pytest.mark.parametrize(
    "length", [{"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 2}], ids=["steps", "epochs"]
)
def test_a_client_that_does_no_step_has_failed(tmp_path, length):
    data = {"large": classification_dataset(20), "small": classification_dataset(7)}
    trainer = make_trainer(
        tmp_path,
        num_clients=None,
        train_dataset=data,
        dataloader_drop_last=True,
        local_parameters="classifier",
        **length,
    )
    trainer.train()
    for record in trainer.state.log_history:
        assert record["clients"] == ["large"] and record["num_examples"] == 20
        [failed] = record["failed_clients"]
        assert failed["client"] == "small"
        assert "NothingTrainedError: It has 7 examples, and `dataloader_drop_last=True` leaves" in failed["reason"]
    assert len(list(tmp_path.glob("client_states/*"))) == 1


def test_clients_that_all_have_too_little_data_are_refused(tmp_path):
    data = {"a": classification_dataset(5), "b": classification_dataset(7)}
    options = {"num_clients": None, "train_dataset": data, "num_rounds": 1}
    with pytest.raises(
        ValueError, match="none has more than 7 examples, and `dataloader_drop_last=True` .* fewer than 8"
    ):
        make_trainer(tmp_path, **options, dataloader_drop_last=True)
    make_trainer(tmp_path, **options, dataloader_drop_last=True, per_device_train_batch_size=7)
    make_trainer(tmp_path, **options).train()


def test_a_fault_does_not_change_what_other_clients_do(tmp_path):
    """The seeds of a client do not depend on who failed before it."""
    runs = []
    for fault in (None, fault_at(raises, ["client_0"])):
        losses = {}

        def client_fault(client, round_number, update, losses=losses, fault=fault):
            if fault is not None:
                fault(client, round_number, update)
            losses[client] = {name: tensor.clone() for name, tensor in update.state.items()}

        make_trainer(tmp_path, client_fault=client_fault, num_rounds=1).train()
        runs.append(losses)
    for client in ("client_1", "client_2", "client_3"):
        assert_same(runs[0][client], runs[1][client])


def test_what_one_client_can_do_is_limited(tmp_path):
    def client_fault(client, round_number, update):
        if client == "client_1":
            state = {name: 1000 * tensor for name, tensor in update.state.items()}
            return replace(update, state=state, num_examples=10**12)

    limits = {"max_update_norm": "2*median", "max_examples": 60}
    trainer = make_trainer(tmp_path, client_fault=client_fault, num_rounds=2, max_steps=1, **limits)
    start = adapter_state(trainer)
    trainer.train()
    for record in trainer.state.log_history:
        assert record["clipped_clients"] == ["client_1"] and not record["failed_clients"]
        assert record["num_examples"] == 4 * 60  # each has 60, and one of them claims more
    # three clients change by about 0.1 each, the fourth by a thousand times as much
    moved = [adapter_state(trainer)[name] - tensor for name, tensor in start.items()]
    assert torch.cat([change.flatten() for change in moved]).norm() < 1
