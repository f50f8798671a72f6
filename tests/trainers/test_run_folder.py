"""Runs in one folder: one at a time, each with its own checkpoints."""

import json
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from peft_ravan.trainers import CheckpointError, FederatedCallback, FolderInUseError
from peft_ravan.trainers.run_folder import (
    RUN_FILE,
    RunIdentity,
    checkpoint_round,
    checkpoints_to_resume,
    lock_folder,
    rotate_own_checkpoints,
)

from .helpers import StopAfter, adapter_state, assert_same, interrupted, logged, resumable_trainer


SHORT = {"max_steps": 1, "num_rounds": 4}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    trainer = resumable_trainer(tmp_path_factory.mktemp("finished"), **SHORT)
    trainer.train()
    return trainer


@pytest.fixture
def old_run(tmp_path, finished):
    """The folder of a test, with the finished run in it."""
    shutil.copytree(finished.args.output_dir, tmp_path, dirs_exist_ok=True)
    return tmp_path


def rounds(trainer) -> list[int]:
    return [record["round"] for record in trainer.state.log_history]


NEW = {**SHORT, "learning_rate": 0.5}


@pytest.fixture(scope="module")
def new_run(tmp_path_factory):
    """The end of a run with another learning rate, in a folder of its own."""
    trainer = resumable_trainer(tmp_path_factory.mktemp("new"), **NEW, save_strategy="no")
    trainer.train()
    return adapter_state(trainer)


@pytest.mark.parametrize("save_strategy", ["epoch", "best"])  # the latter writes no initial checkpoint
def test_a_new_run_in_the_folder_of_an_old_one_is_the_one_that_goes_on(
    tmp_path, old_run, new_run, monkeypatch, save_strategy
):
    warnings = logged(monkeypatch)
    trainer = resumable_trainer(
        tmp_path, **NEW, save_strategy=save_strategy, metric_for_best_model="accuracy", callbacks=[StopAfter(2)]
    )
    trainer.compute_metrics = lambda prediction: {"accuracy": trainer.state.global_step}
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "has 5 checkpoints of another run, such as checkpoint-4. This run replaces those of the same" in warnings[0]
    resumed = resumable_trainer(tmp_path, **NEW)
    trained = []

    class Rounds(FederatedCallback):
        def on_round_begin(self, args, state, control, **kwargs):
            trained.append(state.global_step + 1)

    resumed.add_callback(Rounds())
    resumed.train(resume_from_checkpoint=True)
    assert trained == [3, 4] and rounds(resumed) == [1, 2, 3, 4]
    assert_same(adapter_state(resumed), new_run)


def test_a_new_run_that_has_no_checkpoint_yet_does_not_end_as_the_old_one(tmp_path, old_run):
    resumable_trainer(tmp_path, **{**SHORT, "num_rounds": 1}, save_strategy="no").train()
    again = resumable_trainer(tmp_path, **SHORT)
    with pytest.raises(
        ValueError, match="begun last in .* has no complete checkpoint .*another run, such as checkpoint-4"
    ):
        again.train(resume_from_checkpoint=True)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))  # it was requested
    assert rounds(again) == [1, 2, 3, 4]


def test_a_run_that_went_back_goes_on_from_there(tmp_path, old_run):
    back = resumable_trainer(tmp_path, **SHORT, learning_rate=0.5, callbacks=[StopAfter(2)])
    with pytest.raises(KeyboardInterrupt):
        back.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    resumed = resumable_trainer(tmp_path, **SHORT, learning_rate=0.5)
    resumed.train(resume_from_checkpoint=True)
    assert [record["learning_rate"] for record in resumed.state.log_history] == [0.01, 0.375, 0.25, 0.125]


def test_checkpoints_that_were_moved_are_found(tmp_path, finished):
    shutil.copytree(Path(finished.args.output_dir) / "checkpoint-3", tmp_path / "second" / "checkpoint-3")
    second = resumable_trainer(tmp_path / "second", **SHORT)
    second.train(resume_from_checkpoint=True)
    assert_same(adapter_state(finished), adapter_state(second))
    # and now it is the run of this folder
    again = resumable_trainer(tmp_path / "second", **SHORT)
    again.train(resume_from_checkpoint=True)
    assert rounds(again) == [1, 2, 3, 4]


def test_the_best_model_is_not_that_of_another_run(tmp_path, old_run):
    # the best round is the second, after which this run saves nothing
    trainer = resumable_trainer(
        tmp_path, **SHORT, metric_for_best_model="accuracy", save_strategy="steps", save_steps=3
    )
    trainer.compute_metrics = lambda prediction: {"accuracy": [0.1, 0.9, 0.3, 0.2][trainer.state.global_step - 1]}
    trainer.train()
    assert (tmp_path / "checkpoint-2").exists()  # of the old run
    assert trainer.state.best_model_checkpoint is None


def test_rotation_leaves_other_runs_alone(tmp_path, old_run):
    trainer = resumable_trainer(tmp_path, **{**SHORT, "num_rounds": 3}, save_total_limit=2)
    trainer.train()
    owners = {folder.name: RunIdentity.read(folder).name for folder in tmp_path.glob("checkpoint-*")}
    own = RunIdentity.read(tmp_path).name
    assert {name for name, owner in owners.items() if owner == own} == {"checkpoint-2", "checkpoint-3"}
    # the checkpoints that it replaced are gone, as reported
    assert {name for name, owner in owners.items() if owner != own} == {"checkpoint-4"}


def make_checkpoint(folder, number, run):
    path = folder / f"checkpoint-{number}"
    path.mkdir(parents=True)
    if run is not None:
        run.write(path)


@pytest.mark.parametrize(
    "limit, best, left",
    [
        (None, None, [0, 1, 2, 3, 4, 5]),
        (0, None, [0, 1, 2, 3, 4, 5]),
        (1, None, [5]),
        (2, None, [4, 5]),
        (1, 2, [2, 5]),  # as Trainer does: the newest to resume from, and the best
        (3, 2, [2, 4, 5]),
        (2, 5, [4, 5]),
        (9, 1, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, limit, best, left):
    run = RunIdentity()
    for number in range(6):
        make_checkpoint(tmp_path, number, run)
    make_checkpoint(tmp_path, 10, RunIdentity())
    make_checkpoint(tmp_path, 11, None)
    best = None if best is None else str(tmp_path / f"checkpoint-{best}")
    rotate_own_checkpoints(run, tmp_path, limit, best)
    assert sorted(map(checkpoint_round, tmp_path.glob("checkpoint-*"))) == [*left, 10, 11]


def test_a_run_that_goes_on_has_what_was_before_it(tmp_path):
    first = RunIdentity()
    second = first.going_on(3)
    third = second.going_on(4)
    back = third.going_on(2)
    assert len({run.name for run in (first, second, third, back)}) == 4
    assert third.before == {first.name: 3, second.name: 4}
    assert back.before == {first.name: 2, second.name: 2, third.name: 2}
    for number, run in enumerate((first, first, first, first, second, third)):
        make_checkpoint(tmp_path, number, run)
    back.write(tmp_path)
    assert [folder.name for folder in checkpoints_to_resume(tmp_path)] == [
        "checkpoint-2",
        "checkpoint-1",
        "checkpoint-0",
    ]
    third.write(tmp_path)
    assert len(checkpoints_to_resume(tmp_path)) == 6
    (tmp_path / "checkpoint-5" / RUN_FILE).write_text('{"na')
    assert len(checkpoints_to_resume(tmp_path)) == 6  # it may be this run's, and the damage is then reported
    (tmp_path / RUN_FILE).unlink()
    assert len(checkpoints_to_resume(tmp_path)) == 6


def test_a_checkpoint_says_which_run_it_is_of(tmp_path):
    resumable_trainer(tmp_path, **{**SHORT, "num_rounds": 1}).train()
    path = tmp_path / "checkpoint-1" / RUN_FILE
    path.write_text(json.dumps({"name": "another", "before": {}}))
    with pytest.raises(CheckpointError, match=f"{RUN_FILE} is not what was written"):
        resumable_trainer(tmp_path, **SHORT).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# ---- One at a time ---------------------------------------------------------------


def test_two_runs_cannot_be_in_one_folder_at_the_same_time(tmp_path):
    refused = []

    class Another(FederatedCallback):
        def on_round_begin(self, args, state, control, **kwargs):
            another = resumable_trainer(tmp_path, **SHORT)
            for resume in (None, True):
                with pytest.raises(FolderInUseError, match="Another run is writing into .*an `output_dir` of its own"):
                    another.train(resume_from_checkpoint=resume)
                refused.append(resume)

    trainer = resumable_trainer(tmp_path, **{**SHORT, "num_rounds": 2}, callbacks=[Another()])
    trainer.train()
    assert refused == [None, True, None, True] and rounds(trainer) == [1, 2]
    assert not list(tmp_path.glob(".*"))
    short = {**SHORT, "num_rounds": 2}
    interrupted(tmp_path, 1, **short)  # the folder is unlocked even after an error
    resumable_trainer(tmp_path, **short).train(resume_from_checkpoint=True)


def hold(folder, held):
    with lock_folder(folder):
        held.set()
        time.sleep(600)


def test_a_process_that_is_killed_leaves_its_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold, args=(tmp_path, held), daemon=True)
    process.start()
    assert held.wait(60)
    with pytest.raises(FolderInUseError):
        lock_folder(tmp_path)
    process.kill()
    process.join()
    assert list(tmp_path.glob(".*"))  # the file is left, which does not matter
    with lock_folder(tmp_path), pytest.raises(FolderInUseError):
        lock_folder(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_where_nothing_can_be_locked_a_warning_says_so(tmp_path, monkeypatch):
    def acquire(self, **kwargs):
        raise NotImplementedError("FileSystem does not appear to support flock")

    warnings = logged(monkeypatch, "run_folder")
    monkeypatch.setattr(FileLock, "acquire", acquire)
    lock_folder(tmp_path).close()
    assert "cannot be locked (FileSystem does not appear to support flock)" in warnings[0]
    assert issubclass(Timeout, TimeoutError)  # a subclass of OSError, so it must be caught first
