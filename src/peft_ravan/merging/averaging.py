"""Means weighted by the number of examples. Every method builds on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from ..tuner.state import has_part, is_core
from .updates import ClientUpdate


# with fewer tensors, starting threads costs more than it saves
MIN_TENSORS_FOR_THREADS = 32


def client_weights(updates: Sequence[ClientUpdate]) -> torch.Tensor:
    """
    Args:
        updates (`Sequence[ClientUpdate]`): The updates of C clients.

    Returns:
        `torch.Tensor`: Each client's share of the examples, `[C]` in float64, with sum 1.
    """
    num_examples = torch.tensor([update.num_examples for update in updates], dtype=torch.float64)
    return num_examples / num_examples.sum()


def _accumulator(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def weighted_mean(tensors: Iterable[torch.Tensor], weights: Iterable[float], like: torch.Tensor) -> torch.Tensor:
    """
    Args:
        tensors (`Iterable[torch.Tensor]`): Tensors of the shape of `like`.
        weights (`Iterable[float]`): Their weights. They need not sum to 1.
        like (`torch.Tensor`): The tensor whose dtype and device the mean gets.

    Returns:
        `torch.Tensor`: The mean, computed in at least float32. For a single tensor, it is that tensor bit for bit.
    """
    mean, total = _accumulator(like), 0.0
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight
        if weight:
            mean.lerp_(tensor.to(mean), weight / total)
    return mean.to(like.dtype)


class StateMean:
    """
    The mean of what clients upload. Updates are added one by one, so memory does not grow with their number. Each head
    of a core is averaged over the clients that trained it.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from. Tensors that nobody uploads keep their value.
        leave_out (`tuple[str, ...]`, *optional*):
            Tensors whose name contains one of these parts are not averaged.
    """

    def __init__(self, global_state: Mapping[str, torch.Tensor], leave_out: tuple[str, ...] = ()):
        self._global_state = global_state
        self._means = {
            name: _accumulator(tensor) for name, tensor in global_state.items() if not has_part(name, leave_out)
        }
        self._total = 0
        self._threads = ThreadPoolExecutor(torch.get_num_threads())
        # the number of examples and of clients for each head of a core
        self._head_totals = {name: [0] * len(mean) for name, mean in self._means.items() if is_core(name)}
        self.clients_per_head = {name: [0] * len(totals) for name, totals in self._head_totals.items()}

    def add(self, update: ClientUpdate) -> None:
        """
        Args:
            update ([`ClientUpdate`]): What a client uploaded.
        """
        self._total += update.num_examples
        whole = []
        for name, mean in self._means.items():
            totals = self._head_totals.get(name)
            trained = () if totals is None else self._count_heads(name, update)
            if totals is None or (len(trained) == len(totals) and all(total == self._total for total in totals)):
                whole.append(name)
                continue
            for head, product in zip(trained, update.state[name], strict=True):
                mean[head].lerp_(product.to(mean), update.num_examples / totals[head])
        means = [self._means[name] for name in whole]
        tensors = [update.state[name].to(mean) for name, mean in zip(whole, means, strict=True)]
        if means:
            self._lerp(means, tensors, update.num_examples / self._total)

    def _lerp(self, means: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], share: float) -> None:
        # An upload is many small tensors, and torch uses one thread for each of them. With one call for all tensors
        # instead of one call each, split over several threads, this takes about as long as reading them from memory.
        @torch.no_grad()
        def lerp(part: slice) -> None:
            torch._foreach_lerp_(means[part], tensors[part], share)

        num_parts = torch.get_num_threads() if len(means) >= MIN_TENSORS_FOR_THREADS else 1
        if num_parts == 1:
            lerp(slice(None))
        else:
            list(self._threads.map(lerp, (slice(start, None, num_parts) for start in range(num_parts))))

    def _count_heads(self, name: str, update: ClientUpdate) -> Sequence[int]:
        totals, counts = self._head_totals[name], self.clients_per_head[name]
        mask = (update.trained_heads or {}).get(name)
        trained = range(len(totals)) if mask is None else mask.nonzero().flatten().tolist()
        for head in trained:
            totals[head] += update.num_examples
            counts[head] += 1
        return trained

    def state(self) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict[str, torch.Tensor]`: The mean state, with the names, dtypes and devices of the global state.
        """
        state = {}
        for name, tensor in self._global_state.items():
            state[name] = self._means[name].to(tensor.dtype) if name in self._means else tensor.clone()
            for head, count in enumerate(self.clients_per_head.get(name, ())):
                if not count:
                    state[name][head] = tensor[head]
        return state


def mean_state(
    global_state: Mapping[str, torch.Tensor], updates: Iterable[ClientUpdate], leave_out: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """
    Args:
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        updates (`Iterable[ClientUpdate]`): What they uploaded.
        leave_out (`tuple[str, ...]`, *optional*): Tensors whose name contains one of these parts keep their value.

    Returns:
        `dict[str, torch.Tensor]`: The mean state, see [`StateMean`].
    """
    mean = StateMean(global_state, leave_out)
    for update in updates:
        mean.add(update)
    return mean.state()
