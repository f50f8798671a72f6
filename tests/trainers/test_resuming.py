"""An interrupted run resumes as if it had not been interrupted, wherever that was."""

import errno
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback

from peft_ravan import RavanConfig
from peft_ravan.trainers import CheckpointError, FederatedCallback, read_history
from peft_ravan.trainers.client.store import ClientStore
from peft_ravan.trainers.server import checkpoints
from peft_ravan.trainers.server.checkpoints import read_server_state

from ..conftest import classification_dataset
from ..forked import run_forked
from .helpers import (
    StopAfter,
    adapter_state,
    assert_same,
    comparable,
    interrupted,
    kept_by_clients,
    lora,
    ravan,
    resumable_trainer,
    resumed_after,
)
from .interrupted_run import NUM_ROUNDS, run_until


def assert_same_runs(whole, resumed) -> None:
    assert_same(adapter_state(whole), adapter_state(resumed))
    assert comparable(whole.state.log_history) == comparable(resumed.state.log_history)
    for name in ("adapter_model.safetensors", "federation_state.safetensors"):
        first, second = (
            load_file(Path(run.args.output_dir) / f"checkpoint-{run.args.num_rounds}" / name)
            for run in (whole, resumed)
        )
        assert_same(first, second)


@pytest.mark.parametrize("adapter", [ravan, lora])
def test_an_interrupted_run_goes_on_as_the_uninterrupted_run(tmp_path, adapter):
    whole = resumable_trainer(tmp_path / "whole", adapter=adapter())
    whole.train()
    interrupted(tmp_path / "resumed", 2, adapter=adapter())
    resumed = resumable_trainer(tmp_path / "resumed", adapter=adapter())
    torch.manual_seed(1234)  # the state of the process does not matter
    resumed.train(resume_from_checkpoint=True)
    assert_same_runs(whole, resumed)


@pytest.mark.parametrize(
    "adapter, after, options",
    [
        (ravan, 2, {"merge_method": "fedrpca", "server_optimizer": "fedavgm"}),
        (lora, 2, {"merge_method": "fedrpca", "server_optimizer": "fedavgm"}),
        # the training in a round is determined by its number
        (lora, 1, {"merge_method": "rolora"}),
        (lora, 2, {"merge_method": "rolora", "scaffold": True}),
        (lora, 1, {"merge_method": "fedsvd"}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, adapter, after, options):
    options = {"num_rounds": 3, "max_steps": 1, **options}
    whole = resumable_trainer(tmp_path / "whole", adapter=adapter(), **options)
    whole.train()
    assert_same_runs(whole, resumed_after(after, whole, tmp_path / "resumed", adapter=adapter(), **options))


def test_after_a_kill_at_any_point_the_run_resumes_bit_for_bit(tmp_path):
    whole = resumable_trainer(tmp_path / "whole", num_rounds=NUM_ROUNDS)
    whole.train()
    gradient_svd = RavanConfig(r=2, num_heads=2, init_bases="gradient_svd", task_type="SEQ_CLS")
    with_bases = resumable_trainer(tmp_path / "whole_with_bases", adapter=gradient_svd, num_rounds=NUM_ROUNDS)
    with_bases.train()
    keeping = resumable_trainer(
        tmp_path / "whole_keeping", scaffold=True, local_parameters="classifier", num_rounds=NUM_ROUNDS
    )
    keeping.train()
    uninterrupted = {"bases": with_bases, "keeping": keeping}
    left = {
        "bases": ["checkpoint-0"],
        "first": ["checkpoint-0"],
        "client": ["checkpoint-0", "checkpoint-1", "checkpoint-2"],
        "saving": ["checkpoint-0", "checkpoint-1"],
        "renaming": ["checkpoint-0", "checkpoint-1"],
        "keeping": ["checkpoint-0", "checkpoint-1", "checkpoint-2"],
    }
    for moment in left:
        assert run_forked(run_until, moment, tmp_path / moment) == -signal.SIGKILL
    assert left == {moment: sorted(path.name for path in (tmp_path / moment).glob("checkpoint-*")) for moment in left}
    # it was killed in the middle: one client has saved its state in a round that does not count
    assert len(list((tmp_path / "keeping").rglob("round-3.safetensors"))) == 1
    for folder in (tmp_path / moment for moment in left):
        assert run_forked(run_until, None, folder) == 0
        trainer = uninterrupted.get(folder.name, whole)
        assert_same(load_file(folder / "end.safetensors"), trainer.last_global_state)
        assert comparable(read_history(folder)) == comparable(trainer.state.log_history)
        # nothing incomplete is left
        assert not list(folder.glob(".*")) and not list(folder.rglob("*.incomplete"))
    last_checkpoint = f"checkpoint-{NUM_ROUNDS}"
    adapters = [
        tmp_path / run / last_checkpoint / "adapter_model.safetensors" for run in ("bases", "whole_with_bases")
    ]
    assert_same(*map(load_file, adapters))  # the bases, too
    last = read_server_state(tmp_path / "keeping" / last_checkpoint).state
    kept, store = kept_by_clients(keeping), ClientStore(tmp_path / "keeping")
    for client, file in last.kept.items():
        assert_same(store.load(client, file.round), kept[client])
    assert last.kept == keeping.last_server_state.kept


def test_a_run_can_be_prolonged(tmp_path, caplog):
    options = {"lr_scheduler_type": "constant", "max_steps": 1}
    resumable_trainer(tmp_path, num_rounds=1, **options).train()
    longer = resumable_trainer(tmp_path, num_rounds=2, **options)
    longer.train(resume_from_checkpoint=True)
    whole = resumable_trainer(tmp_path / "whole", num_rounds=2, **options)
    whole.train()
    assert_same(adapter_state(longer), adapter_state(whole))


# ---- Damaged and foreign checkpoints ---------------------------------------------


def damage(folder, kind):
    if kind == "truncated adapter":
        with open(folder / "adapter_model.safetensors", "r+b") as file:
            file.truncate(100)
    elif kind == "truncated state":
        (folder / "federation_state.json").write_text('{"format_version": 1, "rou')
    elif kind == "missing file":
        (folder / "trainer_state.json").unlink()
    elif kind == "flipped bit":
        tensors = load_file(folder / "adapter_model.safetensors")
        next(iter(tensors.values())).view(-1)[0] += 1
        save_file(tensors, folder / "adapter_model.safetensors")
    elif kind == "changed state":
        state = json.loads((folder / "federation_state.json").read_text())
        state["facts"]["clients"] = 5
        (folder / "federation_state.json").write_text(json.dumps(state))
    elif kind == "changed list":
        (folder / "federation_state.json").write_text("[]")
    elif kind == "other version":
        state = json.loads((folder / "federation_state.json").read_text())
        (folder / "federation_state.json").write_text(json.dumps({**state, "format_version": 99}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    trainer = resumable_trainer(folder, num_rounds=3, max_steps=1)
    trainer.train()
    return folder, adapter_state(trainer)


def test_a_finished_run_is_loaded_and_not_run_again(tmp_path, finished):
    folder, end = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    trained = []

    class Rounds(FederatedCallback):
        def on_round_begin(self, args, state, control, **kwargs):
            trained.append(state.global_step + 1)

    again = resumable_trainer(tmp_path, num_rounds=3, max_steps=1, callbacks=[Rounds()])
    again.train(resume_from_checkpoint=True)
    assert_same(adapter_state(again), end)
    assert len(again.state.log_history) == 3 and not trained


@pytest.mark.parametrize(
    "kind, message",
    [
        ("truncated adapter", "adapter_model.safetensors is not what was written"),
        ("truncated state", "federation_state.json is not JSON"),
        ("missing file", "trainer_state.json is missing"),
        ("flipped bit", "adapter_model.safetensors is not what was written"),
        ("changed state", "federation_state.json is not what was written"),
        ("changed list", "federation_state.json is not what was written"),
        ("other version", "format version 99, and this version reads 4"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(tmp_path, finished, kind, message, caplog):
    folder, end = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoint-3", kind)
    trainer = resumable_trainer(tmp_path, num_rounds=3, max_steps=1)
    start = adapter_state(trainer)
    with pytest.raises(CheckpointError, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(adapter_state(trainer), start)
    trainer.train(resume_from_checkpoint=True)
    assert_same(adapter_state(trainer), end)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"adapter": LoraConfig(r=2, task_type="SEQ_CLS")}, "other peft_type"),
        ({"adapter": RavanConfig(r=3, num_heads=3, task_type="SEQ_CLS")}, "other shapes of the adapter"),
        ({"adapter": replace(ravan(), projection_seed=5)}, "the bases in .*query.* are not those of the model"),
        (
            {"adapter": replace(ravan(), projection_seed=5, save_projection=False)},
            "the bases in .*query.* are not those of the model",
        ),
        ({"num_clients": 5}, "other clients .4, not 5."),
        ({"train_dataset": classification_dataset(83)}, "other names or sizes of clients"),
    ],
)
def test_a_checkpoint_of_another_federation_is_refused(finished, kwargs, message):
    folder, _ = finished
    trainer = resumable_trainer(folder, num_rounds=3, max_steps=1, **kwargs)
    start = adapter_state(trainer)
    with pytest.raises(CheckpointError, match=f"belongs to another federation: .*{message}"):
        trainer.train(resume_from_checkpoint=True)
    assert_same(adapter_state(trainer), start)


@pytest.fixture(scope="module")
def finished_with_states(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    trainer = resumable_trainer(folder, num_rounds=3, max_steps=1, scaffold=True, local_parameters="classifier")
    trainer.train()
    return folder, adapter_state(trainer)


def newest_states(folder):
    """The file with the latest state of each client, by its round."""
    paths = sorted(folder.glob("client_states/*/*"), key=lambda path: int(path.stem.split("-")[1]))
    return {path.parent: path for path in paths}.values()


@pytest.mark.parametrize("kind", ["all deleted", "one deleted", "truncated", "changed"])
def test_what_clients_keep_is_a_part_of_the_checkpoint(tmp_path, finished_with_states, kind):
    folder, end = finished_with_states
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = next(path for path in newest_states(tmp_path) if path.stem == "round-3")
    if kind == "all deleted":
        shutil.rmtree(tmp_path / "client_states")
    elif kind == "one deleted":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    else:
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[0] += 1
        save_file(tensors, path)
    options = {"num_rounds": 4, "lr_scheduler_type": "constant", "scaffold": True, "local_parameters": "classifier"}
    trainer = resumable_trainer(tmp_path, **options)
    start = adapter_state(trainer)
    problem = "is missing" if "deleted" in kind else "is cut off or damaged"
    with pytest.raises(
        CheckpointError, match=f"checkpoint-3 is incomplete. What client .* {problem} .*Put .* back as"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(adapter_state(trainer), start)
    if (
        kind == "all deleted"
    ):  # no other checkpoint is complete, but the one of the start, at which nobody had anything
        shutil.rmtree(tmp_path / "checkpoint-0")
        with pytest.raises(ValueError, match="no complete checkpoint"):
            trainer.train(resume_from_checkpoint=True)
        return
    # the one before needs an older file
    again = resumable_trainer(tmp_path, num_rounds=3, max_steps=1, scaffold=True, local_parameters="classifier")
    again.train(resume_from_checkpoint=True)
    assert_same(adapter_state(again), end)
    assert [record["round"] for record in again.state.log_history] == [1, 2, 3]


def test_a_run_without_parts_of_clients_does_not_ask_for_them(tmp_path, finished_with_states):
    folder, _ = finished_with_states
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "client_states")
    resumable_trainer(tmp_path, num_rounds=3, max_steps=1).train(resume_from_checkpoint=True)


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        resumable_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, finished):
    write, calls = checkpoints.write_server_state, []

    def full(folder, *args):
        calls.append(folder)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, *args)

    monkeypatch.setattr("peft_ravan.trainers.resuming.write_server_state", full)
    trainer = resumable_trainer(tmp_path, num_rounds=3, max_steps=1)
    with pytest.raises(OSError, match="could not be written .No space left on device.*earlier rounds are complete"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == [
        "checkpoint-0",
        "checkpoint-1",
        "checkpoint-2",
    ]
    resumed = resumable_trainer(tmp_path, num_rounds=3, max_steps=1)
    resumed.train(resume_from_checkpoint=True)
    assert_same(adapter_state(resumed), finished[1])


# ---- What Trainer's users expect of checkpoints ----------------------------------


def test_the_best_model_is_loaded_at_the_end_and_kept(tmp_path):
    scores = iter([0.1, 0.9, 0.3])
    trainer = resumable_trainer(
        tmp_path, load_best_model_at_end=True, metric_for_best_model="accuracy", save_total_limit=1, num_rounds=3,
        max_steps=1,
    )  # fmt: skip
    trainer.compute_metrics = lambda prediction: {"accuracy": next(scores)}
    best = {}

    class Keep(FederatedCallback):
        def on_round_end(self, args, state, control, record, **kwargs):
            best[record["round"]] = adapter_state(trainer)

    trainer.add_callback(Keep())
    trainer.train()
    assert_same(adapter_state(trainer), best[2])
    assert trainer.state.best_metric == 0.9 and trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}


def test_saving_the_best_only(tmp_path):
    scores = iter([0.1, 0.9, 0.3, 0.2])
    trainer = resumable_trainer(tmp_path, save_strategy="best", metric_for_best_model="accuracy", max_steps=1)
    trainer.compute_metrics = lambda prediction: {"accuracy": next(scores)}
    trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


@pytest.mark.parametrize("interrupt", [False, True])
def test_early_stopping_counts_rounds_also_over_an_interruption(tmp_path, interrupt):
    scores = [0.1, 0.5, 0.4, 0.3, 0.9, 0.9]

    def make(callbacks=()):
        trainer = resumable_trainer(
            tmp_path, num_rounds=6, max_steps=1, load_best_model_at_end=True, metric_for_best_model="accuracy",
            callbacks=[EarlyStoppingCallback(early_stopping_patience=2), *callbacks],
        )  # fmt: skip
        trainer.compute_metrics = lambda prediction: {"accuracy": scores[trainer.state.global_step - 1]}
        return trainer

    if interrupt:
        with pytest.raises(KeyboardInterrupt):
            make([StopAfter(3)]).train()
    trainer = make()
    trainer.train(resume_from_checkpoint=interrupt)
    assert [record["round"] for record in trainer.state.log_history] == [1, 2, 3, 4]
    assert trainer.state.best_metric == 0.5


def test_a_run_without_evaluation_data_can_be_resumed(tmp_path):
    data = datasets.Dataset.from_dict(classification_dataset(40).to_dict())
    interrupted(tmp_path, 1, eval_strategy="no", train_dataset=data, num_rounds=2)
    trainer = resumable_trainer(tmp_path, eval_strategy="no", train_dataset=data, num_rounds=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [record["round"] for record in trainer.state.log_history] == [1, 2]
