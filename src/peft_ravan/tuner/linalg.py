"""Truncated singular value decompositions that avoid forming large matrices."""

from __future__ import annotations

import torch


# Halko, Martinsson and Tropp, Finding Structure with Randomness, 2011: with a few extra columns and a few power
# iterations, the range finder is as good as the full decomposition for all practical spectra
OVERSAMPLING = 10
POWER_ITERATIONS = 4
# below this size the full decomposition takes milliseconds
SMALL_SIZE = 256


def truncated_svd(
    matrix: torch.Tensor, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The largest singular values of a matrix and their directions. If `rank` is small compared to the matrix, a
    randomised range finder replaces the full decomposition.

    Args:
        matrix (`torch.Tensor`): `[d_out, d_in]`.
        rank (`int`): The number of singular values, at most `min(d_out, d_in)`.
        generator (`torch.Generator`): The random generator for the range finder, on the CPU.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: U `[d_out, rank]`, the singular values `[rank]` in descending
        order, and V transposed `[rank, d_in]`, in float64 on the device of the matrix. The sign of each pair of
        directions is chosen such that the largest entry of the column of U is positive.
    """
    matrix = matrix.double()
    num_columns = rank + OVERSAMPLING
    if min(matrix.shape) <= max(SMALL_SIZE, 2 * num_columns):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        probe = torch.randn(matrix.shape[1], num_columns, generator=generator, dtype=torch.float64).to(matrix.device)
        Q = torch.linalg.qr(matrix @ probe).Q  # [d_out, num_columns]
        for _ in range(POWER_ITERATIONS):
            Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ Q).Q).Q
        U, S, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
        U = Q @ U
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    # an SVD does not determine the signs, but everybody has to get the same bases
    signs = torch.sign(U.gather(0, U.abs().argmax(dim=0, keepdim=True)))  # [1, rank]
    signs = torch.where(signs == 0, 1.0, signs)
    return U * signs, S, Vh * signs.T


def svd_of_product(
    left: torch.Tensor, right: torch.Tensor | None, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """
    The largest singular values of a product and their directions, computed from the factors. The product is formed
    only if it is smaller than the factors.

    Args:
        left (`torch.Tensor`): `[d_out, k]`, or the whole product `[d_out, d_in]`.
        right (`torch.Tensor`, *optional*): `[k, d_in]`, or `None` if `left` is the whole product.
        rank (`int`): The largest number of singular values to return.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]`: U `[d_out, q]`, the singular values `[q]` in descending
        order and V transposed `[q, d_in]` in float64, with q <= rank, and their share of the squared Frobenius norm of
        the product (1 for a product of zeros).
    """
    generator = torch.Generator().manual_seed(0)
    left = left.double()
    right = None if right is None else right.double()
    if right is not None and left.shape[1] < min(left.shape[0], right.shape[1]):
        Q_left, R_left = torch.linalg.qr(left)  # [d_out, k], [k, k]
        Q_right, R_right = torch.linalg.qr(right.T)
        core = R_left @ R_right.T
        U, S, Vh = truncated_svd(core, min(rank, len(core)), generator)
        U, Vh = Q_left @ U, Vh @ Q_right.T
    else:
        core = left if right is None else left @ right
        U, S, Vh = truncated_svd(core, min(rank, *core.shape), generator)
    energy = core.square().sum().item()
    return U, S, Vh, S.square().sum().item() / energy if energy > 0 else 1.0


def pseudo_inverse(gram: torch.Tensor) -> torch.Tensor:
    """
    Args:
        gram (`torch.Tensor`): A Gram matrix in float64, `[n, n]`.

    Returns:
        `torch.Tensor`: Its pseudo-inverse. Eigenvalues below 1e-12 of the largest are treated as rounding errors.
    """
    return torch.linalg.pinv(gram, rtol=1e-12, hermitian=True)


def squared_norm_of_product(left: torch.Tensor, right: torch.Tensor) -> float:
    """
    The squared Frobenius norm of a product, computed from k x k matrices.

    Args:
        left (`torch.Tensor`): `[d_out, k]`.
        right (`torch.Tensor`): `[k, d_in]`.

    Returns:
        `float`: The squared norm. It is 0 if rounding would make it negative.
    """
    return ((left.T @ left) * (right @ right.T)).sum().clamp(min=0).item()


def svd_of_heads(
    basis_A: torch.Tensor, basis_B: torch.Tensor, products: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The singular value decomposition of `sum_i B_i P_i A_i`, computed from matrices of the size of the heads. If the
    bases are orthonormal up to a scale, the decompositions of all P_i together give that of the sum.

    Args:
        basis_A (`torch.Tensor`): The stacked A, `[h*r, d_in]`.
        basis_B (`torch.Tensor`): The stacked B, `[d_out, h*r]`.
        products (`torch.Tensor`): P_i = s_i H_i, `[h, r, r]`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: U `[d_out, q]`, the singular values `[q]` in descending order and
        V transposed `[q, d_in]` in float64, with q = min(h*r, d_out, d_in).
    """
    basis_A, basis_B, products = basis_A.double(), basis_B.double(), products.double()
    num_heads, r, _ = products.shape
    basis_A, scale_A = _normalised(basis_A)
    basis_B, scale_B = _normalised(basis_B.T)
    basis_B, products = basis_B.T, products * (scale_A * scale_B)
    if not (_has_orthonormal_rows(basis_A) and _has_orthonormal_rows(basis_B.T)):
        left = torch.cat([B_i @ P_i for B_i, P_i in zip(basis_B.split(r, dim=1), products, strict=True)], dim=1)
        U, S, Vh, _ = svd_of_product(left, basis_A, rank=num_heads * r)
        return U, S, Vh
    U, S, Vh = torch.linalg.svd(products)  # [h, r, r], [h, r], [h, r, r]
    order = S.flatten().argsort(descending=True, stable=True)
    U = torch.cat([B_i @ U_i for B_i, U_i in zip(basis_B.split(r, dim=1), U, strict=True)], dim=1)
    Vh = torch.cat([Vh_i @ A_i for A_i, Vh_i in zip(basis_A.split(r), Vh, strict=True)])
    return U[:, order], S.flatten()[order], Vh[order]


def _normalised(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows divided by their mean norm, and that norm. Bases may have a scale, see `bases_scale`."""
    scale = rows.norm(dim=1).mean()
    return (rows / scale, scale) if scale > 0 else (rows, torch.ones_like(scale))


def _has_orthonormal_rows(matrix: torch.Tensor) -> bool:
    # bases are stored in float32 or less; rounded to half precision, they do not count as orthonormal
    gram = matrix @ matrix.T
    return len(matrix) <= matrix.shape[1] and bool((gram - torch.eye(len(gram)).to(gram)).abs().max() < 1e-5)
