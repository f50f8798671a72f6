"""Fairness of a federation: statistics of a metric over the clients, in particular over the worst ones."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd


# suffixes of the metrics that Trainer adds: they describe the machine, not the model
TIMED = ("_runtime", "_per_second", "_preparation_time")


def client_statistics(values: Iterable[float], greater_is_better: bool = True) -> dict[str, float]:
    """
    Summarize one metric of several clients. Every client counts once, regardless of the number of its examples.

    The statistics are those of [Li et al., 2020](https://huggingface.co/papers/1905.10497), with the standard
    deviation instead of the variance, so that the spread has the unit of the metric.

    Args:
        values (`Iterable[float]`): The metric of each client.
        greater_is_better (`bool`, *optional*, defaults to `True`): Whether greater values are better.

    Returns:
        `dict[str, float]`: The `mean`; `worst_decile`, the mean over the worst `ceil(C / 10)` of C clients, which is
        the single worst one for up to 10 clients; the `spread`, which is the standard deviation over the clients
        (divided by C); the `worst` and the `best` value. All are NaN if one of the values is.

    Raises:
        ValueError: if there are no values.
    """
    values = np.asarray(list(values), dtype=float)  # [C]
    if not len(values):
        raise ValueError("There are no clients to summarize: give the metric of at least one client.")
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
    Summarize all metrics of several clients, for the record of a round.

    Args:
        table (`pandas.DataFrame`):
            A row for each client and a column for each metric, as returned by [`FederatedTrainer.evaluate_clients`].
            For metrics whose name ends in `loss`, smaller values are better, as for `metric_for_best_model` of
            [`~transformers.TrainingArguments`].
        prefix (`str`, *optional*, defaults to `"eval_clients"`): The prefix of the names.

    Returns:
        `dict[str, float]`: The statistics of [`client_statistics`], by names such as
        `eval_clients_worst_decile_accuracy`.
    """
    return {
        f"{prefix}_{statistic}_{metric}": value
        for metric in table.columns.drop("examples", errors="ignore")
        for statistic, value in client_statistics(table[metric], not metric.endswith("loss")).items()
    }
