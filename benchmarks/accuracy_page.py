"""
The tables and plots of docs/benchmarks.md, from the finished runs in benchmarks/results.

Runs of the experiments that extend one another lie in one file, under the name of the first: results/clinc150.jsonl. Copy
`cells.jsonl` there, and write the tables:

    python benchmarks/accuracy_page.py
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from accuracy_report import Report
from cells import finished_cells
from experiment import read_experiment


FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "benchmarks.md"
SECTION = re.compile(r"<!-- accuracy (\S+(?: quick)?) -->\n.*?<!-- /accuracy -->", flags=re.DOTALL)


def report_of(name: str) -> Report:
    """
    Args:
        name (`str`): The name of an experiment in `experiments`, and `" quick"` for the runs of `--quick`.

    Returns:
        [`Report`]: What is said of its finished runs in `results`.
    """
    name, _, quick = name.partition(" ")
    path = FOLDER / "experiments" / f"{name}.yaml"
    first = path
    while base := yaml.safe_load(first.read_text()).get("base"):
        first = first.parent / base
    return Report(read_experiment(path), finished_cells(FOLDER / "results" / f"{first.stem}.jsonl"), quick or "run")


def with_tables(page: str) -> str:
    """
    Args:
        page (`str`): The text of the page.

    Returns:
        `str`: The same text with the tables of the finished runs, and with those of the learning rates that have not been
        on the page yet.
    """
    shown = set()

    def section(found: re.Match) -> str:
        name = found.group(1)
        report = report_of(name)
        rates = report.rates()
        tables = [report.tables()] if shown.issuperset(rates.splitlines()) else [report.tables(), rates]
        shown.update(rates.splitlines())
        plots = [f"![{report.plotted}](images/{plot_name(name, variant)})" for variant in report.plot_names]
        return "\n\n".join([f"<!-- accuracy {name} -->", *tables, *plots, "<!-- /accuracy -->"])

    return SECTION.sub(section, page)


def plot_name(experiment: str, variant: str) -> str:
    """The file of a plot."""
    return f"accuracy-{'-'.join([*experiment.split(), *variant.split()])}.png"


def main() -> None:
    page = PAGE.read_text()
    for name in SECTION.findall(page):
        for variant, figure in report_of(name).plots().items():
            figure.savefig(PAGE.parent / "images" / plot_name(name, variant), dpi=110)
    PAGE.write_text(with_tables(page))


if __name__ == "__main__":
    main()
