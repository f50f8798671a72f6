"""Plots of the finished runs of an experiment on accuracy."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from functools import partial

import numpy as np
from accuracy_measures import Record, last_accuracy, mean_accuracy
from experiment import Experiment
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def _title(experiment: Experiment, variant: str) -> str:
    return " · ".join(part for part in (experiment.title, variant) if part)


def _draw(axes: Axes, x: np.ndarray, curves: np.ndarray, style: str, color: tuple[float, ...], name: str) -> None:
    """The mean over seeds of curves, `[seeds, points]`, and their range."""
    axes.plot(x, curves.mean(0), style, color=color, label=name)
    axes.fill_between(x, curves.min(0), curves.max(0), color=color, alpha=0.15, linewidth=0)


def plot_of_methods(experiment: Experiment, runs: Mapping[str, list[Record]], variant: str) -> Figure:
    """The accuracy of the mean of rounds against rounds and megabytes, from the runs of one variant by method."""
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


def plot_of_clients(experiment: Experiment, runs: Mapping[str, list[Record]], variant: str) -> Figure:
    """The accuracy of clients on their own data, from the runs of one variant by method."""
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


def plot_of_variants(experiment: Experiment, runs: Mapping[str, Mapping[str, list[Record]]], variant: str) -> Figure:
    """Both accuracies by variant, from the runs by variant and method."""
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
