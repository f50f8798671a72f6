"""Tables and plots of the finished runs of an experiment on accuracy."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cells import is_of
from experiment import Experiment, Rates, middle_rates, trial_cells
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peft_ravan.trainers import client_statistics


Record = Mapping[str, Any]


def last_accuracy(experiment: Experiment, record: Record) -> float:
    """The mean over the last evaluations of the last state, since a single one swings by points."""
    return 100 * statistics.fmean(record["measured"]["last"][-experiment.evaluations(record) :])


def mean_accuracy(record: Record) -> float:
    """The accuracy of the mean of rounds at the end."""
    return 100 * record["measured"]["mean"][-1]


def chosen_rates(experiment: Experiment, records: Sequence[Record], method: str) -> Rates:
    """
    Args:
        experiment ([`Experiment`]): The experiment.
        records (`list[dict]`): The finished runs.
        method (`str`): A method with learning rates of its own.

    Returns:
        [`Rates`]: The rates of its best trial so far, by the accuracy of the last state. Those in the middle if there is none.
    """
    best = _best(experiment, _records_of(trial_cells(experiment, method), records))
    if best is None:
        return middle_rates(experiment, method)
    return _best(experiment, [*_records_of(trial_cells(experiment, method, best[1]), records), best[0]])[1]


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
            `str`: A table for each variant, or one for all, and one of the learning rates, in markdown.
        """
        lines = []
        for variant, runs in self._groups().items():
            lines += [f"**{variant}**", ""] if variant else []
            lines += [*self._layout.table(self.experiment, runs), ""]
        if self.purpose == "run":
            lines += ["**Learning rates**", "", *_rates_table(self.experiment, self.tuning or self.records)]
        return "\n".join(lines).strip()

    @property
    def plotted(self) -> str:
        """What the plots show."""
        return self._layout.plotted

    def plots(self) -> dict[str, Figure]:
        """
        Returns:
            `dict[str, Figure]`: A plot for each variant, by the name that it suggests for its file, or one without a name.
        """
        return {
            variant.replace(" ", "_"): self._layout.plot(self.experiment, runs, variant)
            for variant, runs in self._groups().items()
        }

    def write(self, output: Path) -> str:
        """
        Write the tables and plots.

        Args:
            output (`Path`): The path of the tables, a markdown file, without a suffix. The names of plots begin with it.

        Returns:
            `str`: What was written, in markdown.
        """
        text = f"# {self.experiment.title}\n\n{self.tables()}"
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
        return _records_of(cells, self.records)


def _table(experiment: Experiment, runs: Mapping[str, list[Record]]) -> list[str]:
    reference = runs.get(experiment.reference)
    target = None if reference is None else statistics.fmean(last_accuracy(experiment, record) for record in reference)
    to_target = "" if target is None else f" to {target:.1f} %"
    rows = [(*_columns(experiment), f"Rounds{to_target}", f"MB{to_target}")]
    for name, found in runs.items():
        reached = [_first(record, target) for record in found] if target is not None else [None]
        rows.append((*_row(experiment, name, found, reference), *_mean_of_reached(reached)))
    return list(markdown(rows))


def _table_of_clients(experiment: Experiment, runs: Mapping[str, list[Record]]) -> list[str]:
    rows = [
        ("Method", "Seeds", "Mean of clients, %", f"against {experiment.reference}, points", "Worst decile, %", "MB")
    ]
    reference = runs.get(experiment.reference)
    for name, found in runs.items():
        compared = reference if name != experiment.reference else None
        worst = [100 * client_statistics(record["measured"]["clients"])["worst_decile"] for record in found]
        rows.append(
            (
                name,
                str(len(found)),
                _spread([_mean_of_clients(record) for record in found]),
                _lead(found, compared, _mean_of_clients),
                _spread(worst),
                f"{statistics.fmean(record['measured']['megabytes'][-1] for record in found):.2f}",
            )
        )
    return list(markdown(rows))


def _mean_of_clients(record: Record) -> float:
    return 100 * statistics.fmean(record["measured"]["clients"])


def _table_of_variants(experiment: Experiment, runs: Mapping[str, Mapping[str, list[Record]]]) -> list[str]:
    rows = [("Variant", *_columns(experiment))]
    for variant, shown in experiment.compared_variants.items():
        of_variant = runs.get(variant, {})
        reference = of_variant.get(experiment.reference)
        rows += [(shown, *_row(experiment, name, found, reference)) for name, found in of_variant.items()]
    return list(markdown(rows, names=2))


def _columns(experiment: Experiment) -> tuple[str, ...]:
    lead = f"against {experiment.reference}, points"
    accuracies = ("Last state, %", lead, "Mean of rounds, %", lead, "Worst decile, %")
    return "Method", "Seeds", *accuracies, "Cosine of updates", "MB"


def _row(
    experiment: Experiment, name: str, found: Sequence[Record], reference: Sequence[Record] | None
) -> tuple[str, ...]:
    of_last = partial(last_accuracy, experiment)
    compared = reference if name != experiment.reference else None
    return (
        name,
        str(len(found)),
        _spread([of_last(record) for record in found]),
        _lead(found, compared, of_last),
        _spread([mean_accuracy(record) for record in found]),
        _lead(found, compared, mean_accuracy),
        _spread([100 * record["measured"]["worst_decile"][-1] for record in found]),
        _cosine(found),
        f"{statistics.fmean(record['measured']['megabytes'][-1] for record in found):.2f}",
    )


def _rates_table(experiment: Experiment, records: Sequence[Record]) -> list[str]:
    trials = experiment.trials
    tuned = list(dict.fromkeys(experiment.methods[name].rates_of or name for name in experiment.rows))
    rows = [("Method", "by learning rate", "chosen", "by learning rate of the task head", "chosen")]
    for name in tuned:
        found = {record["learning_rate"]: record for record in _records_of(trial_cells(experiment, name), records)}
        if not found:
            continue
        rates = chosen_rates(experiment, records, name)
        best = _best(experiment, list(found.values()))[1]
        heads = [found[best.adapter], *_records_of(trial_cells(experiment, name, best), records)]
        of_heads = {record["task_head_learning_rate"]: record for record in heads if record["task_head_learning_rate"]}
        rows.append(
            (
                name,
                _by_rate(experiment, found),
                f"{rates.adapter:g}",
                _by_rate(experiment, of_heads) or "–",
                "–" if rates.task_head is None else f"{rates.task_head:g}",
            )
        )
    intro = (
        f"Accuracy of the last state on {trials.validation_share:.0%} of the training data that the trials do not train on, "
        f"after {trials.num_rounds} rounds with seed {trials.seed}, as the mean over the last evaluations."
    )
    return [intro, "", *markdown(rows)]


def _by_rate(experiment: Experiment, records: Mapping[float, Record]) -> str:
    return ", ".join(f"{rate:g}: {last_accuracy(experiment, records[rate]):.1f}" for rate in sorted(records))


def _title(experiment: Experiment, variant: str) -> str:
    return " · ".join(part for part in (experiment.title, variant) if part)


def _draw(axes: Axes, x: np.ndarray, curves: np.ndarray, style: str, color: tuple[float, ...], name: str) -> None:
    """The mean over seeds of curves, `[seeds, points]`, and their range."""
    axes.plot(x, curves.mean(0), style, color=color, label=name)
    axes.fill_between(x, curves.min(0), curves.max(0), color=color, alpha=0.15, linewidth=0)


def _plot(experiment: Experiment, runs: Mapping[str, list[Record]], variant: str) -> Figure:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_rounds, by_megabytes = figure.subplots(1, 2, sharey=True)
    colors = colormaps["tab20" if len(runs) > 10 else "tab10"].colors
    for (name, found), color in zip(runs.items(), itertools.cycle(colors), strict=False):
        curves = 100 * np.stack([record["measured"]["mean"] for record in found])  # [seeds, evaluations]
        for axes, key in ((by_rounds, "rounds"), (by_megabytes, "megabytes")):
            x = np.mean([record["measured"][key] for record in found], axis=0)
            _draw(axes, x, curves, "-", color, name)
    by_megabytes.set_xscale("log")
    by_megabytes.xaxis.set_major_formatter("{x:g}")
    by_rounds.xaxis.get_major_locator().set_params(integer=True)
    by_rounds.set(xlabel="round", ylabel="accuracy of the mean of rounds, %")
    by_megabytes.set(xlabel="megabytes uploaded by all clients")
    for axes in (by_rounds, by_megabytes):
        axes.grid(alpha=0.3)
    figure.suptitle(_title(experiment, variant))
    figure.legend(*by_rounds.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return figure


def _plot_of_clients(experiment: Experiment, runs: Mapping[str, list[Record]], variant: str) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, found), color in zip(runs.items(), itertools.cycle(colormaps["tab10"].colors), strict=False):
        curves = 100 * np.stack([np.sort(record["measured"]["clients"]) for record in found])  # [seeds, clients]
        _draw(axes, 1 + np.arange(curves.shape[1]), curves, "o-", color, name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="client, from the worst to the best", ylabel="accuracy, %", title=_title(experiment, variant))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _plot_of_variants(experiment: Experiment, runs: Mapping[str, Mapping[str, list[Record]]], variant: str) -> Figure:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    variants = [one for one in experiment.compared_variants if one in runs]
    methods = [name for name in experiment.rows if any(name in of_variant for of_variant in runs.values())]
    measures = {"last state": partial(last_accuracy, experiment), "mean of rounds": mean_accuracy}
    for axes, (label, accuracy) in zip(panels, measures.items(), strict=True):
        for name, color in zip(methods, itertools.cycle(colormaps["tab10"].colors), strict=False):
            # a variant that was not run is a gap
            found = [[accuracy(record) for record in runs[one].get(name, ())] or [np.nan] for one in variants]
            x = range(len(variants))
            axes.plot(x, [statistics.fmean(values) for values in found], "o:", color=color, label=name)
            axes.vlines(x, [min(values) for values in found], [max(values) for values in found], color=color)
        labels = [experiment.compared_variants[one] for one in variants]
        axes.set_xticks(range(len(variants)), labels, rotation=30, horizontalalignment="right")
        axes.set(ylabel=f"accuracy of the {label}, %")
        axes.grid(alpha=0.3)
    figure.suptitle(_title(experiment, variant))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return figure


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


BY_ROUNDS = Layout("Accuracy against rounds and megabytes", _table, _plot)
OF_CLIENTS = Layout("Accuracy of each client", _table_of_clients, _plot_of_clients)
OF_VARIANTS = Layout("Accuracy by variant", _table_of_variants, _plot_of_variants)


def markdown(rows: Sequence[Sequence[str]], names: int = 1) -> Iterator[str]:
    """
    Args:
        rows (`Sequence[Sequence[str]]`): The rows of a table, with the header first.
        names (`int`, *optional*, defaults to 1): How many of the first columns are names. The others are aligned to the right.

    Yields:
        `str`: Its lines.
    """
    header, *body = rows
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * names + "---:|" * (len(header) - names)
    for row in body:
        yield f"| {' | '.join(row)} |"


def _records_of(cells: Iterable, records: Sequence[Record]) -> list[Record]:
    return [record for cell in cells for record in records if is_of(record, cell)]


def _best(experiment: Experiment, records: Sequence[Record]) -> tuple[Record, Rates] | None:
    if not records:
        return None
    best = max(records, key=lambda record: last_accuracy(experiment, record))
    return best, Rates(best["learning_rate"], best["task_head_learning_rate"])


def _first(record: Record, target: float) -> tuple[float, float] | None:
    """The round and the megabytes after which the mean of rounds reaches an accuracy, in percent."""
    for number, accuracy, megabytes in zip(
        record["measured"]["rounds"], record["measured"]["mean"], record["measured"]["megabytes"], strict=True
    ):
        if 100 * accuracy >= target:
            return number, megabytes
    return None


def _mean_of_reached(reached: Sequence[tuple[float, float] | None]) -> tuple[str, str]:
    if any(one is None for one in reached):
        return "–", "–"
    rounds, megabytes = zip(*reached, strict=True)
    return f"{statistics.fmean(rounds):.1f}", f"{statistics.fmean(megabytes):.2f}"


def _lead(records: Sequence[Record], reference: Sequence[Record] | None, accuracy: Callable[[Record], float]) -> str:
    """How far the accuracy is ahead, and the range over the seeds that both have."""
    of_seed = {record["seed"]: accuracy(record) for record in reference or ()}
    leads = [accuracy(record) - of_seed[record["seed"]] for record in records if record["seed"] in of_seed]
    if not leads:
        return "–"
    over = f" ({min(leads):+.1f} to {max(leads):+.1f})" if len(leads) > 1 else ""
    return f"{statistics.fmean(leads):+.1f}{over}"


def _cosine(records: Sequence[Record]) -> str:
    found = [cosine for record in records for cosine in record["measured"].get("update_cosines", ())]
    return f"{statistics.fmean(found):.2f}" if found else "–"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")
