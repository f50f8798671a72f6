"""
The clients' uploads, matrix by matrix. A matrix is a tensor, or one head of a core with the clients that trained it.

Methods that need all clients at once work on one matrix after another, so they need the memory of one layer only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..tuner.state import is_core
from .averaging import client_weights, mean_state, weighted_mean
from .updates import ClientUpdate


@dataclass(frozen=True)
class Matrix:
    """
    What C clients uploaded for one matrix.

    Args:
        name (`str`): The name for diagnostics: the name of the tensor, followed by `[head]` for a head of a core.
        start (`torch.Tensor`): The global matrix.
        updates (`Sequence[ClientUpdate]`): The updates of the clients that trained it.
        read (`Callable[[ClientUpdate], torch.Tensor]`): Reads the matrix of one client.
    """

    name: str
    start: torch.Tensor
    updates: Sequence[ClientUpdate]
    read: Callable[[ClientUpdate], torch.Tensor]

    @property
    def weights(self) -> torch.Tensor:
        """The clients' shares of the examples, `[C]` in float64."""
        return client_weights(self.updates)

    def mean(self) -> torch.Tensor:
        """The clients' weighted mean, with the shape and dtype of the global matrix."""
        num_examples = [update.num_examples for update in self.updates]
        return weighted_mean(map(self.read, self.updates), num_examples, like=self.start)

    def columns(self) -> torch.Tensor:
        """The vectorised differences from the global matrix, in at least float32, `[n, C]`."""
        start = self.start.to(torch.promote_types(self.start.dtype, torch.float32))
        return torch.stack([(self.read(update).to(start) - start).flatten() for update in self.updates], dim=1)

    def moved(self, delta: torch.Tensor) -> torch.Tensor:
        """The global matrix plus a delta `[n]`, in the dtype of the global matrix."""
        return (self.start.to(delta) + delta.reshape(self.start.shape)).to(self.start.dtype)


def is_adapter_matrix(name: str) -> bool:
    """
    Whether a tensor is one of the adapter's matrices (Ravan's cores, LoRA's A and B), not of a task head or a bias.
    """
    return is_core(name) or (".lora_" in name and not name.endswith(".bias"))


def split(name: str, tensor: torch.Tensor, updates: Sequence[ClientUpdate]) -> list[Matrix]:
    """
    Args:
        name (`str`): A checkpoint name.
        tensor (`torch.Tensor`): The global tensor.
        updates (`Sequence[ClientUpdate]`): What the clients uploaded.

    Returns:
        `list[Matrix]`: One matrix for each head of a core, otherwise one for the tensor.
    """
    if not is_core(name):
        return [Matrix(name, tensor, updates, lambda update: update.state[name])]
    masks = [update.heads(name, len(tensor)) for update in updates]
    return [
        Matrix(
            f"{name}[{head}]",
            tensor[head],
            [update for update, mask in zip(updates, masks, strict=True) if mask[head]],
            partial(_read_head, name, head),
        )
        for head in range(len(tensor))
    ]


def _read_head(name: str, head: int, update: ClientUpdate) -> torch.Tensor:
    # the upload has only the trained heads, in order: the position is the number of trained heads before this one
    mask = (update.trained_heads or {}).get(name)
    return update.state[name][head if mask is None else int(mask[:head].sum())]


def join(name: str, merged: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    The inverse of [`split`].

    Args:
        name (`str`): A checkpoint name.
        merged (`Sequence[torch.Tensor]`): The new matrices.

    Returns:
        `torch.Tensor`: The new tensor.
    """
    return torch.stack(list(merged)) if is_core(name) else merged[0].clone()


def merge_matrices(
    global_state: Mapping[str, torch.Tensor],
    updates: Sequence[ClientUpdate],
    combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    select: Callable[[str], bool] = is_adapter_matrix,
) -> dict[str, torch.Tensor]:
    """
    Merge matrix by matrix, each on its own.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        updates (`Sequence[ClientUpdate]`):
            What the clients uploaded.
        combine (`Callable`):
            Maps the clients' vectorised differences `[n, C]` and their weights `[C]` to the merged difference `[n]`.
        select (`Callable`, *optional*):
            Which tensors to merge this way. All others are averaged. By default, these are the task head and the
            biases.

    Returns:
        `dict[str, torch.Tensor]`: The new state. A head that nobody trained keeps its value.
    """
    selected = tuple(name for name in global_state if select(name))
    state = mean_state(global_state, updates, leave_out=selected)
    for name in selected:
        tensor = global_state[name]
        merged = []
        for matrix in split(name, tensor, updates):
            if matrix.updates:
                M = matrix.columns()
                merged.append(matrix.moved(combine(M, matrix.weights.to(M))))
            else:
                merged.append(matrix.start)
        state[name] = join(name, merged)
    return state
