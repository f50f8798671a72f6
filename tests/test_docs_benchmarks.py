"""The tables of docs/benchmarks.md are those of the finished runs that lie beside the benchmarks."""

import re
import shlex
import sys

import pytest

from .benchmark import BENCHMARKS
from .markdown import code_blocks, dead_links


sys.path.insert(0, str(BENCHMARKS))  # where a script finds the others

import accuracy_page  # noqa: E402
from cells import finished_cells  # noqa: E402
from experiment import middle_rates, read_experiment  # noqa: E402


TEXT = accuracy_page.PAGE.read_text()


def test_the_tables_are_those_of_the_finished_runs():
    assert accuracy_page.with_tables(TEXT) == TEXT


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
                for purpose in ("trial", "run")
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
