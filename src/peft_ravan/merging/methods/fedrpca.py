"""
FedRPCA: split the clients' updates into a common part and client-specific parts, and amplify the latter.

Jhunjhunwala et al., FedRPCA: Enhancing Federated LoRA Aggregation Using Robust PCA, 2025. The vectorised
updates of one matrix are the columns of M = L + S (robust PCA), and the merged update is mean(L) + beta * mean(S). For
LoRA, these are the updates of A and B separately, as in the paper, or of their product. For Ravan, they are those of
the products s*H of one head. These enter the weight linearly, so the merge acts on the true update.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig

from ..averaging import mean_state
from ..lora import client_factors, is_lora_matrix, product_targets
from ..matrices import Matrix, is_adapter_matrix, join, split
from ..method import MergeMethod
from ..robust_pca import robust_pca
from ..truncation import truncated_factors
from ..updates import ClientUpdate, MergeResult


# matrices of one shape are solved together up to this many entries; the solver keeps a few copies of them
MAX_BATCH_ENTRIES = 2**24
# a gap above the tolerance, but at most this many times, has little effect on the merge
NEAR_OPTIMUM = 100


@dataclass(frozen=True)
class _Options:
    beta: float | str
    beta_max: float
    lambda_: float | None
    tol: float
    max_iter: int
    lora: str
    sparse_limit: float | None

    def __post_init__(self):
        is_number = isinstance(self.beta, (int, float)) and not isinstance(self.beta, bool)
        if self.beta != "adaptive" and not (is_number and math.isfinite(self.beta) and self.beta >= 0):
            raise ValueError(f"fedrpca: `beta` must be a number of 0 or more, or 'adaptive', got {self.beta!r}.")
        if not self.beta_max >= 1:
            raise ValueError(f"fedrpca: `beta_max` must be 1 or more, got {self.beta_max!r}.")
        for name in ("lambda_", "tol", "max_iter", "sparse_limit"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"fedrpca: `{name}` must be above 0, got {value!r}.")

        if self.lora not in ("factors", "products"):
            raise ValueError(f"fedrpca: `lora` must be 'factors' or 'products', got {self.lora!r}.")

    def beta_for(self, sparse_share: float) -> float:
        """The factor of the sparse part of a matrix, given E = ||mean(S)|| / ||mean(M)||."""
        if self.beta != "adaptive":
            return float(self.beta)
        return min(max(1 / sparse_share, 1.0), self.beta_max) if sparse_share > 0 else 1.0


def _batches(matrices: Sequence[Matrix]) -> Iterator[list[Matrix]]:
    """Matrices of one shape, to be solved together. For small matrices, this is much faster than one by one."""
    groups: dict[tuple[int, int], list[Matrix]] = {}
    for matrix in matrices:
        groups.setdefault((matrix.start.numel(), len(matrix.updates)), []).append(matrix)
    for (n, num_clients), group in groups.items():
        size = max(1, MAX_BATCH_ENTRIES // (n * max(1, num_clients)))
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _merge_batch(batch: Sequence[Matrix], options: _Options) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Merge matrices of one shape. Yields the new matrix and the figures for the diagnostics for each."""
    num_clients = len(batch[0].updates)
    if num_clients < 2:
        # with one client there is no common part to separate, and without clients nothing changes
        for matrix in batch:
            yield matrix.mean() if num_clients else matrix.start, {"beta": 1.0, "num_clients": num_clients}
        return

    M = torch.stack([matrix.columns() for matrix in batch])  # [batch, n, C]
    _, S, info = robust_pca(M, options.lambda_, options.tol, options.max_iter)
    for index, matrix in enumerate(batch):
        weights = matrix.weights.to(M)
        mean_S = S[index] @ weights  # [n]
        within = _shares_within_the_median(S[index], options.sparse_limit)  # [C]
        amplified = S[index] @ (within * weights)  # [n]
        norm_M = (M[index] @ weights).norm().item()
        sparse_share = mean_S.norm().item() / norm_M if norm_M > 0 else 0.0
        gap = info.gap[index].item()
        beta = options.beta_for(sparse_share) if gap <= NEAR_OPTIMUM * options.tol else 1.0
        mean = matrix.mean()
        # mean(L) + beta * mean(S), written with L = M - S so that beta = 1 is FedAvg bit for bit
        yield (
            mean + (beta - 1) * amplified.reshape(mean.shape).to(mean),
            {
                "beta": beta,
                "num_clients": num_clients,
                "sparse_share": sparse_share,
                "num_limited": int((within < 1).sum()),
                "sparsity": info.sparsity[index].item(),
                "rank": info.rank[index].item(),
                "iterations": info.iterations[index].item(),
                "gap": gap,
                "converged": info.converged[index].item(),
            },
        )


def _shares_within_the_median(S: torch.Tensor, limit: float | None) -> torch.Tensor:
    """The share of each client's sparse part in `[n, C]` that stays within a multiple of the median norm, `[C]`."""
    norms = torch.linalg.vector_norm(S, dim=0)  # [C]
    if limit is None:
        return torch.ones_like(norms)
    largest = limit * norms.median()  # the lower one of the two middle values
    return torch.where(norms > largest, largest / norms, 1.0)


def fedrpca(
    global_state: Mapping[str, torch.Tensor],
    updates: Sequence[ClientUpdate],
    config: LoraConfig | None = None,
    beta: float | str = "adaptive",
    beta_max: float = 5.0,
    lambda_: float | None = None,
    tol: float = 1e-6,
    max_iter: int = 500,
    lora: str = "factors",
    sparse_limit: float | None = 3.0,
) -> MergeResult:
    """
    Merge by robust PCA.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        updates (`Sequence[ClientUpdate]`):
            What the clients uploaded.
        config ([`~peft.LoraConfig`], *optional*):
            The configuration of the adapter.
        beta (`float` or `str`, *optional*, defaults to `"adaptive"`):
            The factor of the sparse part. 1 is FedAvg. `"adaptive"` takes `1 / E` for each matrix, with
            `E = norm(mean(S)) / norm(mean(M))`, kept within 1 and `beta_max`.
        beta_max (`float`, *optional*, defaults to 5.0):
            The largest adaptive beta.
        lambda_ (`float`, *optional*):
            The weight of the sparse part in robust PCA. By default `1 / sqrt(max(n, C))` for each matrix.
        tol (`float`, *optional*, defaults to 1e-6):
            Robust PCA stops when its objective is at most this share above the optimum.
        max_iter (`int`, *optional*, defaults to 500):
            The largest number of iterations. A matrix that is still far from the optimum then (`100 * tol`) is averaged,
            with a warning.
        lora (`str`, *optional*, defaults to `"factors"`):
            What is decomposed of a LoRA adapter: `"factors"`, A and B each on its own as in the paper, or `"products"`,
            the products B A. These are whole `d_out x d_in` matrices, C of them for one module at a time, and what
            comes out is cut to the rank of the adapter.
        sparse_limit (`float`, *optional*, defaults to 3.0):
            How large a client's sparse part may be when it is amplified, as a multiple of the median over the clients.
            What is larger is scaled down, so that no client can use the amplification for itself. The plain mean has all
            of it. `None` is without a limit, as in the paper.

    Returns:
        [`MergeResult`]: The new state. The task head and biases are averaged. Under `matrices`, the diagnostics
        contain the figures of the decomposition of each matrix (a head of a core is called `name[i]`, a product has
        the name of its module): `beta`, `sparse_share` (E), `num_limited` (the number of clients whose sparse part is
        above `sparse_limit`), `sparsity` (the share of nonzero entries in S), `rank` (of L), `iterations`, `gap` (an
        upper bound on how far the objective is above the optimum), `converged`, and for a product `kept_energy`, the
        share of its squared norm that is left after truncation.

    Raises:
        ValueError: if an option is out of range.
    """
    options = _Options(beta, beta_max, lambda_, tol, max_iter, lora, sparse_limit)
    products = lora == "products"
    selected = [name for name in global_state if is_adapter_matrix(name) and not (products and is_lora_matrix(name))]
    state = mean_state(global_state, updates, leave_out=tuple(filter(is_adapter_matrix, global_state)))
    by_tensor = {name: split(name, global_state[name], updates) for name in selected}
    matrices = [matrix for group in by_tensor.values() for matrix in group]
    merged, figures = {}, {}
    for batch in _batches(matrices):
        for matrix, (tensor, matrix_figures) in zip(batch, _merge_batch(batch, options), strict=True):
            merged[matrix.name], figures[matrix.name] = tensor, matrix_figures
    figures = {matrix.name: figures[matrix.name] for matrix in matrices}
    state.update({name: join(name, [merged[matrix.name] for matrix in group]) for name, group in by_tensor.items()})
    if products:
        _merge_products(global_state, updates, config, options, state, figures)
    _warn_of_failures(figures, tol, max_iter)
    return MergeResult({name: state[name] for name in global_state}, {"matrices": figures})


def _merge_products(
    global_state: Mapping[str, torch.Tensor],
    updates: Sequence[ClientUpdate],
    config: LoraConfig | None,
    options: _Options,
    state: dict[str, torch.Tensor],
    figures: dict[str, dict[str, Any]],
) -> None:
    """Merge the products B A module by module and write them into `state` and `figures`."""
    for target in product_targets(global_state, config):

        def read(update: ClientUpdate, target=target) -> torch.Tensor:
            B, A = client_factors(target, update, global_state, config)
            return B @ A

        B, A = target.factors(global_state)
        [(merged, matrix_figures)] = _merge_batch([Matrix(target.module, B @ A, updates, read)], options)
        tensors, kept_energy = truncated_factors(target, merged, None, like=global_state)
        state.update(tensors)
        figures[target.module] = {**matrix_figures, "kept_energy": kept_energy}


def _warn_of_failures(matrices: Mapping[str, Mapping[str, Any]], tol: float, max_iter: int) -> None:
    failed = {name: figures for name, figures in matrices.items() if figures.get("gap", 0.0) > NEAR_OPTIMUM * tol}
    if failed:
        name, figures = next(iter(failed.items()))
        warnings.warn(
            f"fedrpca: robust PCA did not converge in {max_iter} iterations for {len(failed)} of {len(matrices)} matrices, "
            f"which were averaged instead, such as {name!r} (duality gap {figures['gap']:.1e}, rank of L "
            f"{figures['rank']}, {figures['sparsity']:.0%} of S not zero). "
            "Raise `max_iter` or `tol`."
        )


METHOD = MergeMethod(
    name="fedrpca",
    pretty_name="FedRPCA",
    summary="Robust PCA splits the updates into a common and a sparse part, and the sparse part is amplified.",
    reference="https://huggingface.co/papers/2506.01194",
    function=fedrpca,
    averages="the common and the sparse part of s*H of each head, or of A and B, apart, or of BA",
    exact="with beta = 1 as FedAvg",
    cost="layer by layer; some 200 products with C x C matrices",
    different_heads=True,
    decomposes={"lora": "products"},
    from_start=True,
)
