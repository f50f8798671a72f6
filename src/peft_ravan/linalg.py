"""Truncated singular value decompositions that never make more than they need."""

from __future__ import annotations

import torch


# Halko, Martinsson and Tropp, Finding Structure with Randomness, 2011: a few columns more than asked for, and a few
# power iterations, make the range finder as good as the decomposition itself for all practical spectra
OVERSAMPLING = 10
POWER_ITERATIONS = 4
# below this size the full decomposition takes milliseconds
SMALL_SIZE = 256


def truncated_svd(
    matrix: torch.Tensor, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The largest singular values of a matrix and their directions. Where `rank` is small against the matrix, a randomised
    range finder takes the place of the full decomposition.

    Args:
        matrix (`torch.Tensor`): `[d_out, d_in]`.
        rank (`int`): The number of singular values, at most `min(d_out, d_in)`.
        generator (`torch.Generator`): The random numbers of the range finder, on the CPU.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: U `[d_out, rank]`, the singular values `[rank]` in descending
        order, and V transposed `[rank, d_in]`, in float64 on the device of the matrix. The sign of each pair of
        directions is such that the largest entry of the column of U is positive.
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
    # an SVD leaves the signs open, and everybody has to come to the same bases
    signs = torch.sign(U.gather(0, U.abs().argmax(dim=0, keepdim=True)))  # [1, rank]
    signs = torch.where(signs == 0, 1.0, signs)
    return U * signs, S, Vh * signs.T
