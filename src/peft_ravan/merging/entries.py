"""Checks whether the entries of a state are numbers that a merge can compute with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from .changes import working_dtype
from .updates import UpdateError


# with fewer tensors, starting threads costs more than it saves
MIN_TENSORS_FOR_THREADS = 32


def check_entries(state: Mapping[str, torch.Tensor], client: str) -> None:
    """
    Args:
        state (`Mapping[str, torch.Tensor]`): What a client uploaded.
        client (`str`): The client's name, for the message.

    Raises:
        UpdateError: if an entry is NaN, infinite, or so large that products of such entries overflow.
    """
    num_threads = torch.get_num_threads() if len(state) >= MIN_TENSORS_FOR_THREADS else 1
    if num_threads == 1:
        moderate = [_is_moderate(state[name]) for name in state]
    else:
        # torch uses one thread for small tensors
        with ThreadPoolExecutor(num_threads) as threads:
            moderate = list(threads.map(lambda name: _is_moderate(state[name]), state))
    for name, is_moderate in zip(state, moderate, strict=True):
        if is_moderate:
            continue
        tensor = state[name]
        bad = int((~torch.isfinite(tensor)).sum())
        reason = (
            f"{bad} of {tensor.numel()} entries are NaN or infinite"
            if bad
            else f"has entries of {tensor.abs().max().item():.1g}, above {_largest_entry(tensor):.1g}, of which products overflow"
        )
        raise UpdateError(
            f"{client}, tensor {name!r}: {reason}. The client's training diverged: lower its learning rate, or leave the "
            "client out."
        )


def _largest_entry(tensor: torch.Tensor) -> float:
    # methods multiply two entries and sum many such products
    return torch.finfo(working_dtype(tensor)).max ** 0.5 / 1e3


def _is_moderate(tensor: torch.Tensor) -> bool:
    if not tensor.numel():
        return True
    smallest, largest = torch.aminmax(tensor.detach())
    limit = _largest_entry(tensor)
    return bool(smallest >= -limit) and bool(largest <= limit)  # both are false for NaN


def check_global(state: Mapping[str, torch.Tensor]) -> None:
    """
    Args:
        state (`Mapping[str, torch.Tensor]`): A global state.

    Raises:
        ValueError: if an entry is NaN or infinite.
    """
    for name, tensor in state.items():
        if not is_finite(tensor):
            raise ValueError(
                f"Tensor {name!r}: the global state has entries that are NaN or infinite, so there is nothing that updates "
                "could be merged into. Start from an adapter that is whole."
            )


def check_merged(state: Mapping[str, torch.Tensor]) -> None:
    """
    Args:
        state (`Mapping[str, torch.Tensor]`): A new state.

    Raises:
        ValueError: if an entry is NaN or infinite, which can happen with finite uploads if numbers overflow.
    """
    for name, tensor in state.items():
        if not is_finite(tensor):
            raise ValueError(
                f"Tensor {name!r}: the merge has made entries that are NaN or infinite, although all uploads are finite. A "
                "factor of the method or of the server optimizer makes them overflow: lower it, or merge in a dtype with a "
                "larger range."
            )


def is_finite_state(state: Mapping[str, torch.Tensor]) -> bool:
    """
    Args:
        state (`Mapping[str, torch.Tensor]`): Floating point tensors by name.

    Returns:
        `bool`: Whether no entry of any of them is NaN or infinite.
    """
    return all(map(is_finite, state.values()))


def is_finite(tensor: torch.Tensor) -> bool:
    """
    Args:
        tensor (`torch.Tensor`): A floating point tensor.

    Returns:
        `bool`: Whether no entry is NaN or infinite.
    """
    # one sum is several times cheaper than checking every entry, and NaN and infinity carry over to the sum
    return math.isfinite(tensor.sum()) or bool(torch.isfinite(tensor).all())
