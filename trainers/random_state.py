"""The state of the random generators of a process."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RandomState:
    """
    The state of the random generators of Python, NumPy and torch.

    Args:
        numbers (`Mapping[str, Any]`): The part that JSON can hold.
        tensors (`Mapping[str, torch.Tensor]`): The rest.
    """

    numbers: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def now(cls) -> RandomState:
        """
        Returns:
            [`RandomState`]: The current state of the generators.
        """
        kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
        tensors = {"rng.torch": torch.get_rng_state(), "rng.numpy": torch.from_numpy(keys.astype(np.int64))}
        if torch.cuda.is_available():
            tensors.update({f"rng.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
        version, internal, gauss_next = random.getstate()
        numbers = {"numpy": [kind, position, has_gauss, gauss], "python": [version, list(internal), gauss_next]}
        return cls(numbers, tensors)

    def restore(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self.tensors["rng.torch"])
        kind, position, has_gauss, gauss = self.numbers["numpy"]
        keys = self.tensors["rng.numpy"].numpy().astype(np.uint32)
        np.random.set_state((kind, keys, position, has_gauss, gauss))
        version, internal, gauss_next = self.numbers["python"]
        random.setstate((version, tuple(internal), gauss_next))
        for device in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            if f"rng.cuda.{device}" in self.tensors:
                torch.cuda.set_rng_state(self.tensors[f"rng.cuda.{device}"], device)


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the random generators at the end, whatever is drawn from them within the context."""
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()
