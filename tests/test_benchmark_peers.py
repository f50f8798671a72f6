"""What benchmarks/peers.py compares is the same work, and its tables are those of what was measured."""

import json
import subprocess
import sys

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from peft_ravan.trainers import read_history

from .benchmark import BENCHMARKS, load_script


peers = load_script(BENCHMARKS / "peers.py")
JOBS = BENCHMARKS / "peer_jobs"


@pytest.fixture
def common(tmp_path, monkeypatch):
    """What the jobs share, with two steps of a client."""
    common = load_script(JOBS / "common.py")
    monkeypatch.setattr(common, "STEPS", 2)
    monkeypatch.setitem(sys.modules, "common", common)
    common.save_base_model("small", tmp_path / "base")
    (tmp_path / "base" / "draws.json").write_text(json.dumps(peers.draws(2)))
    monkeypatch.setenv(common.FOLDER, str(tmp_path / "base"))
    return common


def test_the_job_of_a_federated_trainer(common, tmp_path, monkeypatch):
    monkeypatch.setenv(common.CHECK, "1")
    trainer = load_script(JOBS / "federated_trainer.py").make_trainer(str(tmp_path / "out"), 2)
    trainer.train()
    trainer.save_model()
    history = read_history(tmp_path / "out")
    drawn = [[int(name.removeprefix("client_")) for name in record["clients"]] for record in history]
    assert drawn == common.drawn_clients()  # others train the same clients

    # the loss of the others is computed from the merged adapter, as here
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    common.note_round(str(tmp_path / "other"), 2, lambda: adapter)
    [line] = (tmp_path / "other" / "rounds.jsonl").read_text().splitlines()
    assert json.loads(line)["eval_loss"] == pytest.approx(history[-1]["eval_loss"])


def test_the_numbers_of_the_jobs_are_those_of_the_tables(common):
    assert (common.CLIENTS, common.CLIENTS_PER_ROUND, common.SEED) == (
        peers.CLIENTS,
        peers.CLIENTS_PER_ROUND,
        peers.SEED,
    )
    assert list(common.SIZES) == list(peers.ROUNDS)
    assert all(path.is_file() for way in peers.WAYS for path in way.files)
    assert {way.environment for way in peers.WAYS} == set(peers.ENVIRONMENTS)


def test_each_client_has_examples_for_all_steps(common):
    sizes = [len(common.load_examples(client)["labels"]) for client in range(common.CLIENTS)]
    assert min(sizes) >= common.STEPS * common.BATCH_SIZE and len(set(sizes)) > 1
    one, other = common.load_examples(0), common.load_examples(5)
    assert not np.array_equal(one["input_ids"], other["input_ids"])
    assert np.array_equal(one["input_ids"], common.load_examples(0)["input_ids"])
    assert np.array_equal(one["input_ids"] > 0, one["attention_mask"] == 1)


def test_lines_for_the_benchmark_are_no_lines_of_a_user(tmp_path):
    path = tmp_path / "job.py"
    path.write_text("import x\nimport y  # measures\n\n\nx(\n    1,\n    2,  # measures\n)\n")
    assert peers.lines_of_code(path) == 6
    assert peers.lines_of_code(path, without=peers.MEASURES) == 4


def test_memory_and_time_are_those_of_all_processes(tmp_path):
    child = "import time; held = b'x' * 50_000_000; sum(range(2_000_000)); print('held', flush=True); time.sleep(60)"
    program = (
        "import subprocess, sys\n"
        f"process = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "process.stdout.readline(); print('ready', flush=True); process.wait()\n"
    )
    started = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert started.stdout.readline() == b"ready\n"
    children = psutil.Process(started.pid).children()
    tree = peers.ProcessTree()
    tree.watch(started.pid, 0)
    tree.watch(started.pid, 2)
    assert tree.peak_bytes > 50_000_000
    own = sum(psutil.Process(started.pid).cpu_times()[:2])
    assert tree.processor_ends[0] > own and len(tree.processor_ends) == 2
    tree.stop()
    started.wait()
    started.stdout.close()
    assert not any(process.is_running() for process in children)


def test_constraints_that_a_framework_contradicts_are_left_out():
    environments = load_script(BENCHMARKS / "peer_environments.py")
    lines = environments.without('a==1\nb-c==2; python_version >= "3.11"\na-b==3\n', ("b-c", "a"))
    assert lines == "a-b==3\n"
    known = (environments.ROOT / "constraints.txt").read_text()
    for environment in environments.ENVIRONMENTS.values():
        assert known.count("\n") - environments.without(known, environment.free).count("\n") == len(environment.free)


def test_the_tables_are_those_of_the_records():
    def record(way, purpose="time", repeat=0, **measured):
        return {"model": "small", "way": way, "purpose": purpose, "rounds": 3, "repeat": repeat, "measured": measured}

    def timed(way, first, a_round, repeat=0):
        ends = [first, first + a_round, first + 2 * a_round]
        halves = [end / 2 for end in ends]
        measured = {"load": 1.5, "round_ends": ends, "processor_ends": halves, "peak_bytes": 3 * 10**8}
        return record(way, repeat=repeat, **measured)

    own, own_2, flower = "FederatedTrainer", "FederatedTrainer, 2 processes", "Flower, 2 actors"
    records = [timed(own, 8.0, 1.0), timed(own, 10.0, 3.0, 1), timed(own_2, 12.0, 1.0), timed(flower, 27.0, 5.0)]
    records.append(record(own, "check", losses=[1.5, 1.25]))
    versions = {"versions": {"python": "3.11", "x": "1.0"}}
    made = dict.fromkeys(peers.ENVIRONMENTS, versions) | {"nvflare": {"error": "No matching distribution"}}
    lines = list(peers.tables(records, made))
    [row] = [line for line in lines if line.startswith(f"| {own} | 9.00")]
    assert row.split(" | ")[1:7] == ["9.00", "2.00", "3.33", "4.50", "1.00", "300"]
    assert "| NVFlare, 2 threads | not installed: No matching distribution |" in "\n".join(lines)
    assert "| small | flwr | 3.0 × | 5.0 × | 3.0 × | 5.0 × |" in lines
    assert f"| small | {own} | 1.500 | 1.250 | – |" in lines


def test_the_page_has_the_tables_of_what_was_measured():
    text = peers.PAGE.read_text()
    assert peers.SECTION.search(text) and peers.with_tables(text) == text
