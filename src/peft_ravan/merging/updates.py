"""What clients upload, what a merge returns, and the checks that stand between the two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..state import is_basis, is_core, is_scaling


class UpdateError(ValueError):
    """An upload that does not fit the global state. The message names the client, the tensor and the way out."""


@dataclass(frozen=True)
class ClientUpdate:
    """
    What one client uploads after its local training.

    Args:
        state (`Mapping[str, torch.Tensor]`):
            Checkpoint names of the adapter to tensors. A name that ends in `ravan_H` holds the products s*H of the heads
            that this client trained, `[k, r, r]` in the order of the heads. Scalings and bases are never in it.
        num_examples (`int`):
            The number of examples the client trained on, its weight in every mean.
        client_id (`str`, *optional*, defaults to `""`):
            The name of the client, for messages and diagnostics.
        trained_heads (`Mapping[str, torch.Tensor]`, *optional*):
            For names that end in `ravan_H`, which heads the client trained: a bool tensor `[h]` with k true entries. No
            entry, or `None`, means all heads.
    """

    state: Mapping[str, torch.Tensor]
    num_examples: int
    client_id: str = ""
    trained_heads: Mapping[str, torch.Tensor] | None = None

    def heads(self, name: str, num_heads: int) -> torch.Tensor:
        """
        Which heads of a target this client trained.

        Args:
            name (`str`): A checkpoint name that ends in `ravan_H`.
            num_heads (`int`): The number of heads, h.

        Returns:
            `torch.Tensor`: A bool tensor, `[h]`.
        """
        mask = (self.trained_heads or {}).get(name)
        return torch.ones(num_heads, dtype=torch.bool) if mask is None else mask.cpu()


@dataclass(frozen=True)
class MergeResult:
    """
    What a merge returns.

    Args:
        state (`dict[str, torch.Tensor]`):
            The new global state, with the names, shapes and dtypes of the one that went in.
        diagnostics (`dict[str, Any]`):
            What the method has to tell: plain numbers and strings, which can be written as JSON.
    """

    state: dict[str, torch.Tensor]
    diagnostics: dict[str, Any] = field(default_factory=dict)


def check_updates(global_state: Mapping[str, torch.Tensor], updates: Sequence[ClientUpdate]) -> None:
    """
    Check that every update fits the global state.

    Args:
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        updates (`Sequence[ClientUpdate]`): What they uploaded.

    Raises:
        UpdateError: at the first update that does not fit. The message names the client and the tensor.
    """
    if not updates:
        raise UpdateError("A merge needs at least one client update, got none.")
    for index, update in enumerate(updates):
        client = f"client {update.client_id!r}" if update.client_id else f"client number {index} (without a name)"
        _check_update(global_state, update, client)


def _check_update(global_state: Mapping[str, torch.Tensor], update: ClientUpdate, client: str) -> None:
    num_examples = update.num_examples
    if isinstance(num_examples, bool) or not isinstance(num_examples, int) or num_examples < 1:
        raise UpdateError(
            f"{client}: num_examples must be an integer of 1 or more, since it weighs the mean, got {num_examples!r}. "
            "Leave out clients that did not train."
        )
    for name in global_state.keys() - update.state.keys():
        raise UpdateError(
            f"{client}, tensor {name!r}: missing from the update. An update holds every tensor of the global state; was "
            "it made by another adapter configuration?"
        )
    for name in update.state.keys() - global_state.keys():
        reason = (
            "scalings and bases are never uploaded, only the products s*H"
            if is_scaling(name) or is_basis(name)
            else "the global state has no such tensor; was the update made by another adapter configuration?"
        )
        raise UpdateError(f"{client}, tensor {name!r}: not expected in the update: {reason}")
    for name in (update.trained_heads or {}).keys() - {name for name in global_state if is_core(name)}:
        raise UpdateError(f"{client}, tensor {name!r}: trained_heads names it, but it is not a core (`ravan_H`).")
    for name, tensor in update.state.items():
        _check_tensor(name, tensor, global_state[name], update, client)


def _check_tensor(
    name: str, tensor: torch.Tensor, global_tensor: torch.Tensor, update: ClientUpdate, client: str
) -> None:
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        found = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise UpdateError(f"{client}, tensor {name!r}: must be a floating point tensor, got {found}.")
    expected_shape = global_tensor.shape
    if is_core(name):
        mask = (update.trained_heads or {}).get(name)
        if mask is not None:
            num_heads = global_tensor.shape[0]
            if mask.dtype != torch.bool or mask.shape != (num_heads,):
                raise UpdateError(
                    f"{client}, tensor {name!r}: trained_heads must be a bool tensor of shape ({num_heads},), one entry a "
                    f"head, got {mask.dtype} of shape {tuple(mask.shape)}."
                )
            expected_shape = torch.Size([int(mask.sum()), *global_tensor.shape[1:]])
    if tensor.shape != expected_shape:
        raise UpdateError(
            f"{client}, tensor {name!r}: must have shape {tuple(expected_shape)}, got {tuple(tensor.shape)}. Every client "
            "needs the rank and the number of heads of the global adapter."
        )
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise UpdateError(
            f"{client}, tensor {name!r}: {bad} of {tensor.numel()} entries are NaN or infinite. The client's training "
            "diverged: lower its learning rate, or leave the client out."
        )
