"""Distances between what clients uploaded, in the weights they would change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from peft import LoraConfig

from .coordinatewise import MAX_BLOCK_ENTRIES
from .lora import LoraTarget, client_factors, is_lora_matrix, lora_scaling, product_targets
from .updates import ClientUpdate


def squared_distances(
    global_state: Mapping[str, torch.Tensor], updates: Sequence[ClientUpdate], config: LoraConfig | None = None
) -> torch.Tensor:
    """
    The squared Euclidean distances between the clients' updates: of the products s*H, of LoRA's products B A and of all
    other tensors, each as precise as the difference of two updates is in float64.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        updates (`Sequence[ClientUpdate]`):
            What C clients uploaded, with all heads.
        config ([`~peft.LoraConfig`], *optional*):
            The configuration of the global adapter, whose alpha / r then multiplies the products.

    Returns:
        `torch.Tensor`: `[C, C]` in float64.
    """
    num_clients = len(updates)
    distances = torch.zeros(num_clients * (num_clients - 1) // 2, dtype=torch.float64)  # of each pair once
    for target in product_targets(global_state, config):
        scaling = 1.0 if config is None else lora_scaling(config, target.module, target.rank(global_state))
        for rows in _products(target, global_state, updates, config):
            distances += scaling**2 * _squared_distances_of_rows(rows)
    for name in global_state:
        if not is_lora_matrix(name):
            tensors = torch.stack([update.state[name].double() for update in updates])
            distances += _squared_distances_of_rows(tensors)
    matrix = torch.zeros(num_clients, num_clients, dtype=torch.float64)
    matrix[tuple(torch.triu_indices(num_clients, num_clients, offset=1))] = distances
    return matrix + matrix.T


def _squared_distances_of_rows(tensors: torch.Tensor) -> torch.Tensor:
    # Differences are taken before anything is squared. Inner products would be cheaper, but lose what clients differ by
    # where all of them, or one bad client, are far from zero.
    return torch.nn.functional.pdist(tensors.flatten(1)).square().cpu()


def _products(
    target: LoraTarget,
    global_state: Mapping[str, torch.Tensor],
    updates: Sequence[ClientUpdate],
    config: LoraConfig | None,
) -> Iterator[torch.Tensor]:
    """
    The clients' products B A some rows at a time, `[C, rows, columns]`, in orthonormal bases of what all B and all A
    together span: distances in these are the same, and R x R matrices with R the sum of the ranks are smaller than the
    products where clients are few.
    """
    factors = [client_factors(target, update, global_state, config) for update in updates]
    ranks = [len(A) for _, A in factors]
    lefts = _in_common_basis(torch.cat([B for B, _ in factors], dim=1).double()).split(ranks, dim=1)
    rights = _in_common_basis(torch.cat([A for _, A in factors]).double().T).split(ranks, dim=1)
    num_rows = max(1, MAX_BLOCK_ENTRIES // (len(rights[0]) * len(updates)))
    for start in range(0, len(lefts[0]), num_rows):
        rows = slice(start, start + num_rows)
        yield torch.stack([left[rows] @ right.T for left, right in zip(lefts, rights, strict=True)])


def _in_common_basis(columns: torch.Tensor) -> torch.Tensor:
    """The coordinates of columns `[d, R]` in an orthonormal basis of their span, `[min(d, R), R]`."""
    return columns if columns.shape[0] <= columns.shape[1] else torch.linalg.qr(columns, mode="r").R
