"""The tables of docs/benchmarks.md are those of the finished runs that lie beside the benchmarks."""

import re
import shlex
import sys

import pytest
import torch

from .benchmark import BENCHMARKS
from .markdown import code_blocks, dead_links


sys.path.insert(0, str(BENCHMARKS))  # where a script finds the others

import accuracy_page  # noqa: E402
import client_batching  # noqa: E402
import tuner_step  # noqa: E402
from cells import finished_cells, run_cells  # noqa: E402
from experiment import middle_rates, read_experiment  # noqa: E402


TEXT = accuracy_page.PAGE.read_text()


def test_the_tables_are_those_of_the_finished_runs():
    assert accuracy_page.with_tables(TEXT) == TEXT
    assert client_batching.with_table(TEXT) == TEXT and client_batching.SECTION.search(TEXT)


def test_the_table_of_steps_is_that_of_the_finished_cells():
    assert tuner_step.with_table(TEXT) == TEXT and tuner_step.table(finished_cells(tuner_step.RESULTS)) in TEXT


def test_the_limit_of_a_step_by_hand():
    # d = 768, 4 heads of rank 55: formed once for 512 tokens, and two thin products for the gradient of the cores
    count = tuner_step.multiplications(tuner_step.Cell(768, 512, 4))
    assert count["frozen base"] == pytest.approx(2 * 0.768 * 768)
    assert count["full fine-tuning"] == pytest.approx(1.5 * count["frozen base"])
    assert count["LoRA"] - count["frozen base"] == pytest.approx(6 * 8 * 0.768)
    assert count["Ravan, weight held"] - count["frozen base"] == pytest.approx(2 * 220 * 0.768)
    assert count["Ravan"] - count["Ravan, weight held"] == pytest.approx(220 * 0.768 * 768 / 512)
    # thin products: twice forward and twice backward
    few = tuner_step.multiplications(tuner_step.Cell(768, 128, 4))
    assert few["Ravan"] - few["frozen base"] == pytest.approx(4 * 220 * 0.768)


def test_a_cell_of_steps_is_measured_and_not_repeated(tmp_path):
    cells = [tuner_step.Cell(8, 32, 2, lora_rank=1, depth=1, bf16=bf16) for bf16 in (False, True)]
    path = tmp_path / "steps.jsonl"

    def measure(cell):
        return tuner_step.measure(cell, list(tuner_step.MODELS), repetitions=1)

    records = run_cells(cells, measure, path, measured="step", show=tuner_step.summary)
    assert run_cells(cells, None, path, measured="step") == records == finished_cells(path)
    assert tuner_step.table(records).count("\n") == 3
    for record in records:
        for name, found in record["step"].items():
            assert found["peak_mb"] >= 0 and found["against"][name] == 1


def test_peak_memory_is_that_of_tensors_at_once():
    def run():
        for _ in range(3):
            kept = torch.empty(1000, dtype=torch.float32)
            other = kept + 1
            del kept, other

    assert tuner_step.peak_bytes(run, "cpu") == pytest.approx(8000, rel=0.1)


@pytest.mark.parametrize("name", accuracy_page.SECTION.findall(TEXT))
def test_there_is_a_plot_of_each_table(name):
    section = next(found.group(0) for found in accuracy_page.SECTION.finditer(TEXT) if found.group(1) == name)
    plots = re.findall(r"\]\(images/(\S+)\)", section)
    assert plots == [accuracy_page.plot_name(name, variant) for variant in accuracy_page.report_of(name).plots()]
    assert all((accuracy_page.PAGE.parent / "images" / plot).is_file() for plot in plots)


def test_each_finished_run_is_of_an_experiment_as_it_is_now():
    known = set()
    for path in (BENCHMARKS / "experiments").glob("*.yaml"):
        if not path.stem.startswith("methods"):
            experiment = read_experiment(path)
            known |= {
                experiment.cell(variant, method, purpose, 0, middle_rates(experiment, method)).settings
                for variant in experiment.variants
                for method in experiment.methods
                for purpose in ("trial", "run", "quick")
            }
    for path in (BENCHMARKS / "results").glob("*.jsonl"):
        records = finished_cells(path)
        assert records and {record["settings"] for record in records} <= known


def test_the_command_runs_one_row_of_the_table():
    [command] = [block for block in code_blocks(TEXT, "bash") if "benchmarks/accuracy.py" in block]
    words = shlex.split(command)
    experiment = read_experiment(BENCHMARKS.parent / words[2])
    chosen = {words[i]: words[i + 1] for i in range(len(words) - 1) if words[i].startswith("--")}
    assert chosen["--methods"] in experiment.rows and chosen["--variants"] in experiment.variants
    assert int(chosen["--seeds"]) in experiment.seeds and (BENCHMARKS.parent / chosen["--rates"]).is_file()


def test_no_link_is_dead():
    assert not dead_links(accuracy_page.PAGE)
