"""What benchmarks/flower.py compares is the same work, and what it prints is what was measured."""

import json
import subprocess
import sys

import pytest


pytest.importorskip("flwr")

import torch
from safetensors.torch import load_file

from peft_ravan.trainers import FederatedTrainer, read_history

from ...benchmark import BENCHMARKS, load_script
from ..helpers import assert_same
from .grid import InProcessGrid


benchmark = load_script(BENCHMARKS / "flower.py")
JOBS = BENCHMARKS / "flower_jobs"
CLIENTS = 3


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """The jobs with few clients, all of which train in each round, and few steps."""
    texts = load_script(JOBS / "texts.py")
    for name, value in {"CLIENTS": CLIENTS, "CLIENTS_PER_ROUND": CLIENTS, "STEPS": 2, "BATCH_SIZE": 4}.items():
        monkeypatch.setattr(texts, name, value)
    monkeypatch.setitem(sys.modules, "texts", texts)
    texts.save_base_model("small", tmp_path / "base")
    monkeypatch.setenv(texts.BASE_MODEL, str(tmp_path / "base"))
    return texts


def run_app(job, folder, num_rounds=2):
    nodes = {10 + index: {"partition-id": index, "num-partitions": CLIENTS} for index in range(CLIENTS)}
    grid = InProcessGrid(job.client, nodes, {"output-dir": str(folder), "num-rounds": num_rounds, "node-timeout": 0.0})
    job.server(grid, grid.server_context())
    return load_file(folder / "adapter_model.safetensors")


def test_the_jobs_do_the_same_work(tmp_path, jobs, monkeypatch):
    by_hand = load_script(JOBS / "by_hand" / "by_hand.py")
    losses = []

    class Noted(by_hand.FedAvg):
        def start(self, *args, **kwargs):
            result = super().start(*args, **kwargs)
            losses.extend(metrics["train-loss"] for metrics in result.train_metrics_clientapp.values())
            return result

    monkeypatch.setattr(by_hand, "FedAvg", Noted)
    of_hand = run_app(by_hand, tmp_path / "by hand")
    of_apps = run_app(load_script(JOBS / "apps" / "apps.py"), tmp_path / "apps")

    script = load_script(JOBS / "federated_trainer.py")
    args = script.arguments(str(tmp_path / "trainer"), 2)
    clients = {f"client_{index}": jobs.load_part(index) for index in range(CLIENTS)}
    script.set_seed(jobs.SEED)
    trainer = FederatedTrainer(jobs.load_model(), args, train_dataset=clients)
    trainer.train()
    trainer.save_model()
    assert_same(of_apps, load_file(tmp_path / "trainer" / "adapter_model.safetensors"))

    # by hand, batches come in another order
    assert {name: tensor.shape for name, tensor in of_hand.items()} == {
        name: tensor.shape for name, tensor in of_apps.items()
    }
    expected = [record["train_loss"] for record in read_history(tmp_path / "trainer")]
    assert losses == pytest.approx(expected, rel=0.1) and len(losses) == 2
    rounds = [json.loads(line)["round"] for line in (tmp_path / "by hand" / "rounds.jsonl").read_text().splitlines()]
    assert rounds == [0, 1, 2]


def test_an_upload_has_the_size_that_it_is_named_after(monkeypatch):
    monkeypatch.setenv("PAYLOAD_RANK", "1")
    model = load_script(JOBS / "payload" / "payload.py").load_model()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for size, rank in benchmark.RANKS.items():
        megabytes = rank * 4 * sum(parameter.numel() for parameter in trained) / 1e6
        assert megabytes == pytest.approx(float(size.removesuffix(" MB")), rel=0.02)
    # the same bytes would be sent once
    assert all(parameter.unique().numel() > 0.99 * parameter.numel() for parameter in trained)
    assert not any(torch.equal(one, other) for one, other in zip(trained, trained[2:], strict=False))


def test_rounds_are_timed_from_the_command_on(tmp_path):
    program = (
        "import time\n"
        "for line in range(3):\n"
        "    open('rounds.jsonl', 'a').write('{\"round\": %d}\\n' % line); time.sleep(0.05)\n"
    )

    def start():
        return subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path)

    one, two = benchmark.round_ends(start, tmp_path)  # the first line is that of round 0
    assert 0.05 < one < two


def test_only_statements_are_counted(tmp_path):
    path = tmp_path / "job.py"
    path.write_text(
        '"""Says.\n\nMore."""\n\nimport x  # why\n\n\n# what\ndef f(\n    a,\n):\n    """Doc."""\n\n    return a\n'
    )
    assert benchmark.lines_of_code(path) == 5


def test_what_was_measured_stays_when_it_goes_on(tmp_path, monkeypatch, capsys):
    ran = []

    def run(cell, folder):
        (benchmark.new_folder(folder) / "file").touch()
        ran.append(cell)
        return {"load": 0.1, "round_ends": [1.0, 2.0]}

    monkeypatch.setattr(benchmark, "PARTS", {"simulation": (run, benchmark.simulation_tables)})
    for repeats in ("1", "2"):
        monkeypatch.setattr(sys, "argv", ["flower.py", "simulation", "--output", str(tmp_path), "--repeats", repeats])
        benchmark.main()
        assert len(ran) == int(repeats) * len(benchmark.WAYS) * len(benchmark.ROUNDS)
    monkeypatch.setattr(sys, "argv", ["flower.py", "--output", str(tmp_path), "--report"])
    capsys.readouterr()
    benchmark.main()
    assert len(set(ran)) == len(ran) == len((tmp_path / "simulation.jsonl").read_text().splitlines())
    assert "| MiniLM | 1.00 x as fast | 1.00 x as fast |" in capsys.readouterr().out


def test_the_tables_are_those_of_the_records():
    def loopback(how, seconds, **traffic):
        measured = {"load": 0.5, "upload_bytes": [10**6] * 2, "download_bytes": [2 * 10**6] * 2, **traffic}
        return {
            "size": "10 MB",
            "how": how,
            "rounds": 2,
            "repeat": 0,
            "measured": {**measured, "round_seconds": [seconds, seconds]},
        }

    over = loopback("over Flower", 9.0, traffic={"up": 2_040_000, "down": 4_040_000})
    lines = list(benchmark.loopback_tables([loopback("one process", 0.25), over]))
    assert lines[2] == "| 10 MB | 2.000 MB | 2.040 MB | 1.020 | 4.000 MB | 4.040 MB | 1.010 |"
    assert lines[-1] == "| 10 MB | 0.25 | 9.00 | 1 | 0.5 to 0.5 |"

    ways = {way.name: way for way in benchmark.WAYS}
    records = [
        {
            "model": "small",
            "way": way,
            "measured": {"load": 1.0, "round_ends": [30.0, 30.0 + a_round, 30.0 + 2 * a_round]},
        }
        for way, a_round in zip(ways, (2.0, 1.0, 4.0, 3.0, 6.0, 5.0), strict=True)
    ]
    lines = list(benchmark.simulation_tables(records))
    assert lines[2].startswith("| small | FederatedTrainer, 1 x 2 | 2.00 | 30 | ")
    assert lines[-1] == "| small | 3.00 x as fast | 5.00 x as fast |"
