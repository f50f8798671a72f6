"""Limits to the influence of one client on a mean: how large its change may be, and how many examples it may claim."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from statistics import median_low

import torch

from .changes import with_smaller_change
from .updates import ClientUpdate, UpdateError


LARGE_UPDATES = ("clip", "refuse")
_TIMES_MEDIAN = re.compile(r"(?P<factor>\d+(\.\d*)?|\.\d+) *\* *median")


@dataclass(frozen=True)
class UpdateLimits:
    """
    Limits to the influence of one client on a merge, whatever it uploads.

    Args:
        max_update_norm (`float` or `str`, *optional*):
            The largest L2 norm of a client's change, over all tensors together: a number, or a multiple of the median
            over the clients, such as `"3*median"`. For a multiple of the median, a merge has to wait for all updates.
            By default there is no limit.
        large_updates (`str`, *optional*, defaults to `"clip"`):
            What happens to an update with a larger change: `"clip"` scales the change down to the limit, `"refuse"`
            treats the update as one that does not fit. An update whose LoRA rank differs from the global adapter's
            cannot be scaled down and is refused.
        max_examples (`int`, *optional*):
            The largest number of examples that a client counts with. By default the number it claims.

    Raises:
        ValueError: if one of them is out of range.
    """

    max_update_norm: float | str | None = None
    large_updates: str = "clip"
    max_examples: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "max_update_norm", _as_number(self.max_update_norm))
        if self.max_update_norm is not None:
            factor = self._factor()
            if factor is None or not 0 < factor < math.inf:
                raise ValueError(
                    "`max_update_norm` must be a number above 0, or a multiple of the median norm such as '3*median', got "
                    f"{self.max_update_norm!r}."
                )
        if self.large_updates not in LARGE_UPDATES:
            raise ValueError(f"`large_updates` must be 'clip' or 'refuse', got {self.large_updates!r}.")
        is_count = isinstance(self.max_examples, Integral) and not isinstance(self.max_examples, bool)
        if self.max_examples is not None and not (is_count and self.max_examples >= 1):
            raise ValueError(f"`max_examples` must be an integer of 1 or more, got {self.max_examples!r}.")

    def _factor(self) -> float | None:
        """The number, or the factor of the median. `None` if the value is neither."""
        given = self.max_update_norm
        if isinstance(given, str):
            found = _TIMES_MEDIAN.fullmatch(given.strip())
            return float(found["factor"]) if found else None
        return float(given) if isinstance(given, Real) and not isinstance(given, bool) else None

    @property
    def is_set(self) -> bool:
        """Whether any limit is set."""
        return self.max_update_norm is not None or self.max_examples is not None

    @property
    def needs_all_updates(self) -> bool:
        """Whether the limit depends on the updates of all clients."""
        return isinstance(self.max_update_norm, str)

    def counted(self, num_examples: int) -> int:
        """
        Args:
            num_examples (`int`): The number of examples a client claims.

        Returns:
            `int`: The number it counts with.
        """
        return num_examples if self.max_examples is None else min(num_examples, int(self.max_examples))

    def largest_norm(self, norms: Iterable[float] = ()) -> float:
        """
        Args:
            norms (`Iterable[float]`, *optional*): The norms of all clients' changes, if the limit depends on them.

        Returns:
            `float`: The largest norm that an update may have.
        """
        if self.max_update_norm is None:
            return math.inf
        norms = list(norms)
        # the lower one of the two middle values: bad clients must not be able to raise it if they are half of all
        return self._factor() * (median_low(norms) if self.needs_all_updates and norms else 1.0)

    def applied(
        self, update: ClientUpdate, norm: float, largest: float, global_state: Mapping[str, torch.Tensor], client: str
    ) -> ClientUpdate:
        """
        Args:
            update ([`ClientUpdate`]): What the client uploaded.
            norm (`float`): The norm of its change.
            largest (`float`): The largest norm that an update may have.
            global_state (`Mapping[str, torch.Tensor]`): The state the client started from.
            client (`str`): The client's name, for the message.

        Returns:
            [`ClientUpdate`]: The update itself, or one with a smaller change.

        Raises:
            UpdateError: if the change is too large, and is not to be clipped or cannot be.
        """
        if norm <= largest:
            return update
        too_far = (
            f"{client}: its update has a norm of {norm:.3g}, above the limit of {largest:.3g} (`max_update_norm`)"
        )
        if self.large_updates == "refuse":
            raise UpdateError(f"{too_far}. Its training diverged, or it means harm: leave the client out.")
        shapes = {name: global_state[name].shape for name in update.state}
        if not update.trained_heads and any(t.shape != shapes[name] for name, t in update.state.items()):
            raise UpdateError(f"{too_far}, and with another rank than the global adapter it cannot be scaled down.")
        return with_smaller_change(update, global_state, largest)


def _as_number(given: float | str | None) -> float | str | None:
    """A number, also if the command line gives it as a string."""
    try:
        return float(given) if isinstance(given, str) else given
    except ValueError:
        return given
