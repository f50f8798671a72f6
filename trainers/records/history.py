"""The record of a federation: a file with one JSON object per round, written during the run, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from peft_ravan.sharing.federation_record import HISTORY_FILE, history_lines, write_history

from .callbacks import FederatedCallback
from .client_metrics import TIMED


if TYPE_CHECKING:
    pass


class HistoryFileCallback(FederatedCallback):
    """
    Writes `rounds.jsonl` into the output folder, one line at the end of each round. A new run rewrites the file with
    the rounds of the checkpoint that it resumes from, so that rounds that a killed run wrote after it are not counted
    twice.
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


def _is_measured(name: str) -> bool:
    return name == "update_cosine" or (name.startswith("eval_") and not name.endswith(TIMED))


def history_table(history: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """
    Create a table of the rounds.

    Args:
        history (`Sequence[Mapping[str, Any]]`): The records, as in `trainer.state.log_history`.

    Returns:
        `pandas.DataFrame`: A row for each round, with the number of `clients` whose updates were merged, of clients
        that `failed` and of `examples`; `train_loss`, `update_cosine`, the metrics of evaluations, the megabytes (10^6
        bytes) that all clients sent (`uploaded_MB`) and received (`downloaded_MB`) in the round, and `seconds`. Missing
        values are NaN.
    """
    rows = {}
    for record in history:
        if "round" not in record:
            continue
        trained = "clients" in record or "num_clients" in record  # shared records of private runs lack the former
        rows[record["round"]] = {
            "clients": record.get("num_clients", len(record.get("clients", ()))),
            "failed": len(record.get("failed_clients", ())),
            "examples": record.get("num_examples", 0),
            "train_loss": record.get("train_loss"),
            **{name: record[name] for name in record if _is_measured(name)},
            "uploaded_MB": record["upload_bytes"] / 1e6 if trained else 0.0,
            "downloaded_MB": record["download_bytes"] / 1e6 if trained else 0.0,
            "seconds": record.get("round_seconds"),
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("round")
    counts = ["clients", "failed", "examples"]
    if table.empty:
        return table
    last = ["uploaded_MB", "downloaded_MB", "seconds"]  # after all metrics, even those that only later rounds have
    table = table[[name for name in table.columns if name not in last] + last].astype(float)
    return table.astype(dict.fromkeys(counts, int))
