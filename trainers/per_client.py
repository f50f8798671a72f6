"""
A metric for 🤗 Evaluate: the distribution of accuracy, or another metric, over the clients of a federation.

It can be imported, or loaded from this file with `evaluate.load`. Neither needs a network connection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


try:
    import evaluate
except ImportError as error:
    raise ImportError(
        "The metric needs 🤗 Evaluate, which comes with an optional extra: pip install 'peft-ravan[evaluate]'."
    ) from error
import datasets
import pandas as pd

# not relative: `evaluate.load` runs a copy of this file
from peft_ravan.trainers.records.client_metrics import client_statistics


_DESCRIPTION = """
Computes a metric for each client of a federation and summarizes it: the mean over the clients, the mean over the worst
decile, the spread (standard deviation), the worst and the best value.
"""

_INPUTS = """
Args:
    predictions (`list`): The predicted labels or values.
    references (`list`): The true labels or values.
    clients (`list[str]`): The client that each example belongs to.
    metric (`Callable`, *optional*): Computes the metric of one client from the keyword arguments `predictions` and
        `references`. It returns a number, or a dict with one number like the `compute` method of other metrics. By
        default accuracy.
    greater_is_better (`bool`, *optional*, defaults to `True`): Whether greater values are better.

Returns:
    `dict`: `mean`, `worst_decile` (the mean over the worst `ceil(C / 10)` of C clients), `spread` (standard deviation),
    `worst`, `best`, and `per_client`, the metric of each client by its name. Every client counts once.

Example:

    >>> from peft_ravan.trainers.per_client import PerClient
    >>> PerClient().compute(predictions=[0, 1, 1], references=[0, 1, 0], clients=["north", "north", "south"])["worst_decile"]
    0.0
"""

_CITATION = """
@inproceedings{li2020fair,
  title={Fair Resource Allocation in Federated Learning},
  author={Li, Tian and Sanjabi, Maziar and Beirami, Ahmad and Smith, Virginia},
  booktitle={International Conference on Learning Representations},
  year={2020}
}
"""


def _accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    return sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class PerClient(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[self._features(kind) for kind in ("int64", "float64")],
            reference_urls=["https://huggingface.co/papers/1905.10497"],
        )

    @staticmethod
    def _features(kind: str) -> datasets.Features:
        value = datasets.Value(kind)
        return datasets.Features({"predictions": value, "references": value, "clients": datasets.Value("string")})

    def _compute(
        self,
        predictions: Sequence[Any],
        references: Sequence[Any],
        clients: Sequence[str],
        metric: Callable[..., float | dict[str, float]] = _accuracy,
        greater_is_better: bool = True,
    ) -> dict[str, Any]:
        examples = pd.DataFrame({"predictions": predictions, "references": references, "clients": clients})
        per_client = {}
        for client, group in examples.groupby("clients", sort=False):
            value = metric(predictions=group["predictions"].tolist(), references=group["references"].tolist())
            if isinstance(value, dict):
                if len(value) != 1:
                    raise ValueError(f"`metric` gives {len(value)} numbers, {list(value)}, and it must give one.")
                [value] = value.values()
            per_client[client] = float(value)
        return {**client_statistics(per_client.values(), greater_is_better), "per_client": per_client}
