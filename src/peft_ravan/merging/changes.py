"""A client's change: the difference between its upload and the global state, its norm, and how to scale it down."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from .updates import ClientUpdate


def change_norm(update: ClientUpdate, global_state: Mapping[str, torch.Tensor]) -> float:
    """
    Args:
        update ([`ClientUpdate`]): What the client uploaded, with the shapes of the global state, or other LoRA ranks.
        global_state (`Mapping[str, torch.Tensor]`): The state the client started from.

    Returns:
        `float`: The L2 norm of the change, over all tensors together. Heads that the client did not train count as
        unchanged. LoRA matrices of another rank are padded with zeros.
    """
    return math.hypot(*(torch.linalg.vector_norm(change).item() for _, change in _changes(update, global_state)))


def clip_change(
    update: ClientUpdate, global_state: Mapping[str, torch.Tensor], clip_norm: float
) -> tuple[dict[str, torch.Tensor], float]:
    """
    Scale a client's change down to a norm.

    Args:
        update ([`ClientUpdate`]): What the client uploaded. A head that it did not train counts as unchanged.
        global_state (`Mapping[str, torch.Tensor]`): The state the client started from.
        clip_norm (`float`): The largest L2 norm, over all tensors together.

    Returns:
        `tuple[dict[str, torch.Tensor], float]`: The clipped difference from the global state, by the names of the
        upload, with all heads and in at least float32; and the norm before clipping.
    """
    norm = change_norm(update, global_state)
    scale = min(1.0, clip_norm / norm) if norm else 1.0
    clipped = {}
    for name, change in _changes(update, global_state):
        # the norm overflows even float64, so nothing of the change can be kept
        change = change.mul_(scale) if math.isfinite(norm) else torch.zeros_like(change)
        clipped[name] = change.to(working_dtype(global_state[name]))
    return clipped, norm


def with_smaller_change(
    update: ClientUpdate, global_state: Mapping[str, torch.Tensor], clip_norm: float
) -> ClientUpdate:
    """
    The upload of a client with its change scaled down, in the same direction.

    Args:
        update ([`ClientUpdate`]): What the client uploaded, with the shapes of the global state.
        global_state (`Mapping[str, torch.Tensor]`): The state the client started from.
        clip_norm (`float`): The largest L2 norm of the change.

    Returns:
        [`ClientUpdate`]: The same heads and dtypes, with a change of at most that norm, up to rounding.
    """
    clipped, _ = clip_change(update, global_state, clip_norm)
    state = {}
    for name, tensor in update.state.items():
        moved = global_state[name].to(clipped[name]) + clipped[name]
        mask = (update.trained_heads or {}).get(name)
        state[name] = (moved if mask is None else moved[mask.to(moved.device)]).to(tensor)
    return replace(update, state=state)


def working_dtype(tensor: torch.Tensor) -> torch.dtype:
    """
    Args:
        tensor (`torch.Tensor`): A tensor of a state.

    Returns:
        `torch.dtype`: The dtype that a merge computes in: the dtype of the tensor, but at least float32.
    """
    return torch.promote_types(tensor.dtype, torch.float32)


def _changes(update: ClientUpdate, global_state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The differences, one tensor at a time, in float64, so that finite float32 uploads have a finite norm."""
    for name, tensor in update.state.items():
        start = global_state[name]
        mask = (update.trained_heads or {}).get(name)
        if mask is not None:
            change = torch.zeros(start.shape, dtype=torch.float64, device=start.device)
            mask = mask.to(start.device)
            change[mask] = tensor.to(change) - start[mask].double()
        elif tensor.shape == start.shape:
            change = tensor.to(start.device, torch.float64) - start.double()
        else:
            shape = [max(sizes) for sizes in zip(tensor.shape, start.shape, strict=True)]
            change = _padded(tensor.to(start.device), shape) - _padded(start, shape)
        yield name, change


def _padded(tensor: torch.Tensor, shape: list[int]) -> torch.Tensor:
    padded = torch.zeros(shape, dtype=torch.float64, device=tensor.device)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor.double()
    return padded
