"""Distances between the clients' uploads, measured in the weights that they change."""

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
    The squared Euclidean distances between the clients' updates, over the products s*H, LoRA's products B A and all
    other tensors. Each is as precise as the difference of two updates in float64.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        updates (`Sequence[ClientUpdate]`):
            What C clients uploaded, with all heads.
        config ([`~peft.LoraConfig`], *optional*):
            The configuration of the global adapter. If given, the products are multiplied by its alpha / r.

    Returns:
        `torch.Tensor`: `[C, C]` in float64.
    """
    num_clients = len(updates)
    distances = torch.zeros(num_clients * (num_clients - 1) // 2, dtype=torch.float64)  # each pair once
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
    # Differences are taken before anything is squared. Inner products would be cheaper, but they lose small
    # differences between clients if all of them, or one bad client, are far from zero.
    return torch.nn.functional.pdist(tensors.flatten(1)).square().cpu()


def _products(
    target: LoraTarget,
    global_state: Mapping[str, torch.Tensor],
    updates: Sequence[ClientUpdate],
    config: LoraConfig | None,
) -> Iterator[torch.Tensor]:
    """
    The clients' products B A, a few rows at a time, `[C, rows, columns]`, in orthonormal bases of the joint span of
    all B and of all A. Distances stay the same in these bases, and with few clients the R x R matrices, R being the
    sum of the ranks, are smaller than the products.
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
