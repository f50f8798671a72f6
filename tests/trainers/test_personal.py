"""Personal parts stay with their clients: they are neither uploaded nor merged, and are restored in the next round."""

import errno
import hashlib
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from peft_ravan.trainers import FederatedCallback, RoundFailedError
from peft_ravan.trainers.client import store as store_module
from peft_ravan.trainers.client.store import ClientStore, ClientStoreError
from peft_ravan.trainers.exchange import KeptFile

from .helpers import StopAfter, adapter_state, assert_same, kept_by_clients, lora, make_trainer, ravan


class Recorder(FederatedCallback):
    """Records the model before and after each client's training."""

    def __init__(self):
        self.before, self.after, self.trainer = {}, {}, None
        self.attempts = []

    def on_round_begin(self, args, state, control, clients, **kwargs):
        self.attempts.append(clients)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.current = (self.trainer.state.global_step, len(self.before))
            self.before[self.current] = adapter_state(self.trainer)

    def on_client_end(self, args, state, control, client, **kwargs):
        self.after[client, state.global_step + 1] = adapter_state(self.trainer)
        self.before[client, state.global_step + 1] = self.before.pop(self.current)


def recorded_run(tmp_path, adapter, recorder=None, **kwargs):
    recorder = recorder or Recorder()
    trainer = make_trainer(tmp_path, adapter, callbacks=[recorder], **{"max_steps": 2, "num_rounds": 3, **kwargs})
    recorder.trainer = trainer
    start = adapter_state(trainer)
    trainer.train()
    return trainer, recorder, start


@pytest.mark.parametrize(
    "adapter, patterns, merge_method",
    [(ravan, ["classifier"], None), (lora, ["lora_B"], None), (lora, None, "fedsa_lora"), (ravan, r"layer\.0", None)],
)
def test_a_client_finds_its_own_part_again_and_the_shared_part_of_all(tmp_path, adapter, patterns, merge_method):
    trainer, recorder, start = recorded_run(
        tmp_path, adapter(), local_parameters=patterns, merge_method=merge_method, clients_per_round=2, num_rounds=4
    )
    expected = {None: "lora_B", r"layer\.0": "layer.0"}.get(patterns if not isinstance(patterns, list) else 0)
    part = expected or patterns[0]
    personal = {name for name in start if part in name}
    assert personal and personal != set(start)
    assert set(trainer.last_global_state) == set(start) - personal
    last = {}
    for record in trainer.state.log_history:
        number = record["round"]
        befores = [recorder.before[client, number] for client in record["clients"]]
        for client, before in zip(record["clients"], befores, strict=True):
            own = last.get(client, start)
            assert all(torch.equal(before[name], own[name]) for name in personal)
            assert all(torch.equal(before[name], befores[0][name]) for name in set(start) - personal)
            last[client] = recorder.after[client, number]
    assert any(len([r for r in trainer.state.log_history if client in r["clients"]]) > 1 for client in last)
    # afterwards the model has the shared part and the initial personal part
    end = adapter_state(trainer)
    assert all(torch.equal(end[name], start[name]) for name in personal)
    assert any(not torch.equal(end[name], start[name]) for name in set(start) - personal)


def test_personal_parts_are_saved_for_each_client_and_not_uploaded(tmp_path):
    trainer, recorder, start = recorded_run(tmp_path, lora(), merge_method="fedsa_lora")
    everything, _, _ = recorded_run(tmp_path / "all", lora(), merge_method="fedit")
    for client, kept in kept_by_clients(trainer).items():
        assert set(kept) == {name for name in start if "lora_B" in name}
        assert all(torch.equal(tensor, recorder.after[client, 3][name]) for name, tensor in kept.items())
    uploads = [run.state.log_history[-1]["upload_bytes"] for run in (trainer, everything)]
    assert uploads[0] < 0.7 * uploads[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "client_states", "rounds.jsonl"]


def test_a_resumed_run_finds_what_its_clients_had(tmp_path):
    class Stop(FederatedCallback):
        def on_client_end(self, args, state, control, **kwargs):
            self.count = getattr(self, "count", 0) + 1
            if self.count == 5:  # the first client of the third round has already kept its new part
                raise KeyboardInterrupt

    options = {
        "local_parameters": "classifier", "clients_per_round": 2, "num_rounds": 4, "save_strategy": "epoch", "max_steps": 2,
    }  # fmt: skip
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "resumed", callbacks=[Stop()], **options).train()
    resumed = make_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(adapter_state(whole), adapter_state(resumed))
    for first, second in zip(*(kept_by_clients(run).values() for run in (whole, resumed)), strict=True):
        assert_same(first, second)


def test_what_clients_kept_is_there_for_every_checkpoint_also_after_a_resumed_run(tmp_path):
    options = {"local_parameters": "classifier", "num_rounds": 4, "save_strategy": "epoch", "max_steps": 1}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    for round_number in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path / "run", callbacks=[StopAfter(round_number)], **options).train(
                resume_from_checkpoint=round_number == 3
            )
    for round_number in (2, 3):  # so that only the first checkpoint is left to go on from
        (tmp_path / "run" / f"checkpoint-{round_number}" / "federation_state.json").unlink()
    resumed = make_trainer(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(adapter_state(whole), adapter_state(resumed))
    for first, second in zip(*(kept_by_clients(run).values() for run in (whole, resumed)), strict=True):
        assert_same(first, second)


def test_a_diverged_client_keeps_what_it_had(tmp_path):
    def client_fault(client, round_number, update):
        if client == "client_1" and round_number == 2:
            next(iter(update.state.values())).view(-1)[0] = torch.nan
        return update

    trainer, recorder, _ = recorded_run(tmp_path, ravan(), local_parameters="classifier", client_fault=client_fault)
    assert [failed["client"] for failed in trainer.state.log_history[1]["failed_clients"]] == ["client_1"]
    before = recorder.before["client_1", 3]
    after = recorder.after["client_1", 1]
    assert all(torch.equal(before[name], after[name]) for name in before if "classifier" in name)


def refused_for_its_shape(update):
    update.state[next(iter(update.state))] = torch.zeros(3)


def refused_for_its_examples(update):
    return replace(update, num_examples=0)


@pytest.mark.parametrize("fault", [refused_for_its_shape, refused_for_its_examples])
def test_a_client_whose_upload_is_refused_has_what_it_had_before(tmp_path, fault):
    def client_fault(client, round_number, update):
        if client == "client_1" and round_number in (1, 3):
            return fault(update)

    trainer, recorder, start = recorded_run(
        tmp_path, ravan(), local_parameters="classifier", client_fault=client_fault, num_rounds=4
    )
    assert [len(record["failed_clients"]) for record in trainer.state.log_history] == [1, 0, 1, 0]
    for number, has in ((2, start), (4, recorder.after["client_1", 2])):
        before = recorder.before["client_1", number]
        assert all(torch.equal(before[name], has[name]) for name in before if "classifier" in name)


def test_clients_of_an_attempt_that_does_not_count_have_what_they_had_before(tmp_path):
    recorder = Recorder()

    def client_fault(client, round_number, update):
        if len(recorder.attempts) == 2 and client == recorder.attempts[-1][-1]:
            raise RuntimeError("gone")

    trainer, recorder, _ = recorded_run(
        tmp_path, ravan(), recorder, local_parameters="classifier", client_fault=client_fault, num_rounds=2,
        num_clients=8, clients_per_round=3, min_successful_clients=3,
    )  # fmt: skip
    first, discarded, second = recorder.attempts
    assert [record["clients"] for record in trainer.state.log_history] == [first, second]
    for client, kept in kept_by_clients(trainer).items():
        took_part = [number for number, clients in ((1, first), (2, second)) if client in clients]
        assert bool(kept) == bool(took_part)
        for name, tensor in kept.items():
            assert torch.equal(tensor, recorder.after[client, took_part[-1]][name])
    assert set(discarded) - {*first, *second}  # otherwise nothing was tested


def test_a_round_that_is_given_up_leaves_nothing_with_its_clients(tmp_path):
    def client_fault(client, round_number, update):
        if round_number == 2 and client == "client_3":
            raise RuntimeError("gone")

    trainer = make_trainer(
        tmp_path, local_parameters="classifier", client_fault=client_fault, max_steps=1, min_successful_clients=4,
        max_round_attempts=2,
    )  # fmt: skip
    with pytest.raises(RoundFailedError):
        trainer.train()
    assert {file.round for file in trainer.last_server_state.kept.values()} == {1}


def test_a_full_disk_ends_the_run_and_is_not_the_fault_of_a_client(tmp_path, monkeypatch):
    options = {"local_parameters": "classifier", "num_rounds": 3, "save_strategy": "epoch", "max_steps": 1}
    write, calls = store_module.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 6:  # that of the second client in the second round
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(store_module, "save_file", full)
    trainer = make_trainer(tmp_path / "run", **options)
    with pytest.raises(OSError, match="'client_1' keeps could not be written .No space left on device") as caught:
        trainer.train()
    assert caught.value.errno == errno.ENOSPC
    assert len(trainer.state.log_history) == 1
    resumed = make_trainer(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=True)
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    assert_same(adapter_state(resumed), adapter_state(whole))


@pytest.mark.parametrize(
    "patterns, message",
    [(["clasifier"], "'clasifier' is in none of the names"), ([".*"], "so there is nothing to share")],
)
def test_patterns_that_cannot_be_meant_are_refused_before_the_run(tmp_path, patterns, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, local_parameters=patterns).train()


# ---- The store -------------------------------------------------------------------


def value(number: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([number])}


def test_the_store_gives_what_was_kept_in_a_round(tmp_path):
    store = ClientStore(tmp_path)
    assert store.load("a", None) == {} and store.newest("a", up_to=5) is None
    digests = {number: store.save("a", number, value(number), kept_in=number - 1) for number in (1, 2, 3)}
    assert [store.load("a", number)["w"].item() for number in (1, 2, 3)] == [1, 2, 3]
    assert [store.newest("a", up_to=number) for number in (0, 2, 9)] == [None, 2, 3]
    [path] = tmp_path.rglob("round-2.*")
    assert digests[2] == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ClientStoreError, match="What client 'a' keeps could not be read"):
        store.load("a", 4)
    store.forget_newer({"a": KeptFile(1, "")})
    assert [path.name for path in tmp_path.rglob("round-*")] == ["round-1.safetensors"]


def test_what_was_kept_in_a_round_that_does_not_count_is_deleted_with_the_next(tmp_path):
    store = ClientStore(tmp_path)
    for number in (1, 2, 3):  # the updates of rounds 2 and 3 were refused
        store.save("a", number, value(number), kept_in=1)
        assert store.load("a", 1)["w"].item() == 1
    assert sorted(path.name for path in tmp_path.rglob("round-*")) == ["round-1.safetensors", "round-3.safetensors"]


def test_a_full_disk_is_distinguished_from_a_failing_client(tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    store = ClientStore(tmp_path)
    store.save("a", 1, value(1))
    monkeypatch.setattr(store_module, "save_file", full)
    with pytest.raises(
        ClientStoreError, match="What client 'a' keeps could not be written .*No space left.*freeing disk space"
    ):
        store.save("a", 2, value(2), kept_in=1)
    assert [path.name for path in tmp_path.rglob("round-*")] == ["round-1.safetensors"]
    next(tmp_path.rglob("round-1.safetensors")).write_bytes(b"half")
    with pytest.raises(ClientStoreError, match="What client 'a' keeps could not be read"):
        store.load("a", 1)


def test_the_store_deletes_what_no_resumed_run_needs(tmp_path):
    store = ClientStore(tmp_path)
    for number, kept_in in ((1, None), (2, 1), (4, 2), (5, 4)):
        store.save("a", number, value(number), kept_in, keep_from=number - 1)
    # a run may go on after round 4 or 5
    assert sorted(path.name for path in tmp_path.rglob("*.safetensors")) == [
        "round-4.safetensors",
        "round-5.safetensors",
    ]
    assert load_file(next(tmp_path.rglob("round-5.safetensors")))["w"].item() == 5


def test_names_of_clients_do_not_lead_out_of_the_folder(tmp_path):
    store = ClientStore(tmp_path / "run")
    for name in ("../../etc", "a/b", "a_b", "x" * 500, "Zürich ☃"):
        store.save(name, 1, value(len(name)))
    assert {path.parent.parent for path in tmp_path.rglob("*.safetensors")} == {tmp_path / "run" / "client_states"}
    assert store.load("a/b", 1)["w"].item() == 3 and store.load("x" * 500, 1)["w"].item() == 500
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5
