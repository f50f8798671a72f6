"""What a client replies when it was evaluated at its node."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..exchange import ClientTask
from ..messages import Check, Message, integer, number, optional, text
from .introduction import name


MAX_METRICS = 1_000
# statistics over clients square them
MAX_METRIC = 1e100


def metrics(value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or len(value) > MAX_METRICS:
        raise ValueError(f"an object with up to {MAX_METRICS} metrics")
    return {name(key): _finite(metric) for key, metric in value.items()}


def _finite(value: Any) -> float:
    value = number(value)
    if not math.isfinite(value) or abs(value) > MAX_METRIC:
        raise ValueError(f"an object with finite numbers up to {MAX_METRIC:g}")
    return value


@dataclass(frozen=True)
class EvaluationReply(Message):
    """
    The reply of a client to a task to evaluate it.

    Args:
        round_number (`int`): The round that the adapter is from, as in the task.
        client (`str`): The name of the client.
        metrics (`Mapping[str, float]`, *optional*): Its metrics, which are finite.
        examples (`int`, *optional*): The number of its examples, if its data have a length.
        failure (`str`, *optional*): Why it could not be evaluated.
    """

    JSON_FIELDS: ClassVar[Mapping[str, Check]] = {
        "round_number": integer(0),
        "client": text,
        "metrics": optional(metrics),
        "examples": optional(integer(1)),
        "failure": optional(text),
    }

    round_number: int
    client: str
    metrics: Mapping[str, float] | None = None
    examples: int | None = None
    failure: str | None = None

    @classmethod
    def to(cls, task: ClientTask, evaluated: Mapping[str, float]) -> EvaluationReply:
        """
        Args:
            task ([`ClientTask`]): A task.
            evaluated (`Mapping[str, float]`): The metrics of the client and the number of its `examples`.

        Returns:
            [`EvaluationReply`]: The reply to it.
        """
        values = {key: float(value) for key, value in evaluated.items() if key != "examples"}
        return cls(task.round_number, task.client, values, evaluated.get("examples"))
