"""Tables and plots of the finished runs of an experiment on accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from accuracy_measures import Record, chosen_rates, records_of
from accuracy_plots import plot_of_clients, plot_of_methods, plot_of_variants
from accuracy_tables import table_of_clients, table_of_methods, table_of_rates, table_of_variants
from experiment import Experiment, middle_rates
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Report:
    """
    What is said of the finished runs of an experiment.

    Args:
        experiment ([`Experiment`]): The experiment.
        records (`list[dict]`): The finished runs.
        purpose (`str`, *optional*, defaults to `"run"`): `"run"`, or `"quick"`.
        tuning (`list[dict]`, *optional*): The runs by which learning rates were chosen, if they are others.
    """

    experiment: Experiment
    records: Sequence[Record]
    purpose: str = "run"
    tuning: Sequence[Record] = ()

    def runs(self) -> dict[str, dict[str, list[Record]]]:
        """
        Returns:
            `dict[str, dict[str, list[dict]]]`: The runs of each variant and method, without those that have none.
        """
        found = {
            variant: {name: runs for name in self.experiment.rows if (runs := self._runs(variant, name))}
            for variant in self.experiment.variants
        }
        return {variant: runs for variant, runs in found.items() if runs}

    def tables(self) -> str:
        """
        Returns:
            `str`: A table for each variant, or one for all, in markdown.
        """
        lines = []
        for variant, runs in self._groups.items():
            lines += [f"**{variant}**", ""] if variant else []
            lines += [*self._layout.table(self.experiment, runs), ""]
        return "\n".join(lines).strip()

    def rates(self) -> str:
        """
        Returns:
            `str`: A table of the trials by which learning rates were chosen, in markdown. Empty for runs of `--quick`.
        """
        if self.purpose != "run":
            return ""
        trials = self.experiment.trials
        intro = (
            f"Accuracy of the last state on {trials.validation_share:.0%} of the training data that the trials do not train "
            f"on, after {trials.num_rounds} rounds with seed {trials.seed}, as the mean over the last evaluations."
        )
        table = table_of_rates(self.experiment, self.tuning or self.records)
        return "\n".join(["**Learning rates**", "", intro, "", *table])

    @property
    def plot_names(self) -> list[str]:
        """The names of the plots."""
        return [variant.replace(" ", "_") for variant in self._groups]

    @property
    def plotted(self) -> str:
        """What the plots show."""
        return self._layout.plotted

    def plots(self) -> dict[str, Figure]:
        """
        Returns:
            `dict[str, Figure]`: A plot for each variant, by the name that it suggests for its file, or one without a name.
        """
        plots = (self._layout.plot(self.experiment, runs, variant) for variant, runs in self._groups.items())
        return dict(zip(self.plot_names, plots, strict=True))

    def write(self, output: Path) -> str:
        """
        Write the tables and plots.

        Args:
            output (`Path`): The path of the tables, a markdown file, without a suffix. The names of plots begin with it.

        Returns:
            `str`: What was written, in markdown.
        """
        text = "\n\n".join(part for part in (f"# {self.experiment.title}", self.tables(), self.rates()) if part)
        output.with_name(f"{output.name}-{self.purpose}.md").write_text(text + "\n")
        for variant, figure in self.plots().items():
            parts = (output.name, variant, self.purpose)
            figure.savefig(output.parent / f"{'-'.join(part for part in parts if part)}.png", dpi=150)
        return text

    @property
    def _layout(self) -> Layout:
        if self.experiment.compared_variants:
            return OF_VARIANTS
        return OF_CLIENTS if self.experiment.federation.get("own_test_data", False) else BY_ROUNDS

    @cached_property
    def _groups(self) -> dict[str, Mapping]:
        """What shares a table and a plot: the runs of a variant by method, or those of all variants that are compared."""
        runs = self.runs()
        return {"": runs} if runs and self.experiment.compared_variants else runs

    def _runs(self, variant: str, method: str) -> list[Record]:
        rates = middle_rates(self.experiment, method)
        if self.purpose == "run":
            tuned = self.experiment.methods[method].rates_of or method
            rates = chosen_rates(self.experiment, self.tuning or self.records, tuned)
        seeds = sorted({record["seed"] for record in self.records})
        cells = (self.experiment.cell(variant, method, self.purpose, seed, rates) for seed in seeds)
        return records_of(cells, self.records)


@dataclass(frozen=True)
class Layout:
    """
    How a group of runs is shown.

    Args:
        plotted (`str`): What its plot shows.
        table (`Callable`): The lines of its table, from the experiment and the runs.
        plot (`Callable`): Its plot, from the experiment, the runs and the name of the variant.
    """

    plotted: str
    table: Callable[[Experiment, Mapping], list[str]]
    plot: Callable[[Experiment, Mapping, str], Figure]


BY_ROUNDS = Layout("Accuracy against rounds and megabytes", table_of_methods, plot_of_methods)
OF_CLIENTS = Layout("Accuracy of each client", table_of_clients, plot_of_clients)
OF_VARIANTS = Layout("Accuracy by variant", table_of_variants, plot_of_variants)
