"""Rounds on several processes give the same results as on one. The processes are real and connected by gloo."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.multiprocessing.spawn import ProcessException

from peft_ravan.trainers.exchange import ClientReply, ClientTask
from peft_ravan.trainers.processes import one_process
from peft_ravan.trainers.runners import Runner, make_runner

from ..forked import join, start_together
from .helpers import assert_same


pytest.importorskip("trl")
from .many_processes import run_one, run_several  # noqa: E402


SHARED_OUT = (
    "uneven", "scaffold", "personal", "failing", "repeated", "full", "single", "budgets", "rank_budgets", "round_zero",
    "stopping", "resumed", "killed", "private", "sft",
)  # fmt: skip


def run_all(one: Path, two: Path) -> None:
    """Run on one process and on two, with one run in which a process is killed."""
    killed = start_together(run_several, two, "kill-killed")
    for run in (*SHARED_OUT, "doubled", "doubled_ranks"):
        run_one(run, one)
    with pytest.raises(ProcessException):  # of the killed process, or of the one that loses it
        join(killed)
    left = {path.name for path in (two / "killed").iterdir() if not path.name.startswith(".")}
    assert left == {"rounds.jsonl", "federation_run.json", *(f"checkpoint-{number}" for number in range(3))}
    join(start_together(run_several, two, *SHARED_OUT, "data", "data_ranks", "data_budgets"))


def check_clients_shared_out_are_clients_in_turn(one: Path, two: Path, run: str) -> None:
    first, second = (load_file(folder / f"{run}.safetensors") for folder in (one, two))
    assert_same(first, second, atol=1e-6, rtol=1e-6)
    assert any(tensor.any() for tensor in first.values())
    history, heard, best = json.loads((one / f"{run}.json").read_text())
    again, heard_again, best_again = json.loads((two / f"{run}.json").read_text())
    assert (again, best_again) == (history, best)
    assert heard_again == (heard[-5:] if run == "killed" else heard)
    failed = [record["failed_clients"] for record in history]
    assert any(failed) == (run in ("failing", "repeated"))
    if run == "failing":
        assert [len(of_round) for of_round in failed] == [2, 2]
    if run in ("personal", "sft"):
        assert all("eval_clients_worst_decile_loss" in record for record in history)
    if run == "stopping":
        assert len(history) < 5  # all processes stop
    kept, kept_again = (
        {path.relative_to(folder) for path in (folder / run).rglob("client_states/*/*")} for folder in (one, two)
    )
    assert kept == kept_again and all(path.suffix == ".safetensors" for path in kept)
    assert bool(kept) == (run in ("scaffold", "personal", "repeated", "full", "resumed"))
    if run in ("resumed", "killed"):
        assert [record["round"] for record in history] == [1, 2, 3] and len(heard_again) == 5


def check_processes_that_share_data_are_one_with_larger_batches(one: Path, two: Path) -> None:
    for shared, in_one in (("data", "doubled"), ("data_ranks", "doubled_ranks")):
        expected, found = load_file(one / f"{in_one}.safetensors"), load_file(two / f"{shared}.safetensors")
        assert_same(found, expected, atol=1e-5, rtol=1e-4)
        assert any(tensor.any() for tensor in found.values())


def check_processes_that_share_data_choose_the_same_heads(two: Path) -> None:
    history, heard, _ = json.loads((two / "data_budgets.json").read_text())
    assert len(heard) == 10 and not any(record["failed_clients"] for record in history)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert sorted(path.name for path in (two / "data_budgets").glob("checkpoint-*"))[-1] == "checkpoint-2"


def check_no_process_leaves_its_group_behind(two: Path) -> None:
    # else one of them would be aborted at its exit now and then
    assert {path.name for path in two.glob("left-*")} == {"left-0", "left-1"}


def test_two_processes_give_the_same_results_as_one(tmp_path):
    # one test, since launching processes takes longer than the runs, and several tests may go to several workers
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    run_all(one, two)
    for run in SHARED_OUT:
        print(run)  # pytest shows it beside a failure
        check_clients_shared_out_are_clients_in_turn(one, two, run)
    check_processes_that_share_data_are_one_with_larger_batches(one, two)
    check_processes_that_share_data_choose_the_same_heads(two)
    check_no_process_leaves_its_group_behind(two)


def test_one_process_within_several():
    """Accelerate temporarily sees a single process, and all processes afterwards, even after an error."""
    Accelerator(cpu=True)
    states = (PartialState._shared_state, AcceleratorState._shared_state)
    before = [dict(state) for state in states]
    try:
        for state in states:
            state.update(num_processes=4, process_index=3)
        with pytest.raises(RuntimeError), one_process():
            assert PartialState().num_processes == AcceleratorState().num_processes == 1
            assert PartialState().is_main_process and PartialState().process_index == 0
            raise RuntimeError
        assert PartialState().num_processes == AcceleratorState().num_processes == 4
        assert PartialState().process_index == 3
    finally:
        for state, own in zip(states, before, strict=True):
            state.update(own)


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    PartialState(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="started 2 processes, .* `use_cpu=True`"):
        make_runner("clients")


def tasks(*clients: str) -> list[ClientTask]:
    return [ClientTask(1, client, {}, seed=0) for client in clients]


def test_replies_come_in_the_order_of_the_tasks_and_none_is_ahead():
    began = []

    def work(task):
        began.append(task.client)
        return ClientReply.to(task, train_loss=1.0)

    replies = Runner().run(tasks("c", "b", "a"), work)
    assert next(replies).client == "c" and began == ["c"]
    assert [reply.client for reply in replies] == ["b", "a"]


def test_several_clients_may_be_done_at_once():
    waiting = []

    def work(task):
        waiting.append(task)
        return [ClientReply.to(waiting.pop(0)) for _ in range(2)] if len(waiting) == 2 else []

    assert [reply.client for reply in Runner().run(tasks("a", "b", "c", "d"), work)] == ["a", "b", "c", "d"]
