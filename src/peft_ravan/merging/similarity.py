"""How similar the changes of the clients are: the mean cosine similarity of their pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce

import torch

from .changes import working_dtype
from .updates import ClientUpdate


# about as many as a processor keeps in its cache
MAX_BLOCK_ENTRIES = 2**18


class UpdateSimilarity:
    """
    The mean cosine similarity over all pairs of clients, of their changes from the global state. FedRPCA
    (Jhunjhunwala et al., 2025) is motivated by high values of it.

    With u_c the change of client c, divided by its norm, it is `(|sum_c u_c|^2 - C) / (C (C - 1))`. Updates are added
    one by one and none is kept, so memory does not grow with their number.

    A change is one vector over all tensors of the upload, as for task vectors and as for its norm in [`change_norm`].
    Every client counts the same, whatever its number of examples. Heads that a client did not train count as unchanged.
    A client that changed nothing has no direction and is left out.

    Args:
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
    """

    def __init__(self, global_state: Mapping[str, torch.Tensor]):
        self._global_state = global_state
        self._is_defined = bool(global_state)
        self._blocks: list[_Block] = []
        self._num_clients = 0
        self._scale = 0.0  # of the last change, which is not in the sums yet

    def watching(self, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        """
        Args:
            updates (`Iterable[ClientUpdate]`): Updates that fit the global state.

        Yields:
            [`ClientUpdate`]: The same, after each was added.
        """
        for update in updates:
            self.add(update)
            yield update
            del update

    def add(self, update: ClientUpdate) -> None:
        """
        Args:
            update ([`ClientUpdate`]): An update that fits the global state.
        """
        if not self._is_defined:
            return
        self._blocks = self._blocks or list(_blocks_of(self._global_state))
        squares = []
        for block in self._blocks:
            # The norm is known at the end of a pass, so a change is added to the sum in the next one. This way, each
            # block is read and written once for an update.
            block.add_last(self._scale)
            if not block.read(update):
                # matrices of different ranks have no common entries
                self._is_defined, self._blocks = False, []
                return
            squares.append(torch.dot(block.change, block.change).item())
        norm, tiny = math.sqrt(math.fsum(squares)), torch.finfo(self._blocks[0].sum.dtype).tiny
        if not tiny <= norm**2 < math.inf:
            # squares overflow or underflow where the norm itself does not
            norm = math.hypot(*(torch.linalg.vector_norm(b.change, dtype=torch.float64).item() for b in self._blocks))
        has_direction = tiny <= norm < math.inf
        self._num_clients += has_direction
        self._scale = 1 / norm if has_direction else 0.0

    def mean(self) -> float | None:
        """
        Returns:
            `float`: The mean over all pairs, from -1 / (C - 1) to 1. `None` if fewer than two clients changed anything,
            or if the LoRA rank of one of them is not that of the global adapter.
        """
        if not self._is_defined or self._num_clients < 2:
            return None
        for block in self._blocks:
            block.add_last(self._scale)
        self._scale = 0.0
        squared = math.fsum(torch.dot(block.sum, block.sum).item() for block in self._blocks)
        mean = (squared - self._num_clients) / (self._num_clients * (self._num_clients - 1))
        # six decimals are as many as float32 has, and rounding must not take it out of its range
        return round(min(max(mean, -1 / (self._num_clients - 1)), 1.0), 6)


class _Block:
    """
    Some tensors of a state as one block of memory, since operations on many small tensors are slow.

    Args:
        state (`Mapping[str, torch.Tensor]`): The tensors of the global state.
        like (`torch.Tensor`): The dtype and device to compute with.

    **Attributes**:
        - **change** (`torch.Tensor`) -- The change of the last client, `[entries]`.
        - **sum** (`torch.Tensor`) -- The sum of the normalised changes before it, `[entries]`.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], like: torch.Tensor):
        sizes = [tensor.numel() for tensor in state.values()]
        self.change, self.sum = like.new_empty(sum(sizes)), like.new_zeros(sum(sizes))
        pieces = self.change.split(sizes)
        self._tensors = [
            (name, start.to(like), piece.view(start.shape))
            for (name, start), piece in zip(state.items(), pieces, strict=True)
        ]

    def add_last(self, scale: float) -> None:
        """Add the last change to the sum, times a factor."""
        if scale:
            self.sum.add_(self.change, alpha=scale)

    def read(self, update: ClientUpdate) -> bool:
        """Read the change of a client, and return whether its tensors have the shapes of the global state."""
        masks = update.trained_heads or {}
        for name, start, change in self._tensors:
            if name not in update.state:
                change.zero_()
                continue
            tensor = update.state[name].to(change)
            if masks.get(name) is not None:
                mask = masks[name].to(change.device)
                change.zero_()
                change[mask] = tensor - start[mask]
            elif tensor.shape != change.shape:
                return False
            else:
                torch.sub(tensor, start, out=change)
        return True


def _blocks_of(state: Mapping[str, torch.Tensor]) -> Iterator[_Block]:
    dtype = reduce(torch.promote_types, map(working_dtype, state.values()))
    like = torch.empty(0, dtype=dtype, device=next(iter(state.values())).device)
    block: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if block and sum(t.numel() for t in block.values()) + tensor.numel() > MAX_BLOCK_ENTRIES:
            yield _Block(block, like)
            block = {}
        block[name] = tensor
    yield _Block(block, like)
