"""
Robust PCA: split a matrix into a low-rank part and a sparse part by principal component pursuit,

    min ||L||_* + lambda ||S||_1   subject to   L + S = M

(Candes et al., Robust Principal Component Analysis?, J. ACM 2011). The iteration is in `robust_pca_solver.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch

from .robust_pca_solver import RobustPCAInfo, solve_in_parts


# rounding lets a float32 residual fall to some 1e-7, with a margin left for matrices of large dynamic range
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-7}


def _check(
    M: torch.Tensor, warm_start: tuple[torch.Tensor, torch.Tensor] | None, options: dict[str, float | None]
) -> None:
    if M.dim() < 2 or not M.is_floating_point():
        raise ValueError(
            f"robust_pca needs a floating point tensor of 2 or more dimensions, got {M.dtype} of {tuple(M.shape)}."
        )
    if 0 in M.shape:
        raise ValueError(f"robust_pca needs a matrix with entries, got the shape {tuple(M.shape)}.")
    for name, value in options.items():
        if value is not None and not value > 0:
            raise ValueError(f"robust_pca needs {name} > 0, got {value!r}.")
    for name, tensor in zip(("L", "S"), warm_start or (), strict=False):
        if tensor.shape != M.shape:
            raise ValueError(
                f"robust_pca needs a warm start of the shape of M, {tuple(M.shape)}, but its {name} has "
                f"{tuple(tensor.shape)}. Start without it when the matrix has changed its shape."
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"robust_pca needs finite entries, but {name} of the warm start has others.")


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    # TF32 or autocast, which training may have set, would round the products of an iteration far above the tolerance
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
    tol: float | None = None,
    max_iter: int = 500,
    warm_start: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, RobustPCAInfo]:
    """
    Split matrices into a low-rank and a sparse part.

    The work is done in the dtype of `M`, or in float32 for smaller ones, on its device. Beside `M`, L and S a matrix
    needs memory for one more of its size and a block.

    Args:
        M (`torch.Tensor`):
            A matrix, `[n, C]`, or a batch of them, `[..., n, C]`. Tall matrices are cheap: an iteration costs two
            products with a `C x C` matrix, and an `n x n` matrix is never made.
        lambda_ (`float`, *optional*):
            The weight of the sparse part. By default `1 / sqrt(max(n, C))`, as Candes et al. prove for exact recovery.
        tol (`float`, *optional*):
            Stop when `||M - L - S||_F <= tol * ||M||_F`. By default 1e-7 in float64 and 1e-6 in float32, where rounding
            does not let every matrix come much below.
        max_iter (`int`, *optional*, defaults to 500):
            The largest number of iterations.
        warm_start (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
            L and S of a similar matrix, or batch of them, of the shape of `M`. They save iterations when `M` has changed
            little; when their duality gap for `M` is large they are not used.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, RobustPCAInfo]`: L and S with the shape and dtype of `M`, and how it went.

    Raises:
        ValueError: if `M` is not a finite floating point matrix, if an option is not positive, or if the warm start does
            not have the shape of `M`.
    """
    _check(M, warm_start, {"lambda_": lambda_, "tol": tol, "max_iter": max_iter})
    dtype = M.dtype if M.dtype in TOLERANCES else torch.float32
    lambda_ = max(M.shape[-2:]) ** -0.5 if lambda_ is None else lambda_
    tol = TOLERANCES[dtype] if tol is None else tol
    is_wide = M.shape[-2] < M.shape[-1]

    def prepared(X: torch.Tensor) -> torch.Tensor:
        X = X.to(M.device, dtype)
        return (X.mT if is_wide else X).reshape(-1, max(M.shape[-2:]), min(M.shape[-2:])).contiguous()

    def restored(X: torch.Tensor) -> torch.Tensor:
        shape = (*M.shape[:-2], *X.shape[-2:])
        return (X.reshape(shape).mT if is_wide else X.reshape(shape)).to(M.dtype)

    batch = prepared(M)  # [batch, n, C]
    largest = torch.linalg.vector_norm(batch, ord=torch.inf, dim=(-2, -1))  # [batch]
    if not torch.isfinite(largest).all():
        raise ValueError("robust_pca needs finite entries, but M has NaN or infinite ones.")
    start = None if warm_start is None else (prepared(warm_start[0]), prepared(warm_start[1]))
    scale = _safe_scale(largest)
    if scale is not None:
        batch = batch / scale
        start = None if start is None else (start[0] / scale, start[1] / scale)
    with _full_precision(M.device):
        L, S, info = solve_in_parts(batch, start, lambda_, tol, max_iter)
    if scale is not None:
        L, S = L.mul_(scale), S.mul_(scale)
    info = RobustPCAInfo(**{field.name: getattr(info, field.name).reshape(M.shape[:-2]) for field in fields(info)})
    return restored(L), restored(S), info


def _safe_scale(largest: torch.Tensor) -> torch.Tensor | None:
    """What to divide matrices by, given their largest entries, so that squares neither vanish nor overflow, if needed."""
    limit = torch.finfo(largest.dtype).max ** 0.25
    is_extreme = (largest > 0) & ((largest > limit) | (largest < 1 / limit))
    return torch.where(is_extreme, largest, 1)[:, None, None] if is_extreme.any() else None
