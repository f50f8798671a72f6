"""Plots of the record of a federation."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from peft_ravan.sharing.federation_record import as_number, public_history
from peft_ravan.sharing.plotting import MAX_NAMES, make_figure, name_ticks
from peft_ravan.tuner.state import exchange_state, is_core

from .client_metrics import TIMED


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


BLUE, ORANGE, GREY = "#1f6fb4", "#d9660a", "#8a8a8a"
# participation of a client in a round; 0 means none
TRAINED, FAILED = 1, 2
# curves with at most this many points get markers
MAX_MARKED_ROUNDS = 30


def core_norms(model: nn.Module) -> pd.DataFrame | None:
    """
    Measure the contribution of each head of a Ravan adapter to each target.

    A merge sets every scaling to 1 and moves its value into H, so only the product s*H measures the size of a head.
    With orthonormal bases (`init_bases="gram_schmidt"`) its Frobenius norm times the scale of the bases (`bases_scale`) is
    that of the head's weight update. All heads of a target have the same scale.

    Args:
        model (`torch.nn.Module`): The model.

    Returns:
        `pandas.DataFrame`: The Frobenius norm of s*H, with a row for each target and a column for each head, counted
        from 1. NaN where a target has fewer heads. `None` if the adapter has no heads.
    """
    if not isinstance(model, PeftModel) or len(model.active_adapters) != 1:
        return None
    checkpoint = get_peft_model_state_dict(model, adapter_name=model.active_adapters[0], save_embedding_layers=False)
    cores = {name: product for name, product in exchange_state(checkpoint).items() if is_core(name)}
    if not cores:
        return None
    norms = {
        name.removeprefix("base_model.model.").rpartition(".")[0]: product.float().norm(dim=(1, 2)).tolist()
        for name, product in cores.items()
    }
    return pd.DataFrame.from_dict(norms, orient="index").rename(columns=lambda head: head + 1)


@dataclass(frozen=True)
class Curves:
    """
    The data of the curves of a history.

    Args:
        rounds (`np.ndarray`): The numbers of the rounds, `[rounds]`.
        megabytes (`np.ndarray`): The uploads of all clients up to the end of each round, in 10^6 bytes, `[rounds]`.
        records (`pandas.DataFrame`): A row for each round, with the names in the records as columns.
        metric (`str`, *optional*): The name of the metric, without `eval_`.
    """

    rounds: np.ndarray
    megabytes: np.ndarray
    records: pd.DataFrame
    metric: str | None

    @classmethod
    def of(cls, history: Sequence[Mapping[str, Any]], metric: str | None) -> Curves:
        records = pd.DataFrame([record for record in history if "round" in record])
        if records.empty:
            raise ValueError(
                "There is no round to draw. Run `train` first, or give a history that has records of rounds."
            )
        uploaded = records["upload_bytes"].fillna(0) if "upload_bytes" in records else pd.Series(0.0, records.index)
        names = [name.removeprefix("eval_") for name in records.columns if name.startswith("eval_")]
        metrics = [n for n in names if not n.startswith("clients_") and not n.endswith((*TIMED, "loss"))]
        metric = metric.removeprefix("eval_") if metric is not None else next(iter(metrics), None)
        if metric is not None and f"eval_{metric}" not in records:
            raise ValueError(f"`metric` is {metric!r}, but the history has {', '.join(metrics) or 'no metrics'}.")
        return cls(records["round"].to_numpy(), uploaded.cumsum().to_numpy() / 1e6, records, metric)

    def of_name(self, name: str, over: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The points of one entry of the records, without the rounds that lack it."""
        if name not in self.records:
            return np.empty(0), np.empty(0)
        # records from a file may contain anything
        values = np.array([as_number(value) for value in self.records[name]], dtype=float)
        there = np.isfinite(values)
        return over[there], values[there]


def plot_public_history(
    history: Sequence[Mapping[str, Any]],
    path: str | os.PathLike,
    metric: str | None = None,
    core_norms: pd.DataFrame | None = None,
) -> None:
    """
    Plot the public part of a federation's record, for the Hub. Without rounds or matplotlib, nothing is plotted.

    Args:
        history (`Sequence[Mapping[str, Any]]`): The records. Only their [`public_history`] is plotted.
        path (`str` or `os.PathLike`): Where to save the plot.
        metric (`str`, *optional*): As for [`plot_history`].
        core_norms (`pandas.DataFrame`, *optional*): As for [`plot_history`].
    """
    history = public_history(history)
    taking_part = [
        c for r in history for c in (*r.get("clients", ()), *(f["client"] for f in r.get("failed_clients", ())))
    ]
    with contextlib.suppress(ImportError):
        if history:
            plot_history(history, path, metric, clients=list(dict.fromkeys(taking_part)), core_norms=core_norms)


def plot_history(
    history: Sequence[Mapping[str, Any]],
    path: str | os.PathLike | None = None,
    metric: str | None = None,
    clients: Sequence[str] | None = None,
    core_norms: pd.DataFrame | None = None,
) -> Figure:
    """
    Plot the record of a federation: the metric, the loss and the cosine similarity of the clients' updates over rounds
    and over the megabytes that all clients have uploaded, the participation of clients in each round, and the sizes of the heads.

    If the history has evaluations of the clients (`eval_clients=True`), the plot of the metric also shows their mean,
    their worst decile, and a band from the worst client to the best.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            The records, as in `trainer.state.log_history` or from [`read_history`].
        path (`str` or `os.PathLike`, *optional*):
            Where to save the plot. The file extension determines the format.
        metric (`str`, *optional*):
            The metric, such as `"accuracy"`. By default the first one in the history that is not a loss.
        clients (`Sequence[str]`, *optional*):
            The names of all clients. By default those in the history, sorted.
        core_norms (`pandas.DataFrame`, *optional*):
            A row for each target and a column for each head, as returned by [`core_norms`].

    Returns:
        `matplotlib.figure.Figure`: The plot.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the history has no round or does not contain the metric.
    """
    curves = Curves.of(history, metric)
    participation = participation_of(history, clients)
    sections = [] if curves.metric is None else [(2.7, lambda part: _draw_curves(part, curves, _draw_metric))]
    sections.append((2.7, lambda part: _draw_curves(part, curves, _draw_loss)))
    if "update_cosine" in curves.records:
        sections.append((2.0, lambda part: _draw_curves(part, curves, _draw_similarity)))
    sections.append((_height_of(participation), lambda part: _draw_participation(part.subplots(), participation)))
    if core_norms is not None:
        sections.append((_height_of(core_norms), lambda part: _draw_heads(part.subplots(), core_norms)))
    heights = [height for height, _ in sections]
    figure = make_figure(10, sum(heights))
    # each part has its own margins, since the long names of targets would otherwise squeeze the curves
    parts = figure.subfigures(len(sections), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (_, draw) in zip(parts, sections, strict=True):
        draw(part)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _height_of(table: pd.DataFrame) -> float:
    """The height in inches, with room for the names of the rows. At most `MAX_NAMES` of them are shown."""
    return 1.4 + 0.15 * min(max(len(table), 4), MAX_NAMES)


def _draw_curves(part: SubFigure, curves: Curves, draw: Callable[[Axes, Curves, np.ndarray], None]) -> None:
    from matplotlib.ticker import MaxNLocator

    over_rounds, over_megabytes = part.subplots(1, 2, sharey=True)
    draw(over_rounds, curves, curves.rounds)
    draw(over_megabytes, curves, curves.megabytes)
    over_rounds.set_xlabel("round")
    over_rounds.xaxis.set_major_locator(MaxNLocator(integer=True))
    over_megabytes.set(xlabel="MB uploaded by all clients, up to then", ylabel="")
    for axes in (over_rounds, over_megabytes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = over_rounds.get_legend_handles_labels()
    part.legend(handles, labels, loc="outside upper left", ncols=len(labels), fontsize=8, frameon=False)


def _draw_metric(axes: Axes, curves: Curves, over: np.ndarray) -> None:
    marker = "." if len(over) <= MAX_MARKED_ROUNDS else None
    name = curves.metric.replace("_", " ")
    axes.plot(*curves.of_name(f"eval_{curves.metric}", over), color=BLUE, marker=marker, label=f"{name}, all examples")
    of_clients = {
        figure: curves.of_name(f"eval_clients_{figure}_{curves.metric}", over)
        for figure in ("mean", "worst_decile", "worst", "best")
    }
    x, mean = of_clients["mean"]
    if len(x):
        axes.plot(x, mean, color=BLUE, linestyle="--", linewidth=1, label="mean of clients")
        axes.plot(*of_clients["worst_decile"], color=ORANGE, marker=marker, label="worst decile of clients")
        worst, best = of_clients["worst"][1], of_clients["best"][1]
        axes.fill_between(x, worst, best, color=GREY, alpha=0.15, linewidth=0, label="worst to best client")
    axes.set_ylabel(name)


def _draw_loss(axes: Axes, curves: Curves, over: np.ndarray) -> None:
    marker = "." if len(over) <= MAX_MARKED_ROUNDS else None
    for name, label, colour in (
        ("train_loss", "training (local, mean of clients)", GREY),
        ("eval_loss", "evaluation (merged adapter)", BLUE),
    ):
        x, values = curves.of_name(name, over)
        if len(x):
            axes.plot(x, values, color=colour, marker=marker, label=label)
    axes.set_ylabel("loss")


def _draw_similarity(axes: Axes, curves: Curves, over: np.ndarray) -> None:
    marker = "." if len(over) <= MAX_MARKED_ROUNDS else None
    x, values = curves.of_name("update_cosine", over)
    axes.plot(x, values, color=BLUE, marker=marker, label="similarity of updates (mean of pairs of clients)")
    axes.set_ylabel("cosine")


def participation_of(history: Sequence[Mapping[str, Any]], clients: Sequence[str] | None) -> pd.DataFrame:
    """The participation of clients: a row for each client, a column for each round."""
    records = {record["round"]: record for record in history if "clients" in record}
    failed = {number: [f["client"] for f in record.get("failed_clients", ())] for number, record in records.items()}
    if clients is None:
        clients = sorted({c for n, record in records.items() for c in (*record["clients"], *failed[n])})
    positions = {client: position for position, client in enumerate(clients)}
    cells = np.zeros((len(positions), len(records)), dtype=int)
    for column, (number, record) in enumerate(records.items()):
        # a client that failed at first and trained in a later attempt counts as trained
        cells[[positions[client] for client in failed[number]], column] = FAILED
        cells[[positions[client] for client in record["clients"]], column] = TRAINED
    return pd.DataFrame(cells, index=list(clients), columns=list(records))


def _draw_participation(axes: Axes, participation: pd.DataFrame) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    if participation.empty:
        axes.set_axis_off()
        return
    first, last = participation.columns[0], participation.columns[-1]
    rows = len(participation)
    axes.imshow(
        participation,
        aspect="auto",
        cmap=ListedColormap(["#eef1f4", BLUE, ORANGE]),
        vmin=0,
        vmax=2,
        interpolation="nearest",
        extent=(first - 0.5, last + 0.5, rows - 0.5, -0.5),
    )
    counts = {state: int((participation == state).to_numpy().sum()) for state in (TRAINED, FAILED)}
    axes.legend(
        handles=[
            Patch(color=BLUE, label=f"merged ({counts[TRAINED]})"),
            Patch(color=ORANGE, label=f"failed ({counts[FAILED]})"),
        ],
        loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False, borderaxespad=0.2,
    )  # fmt: skip
    axes.set(xlabel="round", ylabel="client")
    axes.set_title("Participation", loc="left", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    name_ticks(axes.yaxis, participation.index)
    if max(participation.shape) <= MAX_NAMES:  # otherwise lines would hide the cells
        axes.set_xticks(np.linspace(first - 0.5, last + 0.5, len(participation.columns) + 1)[1:-1], minor=True)
        axes.set_yticks(np.arange(rows - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)


def _draw_heads(axes: Axes, norms: pd.DataFrame) -> None:
    image = axes.imshow(norms, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set(xlabel="head", ylabel="target")
    axes.set_title("Size of the heads: Frobenius norm of s·H in the merged adapter", loc="left", fontsize=10)
    axes.figure.colorbar(image, ax=axes, label="‖s·H‖", pad=0.01)
    name_ticks(axes.yaxis, norms.index)
    axes.set_xticks(range(len(norms.columns)), norms.columns)
