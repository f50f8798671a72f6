"""
Robust PCA: split a matrix into a low-rank part and a sparse part by principal component pursuit,

    min ||L||_* + lambda ||S||_1   subject to   L + S = M

(Candes et al., Robust Principal Component Analysis?, J. ACM 2011). The iteration is in `robust_pca_iteration.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch

from .robust_pca_solver import RobustPCAInfo, solve_in_parts


def _check(M: torch.Tensor, options: dict[str, float | None]) -> None:
    if M.dim() < 2 or not M.is_floating_point():
        raise ValueError(
            f"robust_pca needs a floating point tensor of 2 or more dimensions, got {M.dtype} of {tuple(M.shape)}."
        )
    if 0 in M.shape:
        raise ValueError(f"robust_pca needs a matrix with entries, got the shape {tuple(M.shape)}.")
    for name, value in options.items():
        if value is not None and not value > 0:
            raise ValueError(f"robust_pca needs {name} > 0, got {value!r}.")


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    # with TF32 or autocast, which training may have enabled, rounding errors would be far above the tolerance
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@torch.no_grad()
def robust_pca(
    M: torch.Tensor,
    lambda_: float | None = None,
    tol: float = 1e-6,
    max_iter: int = 2000,
) -> tuple[torch.Tensor, torch.Tensor, RobustPCAInfo]:
    """
    Split matrices into a low-rank and a sparse part.

    L and S add up to `M`, and a duality gap certifies how far their objective is from the optimum at most. In addition
    to `M`, L and S, a matrix needs memory for a few blocks. The computation runs in float32, or in float64 if `M` is
    float64 or rounding prevents further progress. The latter temporarily takes six times the memory of a float32 `M`.

    Args:
        M (`torch.Tensor`):
            A matrix, `[n, C]`, or a batch of them, `[..., n, C]`. Tall matrices are cheap: an iteration costs two
            products with a `C x C` matrix, and no `n x n` matrix is ever formed.
        lambda_ (`float`, *optional*):
            The weight of the sparse part. By default `1 / sqrt(max(n, C))`, for which Candes et al. prove exact
            recovery.
        tol (`float`, *optional*, defaults to 1e-6):
            Stop when the objective is certified to be at most this share above the optimum.
        max_iter (`int`, *optional*, defaults to 2000):
            The largest number of iterations. Most matrices take about 100.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, RobustPCAInfo]`: L and S with the shape and dtype of `M`, and the figures of
        the decomposition.

    Raises:
        ValueError: if `M` is not a finite floating point matrix, or if an option is not positive.
    """
    _check(M, {"lambda_": lambda_, "tol": tol, "max_iter": max_iter})
    dtype = M.dtype if M.dtype == torch.float64 else torch.float32
    lambda_ = max(M.shape[-2:]) ** -0.5 if lambda_ is None else lambda_
    is_tall = M.shape[-2] >= M.shape[-1]

    def restored(X: torch.Tensor) -> torch.Tensor:
        X = X.reshape(*M.shape[:-2], *X.shape[-2:])
        return (X.mT if is_tall else X).to(M.dtype)

    batch = M.to(dtype)
    batch = batch.mT if is_tall else batch
    batch = batch.reshape(-1, *batch.shape[-2:])  # [batch, C, n]
    if not torch.isfinite(batch).all():
        raise ValueError("robust_pca needs finite entries, but M has NaN or infinite ones.")
    with _full_precision(M.device):
        L, S, info = solve_in_parts(batch, lambda_, tol, max_iter)
    info = RobustPCAInfo(**{field.name: getattr(info, field.name).reshape(M.shape[:-2]) for field in fields(info)})
    return restored(L), restored(S), info
