"""The settings of secure aggregation, with which a server sees only sums over the updates of clients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .parsing import parse_json, parse_settings


# a sum over two clients shows each of them the update of the other one
MIN_CLIENTS = 3


@dataclass(frozen=True)
class SecureAggregation:
    """
    How a federation over Flower hides the updates of single clients from its server: each client adds masks to its
    update that cancel in the sum over the clients of a round.

    Args:
        threshold (`float`, *optional*, defaults to 2/3):
            The share of the clients of a round that must stay until its end, above 0.5 and up to 1. With fewer, the masks of
            the others cannot be removed, and the attempt at the round fails. As many clients would have to collude with
            the server to uncover another one by the shares of its keys, so a larger value protects better.
        clipping_range (`float`, *optional*, defaults to 8.0):
            The largest absolute value that any entry of a client's change in a round can have. A client with a larger one
            fails: nothing is clipped. The resolution of what is summed is proportional to it.

    Raises:
        TypeError: if a value is not a number.
        ValueError: if a value is out of range.
    """

    threshold: float = 2 / 3
    clipping_range: float = 8.0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"`{field.name}` of `secure_aggregation` must be a number, got {value!r}.")
            object.__setattr__(self, field.name, float(value))
        if not 0.5 < self.threshold <= 1:
            raise ValueError(
                f"`threshold` of `secure_aggregation` must be above 0.5 and up to 1, got {self.threshold!r}. With half of the "
                "clients, a server could let one half uncover what it has told the other half to hide."
            )
        if not 0 < self.clipping_range < math.inf:
            raise ValueError(
                f"`clipping_range` of `secure_aggregation` must be a finite number above 0, got {self.clipping_range!r}."
            )

    @classmethod
    def parse(cls, value: SecureAggregation | Mapping[str, Any] | bool | str | None) -> SecureAggregation | None:
        """
        Args:
            value (`SecureAggregation`, `dict[str, Any]`, `bool` or `str`, *optional*): The value of
                `secure_aggregation`. `True` stands for the defaults. A string is parsed as JSON.

        Returns:
            [`SecureAggregation`]: The validated settings, or `None` for `None` and `False`.

        Raises:
            TypeError: if it is none of these, or has a field that [`SecureAggregation`] does not have.
            ValueError: if a value is out of range, or if a string is not JSON.
        """
        if isinstance(value, str):
            value = parse_json("secure_aggregation", value)
        if value is None or value is False:
            return None
        return cls() if value is True else parse_settings(cls, value, "secure_aggregation", also="True, ")

    def to_dict(self) -> dict[str, float]:
        """
        Returns:
            `dict[str, float]`: The fields, in a form that JSON can hold.
        """
        return asdict(self)

    def shares_needed(self, num_clients: int) -> int:
        """
        Args:
            num_clients (`int`): The number of clients that are asked in a round.

        Returns:
            `int`: How many of them must stay until its end, always more than half.
        """
        # 2 / 3 of 3 must be 2, whatever the last bit of the product is
        return max(num_clients // 2 + 1, math.ceil(self.threshold * num_clients - 1e-9))
