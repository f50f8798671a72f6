"""The record of a federation: one JSON object a round in a file, a table, and pictures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .callbacks import FederatedCallback
from .client_metrics import TIMED
from .history_plot import head_norms, plot_history


if TYPE_CHECKING:
    from matplotlib.figure import Figure


HISTORY_FILE = "rounds.jsonl"


def history_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """
    Args:
        records (`Iterable[Mapping[str, Any]]`): Records, as in `trainer.state.log_history`.

    Returns:
        `str`: A line of JSON for each. NaN and infinity, which JSON does not have, are `null`.
    """
    return "".join(json.dumps(_json_safe(record), allow_nan=False, default=str) + "\n" for record in records)


def _json_safe(value: Any) -> Any:
    if hasattr(value, "tolist"):  # of numpy or torch
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _json_safe(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_history(path: str | os.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """
    Write the records of a run as JSON lines. There is never half a file: it is written aside and then renamed.

    Args:
        path (`str` or `os.PathLike`): The file. One that exists is replaced.
        records (`Iterable[Mapping[str, Any]]`): The records.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.incomplete")
    aside.write_text(history_lines(records))
    os.replace(aside, path)


def read_history(path: str | os.PathLike) -> list[dict[str, Any]]:
    """
    Read the records of a run. A last line that a killed run has not written to its end is left out.

    Args:
        path (`str` or `os.PathLike`): The file, or the folder of a run or an adapter that has it.

    Returns:
        `list[dict[str, Any]]`: The records, as in `trainer.state.log_history`.
    """
    path = Path(path)
    text = (path / HISTORY_FILE if path.is_dir() else path).read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class HistoryFileCallback(FederatedCallback):
    """
    Writes `rounds.jsonl` into the output folder: a line when a round ends. A run that begins writes the file anew, with
    the rounds of the checkpoint that it goes on from, so that what a killed run wrote after it is not counted twice.
    """

    def __init__(self):
        self.written = 0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_history(Path(args.output_dir, HISTORY_FILE), state.log_history)
            self.written = len(state.log_history)

    def on_round_end(self, args, state, control, record, **kwargs):
        if state.is_world_process_zero:
            with open(Path(args.output_dir, HISTORY_FILE), "a") as file:
                file.write(history_lines(state.log_history[self.written :]))
            self.written = len(state.log_history)


def history_table(history: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """
    Make a table of the rounds.

    Args:
        history (`Sequence[Mapping[str, Any]]`): The records, as in `trainer.state.log_history`.

    Returns:
        `pandas.DataFrame`: A row for each round, with the numbers of `clients` whose updates were merged, of those that
        `failed` and of `examples`, `train_loss`, the metrics of evaluations, the megabytes (10^6 bytes) of the round that
        were `uploaded_MB` and `downloaded_MB` by all clients, and `seconds`. What a round does not have is NaN.
    """
    rows = {}
    for record in history:
        if "round" not in record:
            continue
        trained = "clients" in record
        rows[record["round"]] = {
            "clients": len(record.get("clients", ())),
            "failed": len(record.get("failed_clients", ())),
            "examples": record.get("num_examples", 0),
            "train_loss": record.get("train_loss"),
            **{name: record[name] for name in record if name.startswith("eval_") and not name.endswith(TIMED)},
            "uploaded_MB": record["upload_bytes"] / 1e6 if trained else 0.0,
            "downloaded_MB": record["download_bytes"] / 1e6 if trained else 0.0,
            "seconds": record.get("round_seconds"),
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("round")
    counts = ["clients", "failed", "examples"]
    if table.empty:
        return table
    last = ["uploaded_MB", "downloaded_MB", "seconds"]  # also after metrics that only later rounds have
    table = table[[name for name in table.columns if name not in last] + last].astype(float)
    return table.astype(dict.fromkeys(counts, int))


class HistoryMixin:
    """Shows what has happened in a [`FederatedTrainer`]."""

    def history_table(self) -> pd.DataFrame:
        """
        Make a table of the rounds so far.

        Returns:
            `pandas.DataFrame`: The table, see [`history_table`].
        """
        return history_table(self.state.log_history)

    def plot_history(self, path: str | os.PathLike | None = None, metric: str | None = None) -> Figure:
        """
        Draw the metric and the loss over rounds and over megabytes, who took part, and of a Ravan adapter how large the
        products s*H of its heads are at each target now.

        Args:
            path (`str` or `os.PathLike`, *optional*): Where to save the picture; its ending tells the format.
            metric (`str`, *optional*): The metric to draw, such as `"accuracy"`. By default `metric_for_best_model`, if
                there is one other than a loss, or else the first one that is not.

        Returns:
            `matplotlib.figure.Figure`: The picture, see [`plot_history`].
        """
        best = (self.args.metric_for_best_model or "loss").removeprefix("eval_")
        if metric is None and not best.endswith("loss") and not best.startswith("clients_"):
            metric = best
        return plot_history(
            self.state.log_history, path, metric, clients=list(self.clients), head_norms=head_norms(self.model)
        )
