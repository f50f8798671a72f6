"""Figures of a federation's fairness: what the metrics of all clients say of those that are served worst."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd


# of the metrics that Trainer adds to what is computed: they tell of the machine, not of the model
TIMED = ("_runtime", "_per_second", "_preparation_time")


def client_statistics(values: Iterable[float], greater_is_better: bool = True) -> dict[str, float]:
    """
    Sum up one metric of several clients. Every client counts once, whatever the number of its examples.

    The figures are those of [Li et al., 2020](https://huggingface.co/papers/1905.10497), with the standard deviation in
    the place of the variance, so that the spread has the unit of the metric.

    Args:
        values (`Iterable[float]`): The metric of each client.
        greater_is_better (`bool`, *optional*, defaults to `True`): Whether a client with a greater value is better off.

    Returns:
        `dict[str, float]`: The `mean`; `worst_decile`, the mean over the worst `ceil(C / 10)` of C clients, and so over
        the worst one of up to 10; the `spread`, which is the standard deviation over the clients (divided by C); the
        `worst` and the `best` value. All are NaN if one of the values is.

    Raises:
        ValueError: if there are no values.
    """
    values = np.asarray(list(values), dtype=float)  # [C]
    if not len(values):
        raise ValueError("There are no clients to sum up: give the metric of one client or more.")
    if np.isnan(values).any():
        return dict.fromkeys(("mean", "worst_decile", "spread", "worst", "best"), math.nan)
    worst_first = np.sort(values) if greater_is_better else np.sort(values)[::-1]
    return {
        "mean": float(values.mean()),
        "worst_decile": float(worst_first[: math.ceil(len(values) / 10)].mean()),
        "spread": float(values.std()),
        "worst": float(worst_first[0]),
        "best": float(worst_first[-1]),
    }


def summarize_clients(table: pd.DataFrame, prefix: str = "eval_clients") -> dict[str, float]:
    """
    Sum up all metrics of several clients, for the record of a round.

    Args:
        table (`pandas.DataFrame`):
            A row for each client and a column for each metric, as [`FederatedTrainer.evaluate_clients`] gives it. Of a
            metric whose name ends in `loss`, less is better, as for `metric_for_best_model` of
            [`~transformers.TrainingArguments`].
        prefix (`str`, *optional*, defaults to `"eval_clients"`): What the names begin with.

    Returns:
        `dict[str, float]`: The figures of [`client_statistics`] by names such as `eval_clients_worst_decile_accuracy`.
    """
    return {
        f"{prefix}_{statistic}_{metric}": value
        for metric in table.columns.drop("examples", errors="ignore")
        for statistic, value in client_statistics(table[metric], not metric.endswith("loss")).items()
    }
