"""
FedRPCA: split the clients' updates into what they have in common and what is their own, and amplify the latter.

Jhunjhunwala et al., FedRPCA: Enhancing Federated LoRA Aggregation Using Robust PCA, 2025, algorithm 1. The vectorised
updates of one matrix are the columns of M = L + S (robust PCA), and the merged update is mean(L) + beta * mean(S). LoRA's
A and B are taken each on its own, as in the paper; for Ravan M holds the products s*H of one head, which enter the weight
linearly, so the merge acts on the true update.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..state import is_core
from .averaging import client_weights, weighted_mean
from .ravan import trained_on_head
from .robust_pca import robust_pca
from .updates import ClientUpdate, MergeResult


# a batch of matrices is decomposed in float64 with some copies: this many entries are about a gigabyte
MAX_BATCH_ENTRIES = 2**24


@dataclass(frozen=True)
class _Options:
    beta: float | str
    beta_max: float
    lambda_: float | None
    tol: float | None
    max_iter: int

    def __post_init__(self):
        is_number = isinstance(self.beta, (int, float)) and not isinstance(self.beta, bool)
        if self.beta != "adaptive" and not (is_number and math.isfinite(self.beta) and self.beta >= 0):
            raise ValueError(f"fedrpca: `beta` must be a number of 0 or more, or 'adaptive', got {self.beta!r}.")
        if not self.beta_max >= 1:
            raise ValueError(f"fedrpca: `beta_max` must be 1 or more, got {self.beta_max!r}.")
        for name in ("lambda_", "tol", "max_iter"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"fedrpca: `{name}` must be above 0, got {value!r}.")

    def beta_for(self, sparse_share: float) -> float:
        """The factor of the sparse part of a matrix, given E = ||mean(S)|| / ||mean(M)||."""
        if self.beta != "adaptive":
            return float(self.beta)
        return min(max(1 / sparse_share, 1.0), self.beta_max) if sparse_share > 0 else 1.0


def is_adapter_matrix(name: str) -> bool:
    """Whether FedRPCA decomposes this tensor: Ravan's cores and LoRA's A and B. The task head and biases are averaged."""
    return is_core(name) or ".lora_" in name


@dataclass(frozen=True)
class _Matrix:
    """What C clients uploaded for one matrix: a tensor of LoRA, or one head of a core."""

    name: str
    global_tensor: torch.Tensor
    tensors: Sequence[torch.Tensor]
    weights: torch.Tensor  # [C]

    def columns(self) -> torch.Tensor:
        """The vectorised updates, `[n, C]`."""
        start = self.global_tensor
        return torch.stack([(tensor.to(start) - start).flatten() for tensor in self.tensors], dim=1)


def _collect_matrices(global_state: Mapping[str, torch.Tensor], updates: Sequence[ClientUpdate]) -> list[_Matrix]:
    matrices = []
    for name, tensor in global_state.items():
        if is_core(name):
            for head in range(tensor.shape[0]):
                trainers, products = trained_on_head(name, head, tensor.shape[0], updates)
                weights = client_weights(trainers) if trainers else torch.empty(0)
                matrices.append(_Matrix(f"{name}[{head}]", tensor[head], products, weights))
        elif is_adapter_matrix(name):
            tensors = [update.state[name] for update in updates]
            matrices.append(_Matrix(name, tensor, tensors, client_weights(updates)))
    return matrices


def _batches(matrices: Sequence[_Matrix]) -> Iterator[list[_Matrix]]:
    """Matrices of one shape, which are solved together: for small ones that is much faster than one by one."""
    groups: dict[tuple[int, int], list[_Matrix]] = {}
    for matrix in matrices:
        groups.setdefault((matrix.global_tensor.numel(), len(matrix.tensors)), []).append(matrix)
    for (n, num_clients), group in groups.items():
        size = max(1, MAX_BATCH_ENTRIES // (n * max(1, num_clients)))
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _merge_batch(batch: Sequence[_Matrix], options: _Options) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Merge matrices of one shape. Yields, for each, the new matrix and the figures for the diagnostics."""
    num_clients = len(batch[0].tensors)
    if num_clients < 2:
        # with one client there is nothing in common to tell apart, and without any nothing changes
        for matrix in batch:
            merged = matrix.tensors[0] if num_clients else matrix.global_tensor
            yield merged.to(matrix.global_tensor, copy=True), {"beta": 1.0, "num_clients": num_clients}
        return

    M = torch.stack([matrix.columns() for matrix in batch])  # [batch, n, C]
    _, S, info = robust_pca(M, options.lambda_, options.tol, options.max_iter)
    for index, matrix in enumerate(batch):
        weights = matrix.weights.to(M)
        mean_S = S[index] @ weights  # [n]
        norm_M = (M[index] @ weights).norm().item()
        sparse_share = mean_S.norm().item() / norm_M if norm_M > 0 else 0.0
        converged = info.converged[index].item()
        beta = options.beta_for(sparse_share) if converged else 1.0
        mean = weighted_mean(matrix.tensors, matrix.weights, like=matrix.global_tensor)
        # mean(L) + beta * mean(S), written with L = M - S so that beta = 1 is FedAvg to the last bit
        yield (
            mean + (beta - 1) * mean_S.reshape(mean.shape).to(mean),
            {
                "beta": beta,
                "num_clients": num_clients,
                "sparse_share": sparse_share,
                "sparsity": info.sparsity[index].item(),
                "rank": info.rank[index].item(),
                "iterations": info.iterations[index].item(),
                "residual": info.residual[index].item(),
                "converged": converged,
            },
        )


def fedrpca(
    global_state: Mapping[str, torch.Tensor],
    updates: Sequence[ClientUpdate],
    beta: float | str = "adaptive",
    beta_max: float = 5.0,
    lambda_: float | None = None,
    tol: float | None = None,
    max_iter: int = 500,
) -> MergeResult:
    """
    Merge by robust PCA.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        updates (`Sequence[ClientUpdate]`):
            What the clients uploaded.
        beta (`float` or `str`, *optional*, defaults to `"adaptive"`):
            The factor of the sparse part. 1 is FedAvg. `"adaptive"` takes `1 / E` for each matrix, with
            `E = ||mean(S)|| / ||mean(M)||`, kept within 1 and `beta_max`.
        beta_max (`float`, *optional*, defaults to 5.0):
            The largest adaptive beta.
        lambda_ (`float`, *optional*):
            The weight of the sparse part in robust PCA. By default `1 / sqrt(max(n, C))` for each matrix.
        tol (`float`, *optional*):
            The relative residual at which robust PCA stops. By default that of [`robust_pca`] for the dtype.
        max_iter (`int`, *optional*, defaults to 500):
            The largest number of iterations. A matrix that does not converge is averaged, with a warning.

    Returns:
        [`MergeResult`]: The new state. The diagnostics have under `matrices`, for each matrix (a head of a core is
        `name[i]`), the figures of its decomposition: `beta`, `sparse_share` (E), `sparsity` (the share of entries of S
        that are not 0), `rank` (of L), `iterations`, `residual` and `converged`.

    Raises:
        ValueError: if an option is out of range.
    """
    options = _Options(beta, beta_max, lambda_, tol, max_iter)
    weights = client_weights(updates)
    matrices = _collect_matrices(global_state, updates)
    merged, figures = {}, {}
    for batch in _batches(matrices):
        for matrix, (tensor, matrix_figures) in zip(batch, _merge_batch(batch, options), strict=True):
            merged[matrix.name], figures[matrix.name] = tensor, matrix_figures

    state = {}
    for name, tensor in global_state.items():
        if is_core(name):
            state[name] = torch.stack([merged[f"{name}[{head}]"] for head in range(tensor.shape[0])])
        elif is_adapter_matrix(name):
            state[name] = merged[name]
        else:
            state[name] = weighted_mean([update.state[name] for update in updates], weights, like=tensor)
    _warn_of_failures(figures, max_iter)
    return MergeResult(state, {"matrices": {matrix.name: figures[matrix.name] for matrix in matrices}})


def _warn_of_failures(matrices: Mapping[str, Mapping[str, Any]], max_iter: int) -> None:
    failed = {name: figures for name, figures in matrices.items() if not figures.get("converged", True)}
    if failed:
        name, figures = next(iter(failed.items()))
        warnings.warn(
            f"fedrpca: robust PCA did not converge in {max_iter} iterations for {len(failed)} of {len(matrices)} matrices, "
            f"which were averaged instead, such as {name!r} (residual {figures['residual']:.1e}, rank {figures['rank']}). "
            "Raise `max_iter` or `tol`."
        )
