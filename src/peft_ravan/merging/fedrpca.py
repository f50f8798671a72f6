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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..state import is_core
from .averaging import client_weights, weighted_mean
from .ravan import trained_on_head
from .robust_pca import robust_pca
from .updates import ClientUpdate, MergeResult


@dataclass(frozen=True)
class _Options:
    beta: float | str
    beta_max: float
    lambda_: float | None
    tol: float
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


def is_adapter_matrix(name: str) -> bool:
    """Whether FedRPCA decomposes this tensor: Ravan's cores and LoRA's A and B. The task head and biases are averaged."""
    return is_core(name) or ".lora_" in name


def _merge_matrix(
    global_tensor: torch.Tensor, tensors: Sequence[torch.Tensor], weights: torch.Tensor, options: _Options
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Merge what C clients uploaded for one matrix. Returns the new matrix, and figures for the diagnostics."""
    mean = weighted_mean(tensors, weights, like=global_tensor)
    if len(tensors) < 2:
        # with one client there is nothing in common to tell apart: the mean is that client's update
        return mean, {"beta": 1.0, "num_clients": len(tensors)}

    M = torch.stack([(tensor.to(global_tensor) - global_tensor).flatten() for tensor in tensors], dim=1)  # [n, C]
    _, S, info = robust_pca(M, options.lambda_, options.tol, options.max_iter)
    weights = weights.to(M)
    mean_S = S @ weights  # [n]
    norm_M, norm_S = (M @ weights).norm().item(), mean_S.norm().item()
    sparse_share = norm_S / norm_M if norm_M > 0 else 0.0  # E
    if options.beta == "adaptive":
        beta = min(max(1 / sparse_share, 1.0), options.beta_max) if sparse_share > 0 else 1.0
    else:
        beta = float(options.beta)
    figures = {
        "beta": beta,
        "num_clients": len(tensors),
        "sparse_share": sparse_share,
        "sparsity": info.sparsity.item(),
        "rank": info.rank.item(),
        "iterations": info.iterations.item(),
        "residual": info.residual.item(),
        "converged": info.converged.item(),
    }
    if not figures["converged"]:
        return mean, {**figures, "beta": 1.0}
    # mean(L) + beta * mean(S), written with L = M - S so that beta = 1 is FedAvg to the last bit
    return mean + (beta - 1) * mean_S.reshape(mean.shape).to(mean), figures


def fedrpca(
    global_state: Mapping[str, torch.Tensor],
    updates: Sequence[ClientUpdate],
    beta: float | str = "adaptive",
    beta_max: float = 5.0,
    lambda_: float | None = None,
    tol: float = 1e-7,
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
        tol (`float`, *optional*, defaults to `1e-7`):
            The relative residual at which robust PCA stops.
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
    state, matrices = {}, {}
    for name, tensor in global_state.items():
        tensors = [update.state[name] for update in updates]
        if not is_adapter_matrix(name):
            state[name] = weighted_mean(tensors, weights, like=tensor)
        elif not is_core(name):
            state[name], matrices[name] = _merge_matrix(tensor, tensors, weights, options)
        else:
            heads = []
            for head in range(tensor.shape[0]):
                trainers, products = trained_on_head(name, head, tensor.shape[0], updates)
                merged, figures = tensor[head].clone(), {"beta": 1.0, "num_clients": 0}
                if trainers:
                    merged, figures = _merge_matrix(tensor[head], products, client_weights(trainers), options)
                heads.append(merged)
                matrices[f"{name}[{head}]"] = figures
            state[name] = torch.stack(heads)
    _warn_of_failures(matrices, max_iter)
    return MergeResult(state, {"matrices": matrices})


def _warn_of_failures(matrices: Mapping[str, Mapping[str, Any]], max_iter: int) -> None:
    failed = {name: figures for name, figures in matrices.items() if not figures.get("converged", True)}
    if failed:
        name, figures = next(iter(failed.items()))
        warnings.warn(
            f"fedrpca: robust PCA did not converge in {max_iter} iterations for {len(failed)} of {len(matrices)} matrices, "
            f"which were averaged instead, such as {name!r} (residual {figures['residual']:.1e}, rank {figures['rank']}). "
            "Raise `max_iter` or `tol`."
        )
