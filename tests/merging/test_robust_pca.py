"""Robust PCA on planted matrices, where the right answer is known."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from peft_ravan.merging import robust_pca


def planted(n: int, C: int, rank: int, share: float, seed: int, size: float = 1.0):
    """A low-rank matrix, and a sparse one with entries of about `size` times its own."""
    generator = torch.Generator().manual_seed(seed)
    L = torch.randn(n, rank, generator=generator) @ torch.randn(rank, C, generator=generator)
    hit = torch.rand(n, C, generator=generator) < share
    S = torch.where(hit, size * torch.randn(n, C, generator=generator), torch.zeros(n, C))
    return L, S


def relative_error(found: torch.Tensor, planted: torch.Tensor) -> float:
    return ((found - planted).norm() / planted.norm()).item()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1.0, 10.0])
def test_recovers_planted_parts(size, seed):
    L, S = planted(4000, 50, rank=2, share=0.05, size=size, seed=seed)
    found_L, found_S, info = robust_pca(L + S)
    assert relative_error(found_L, L) < 1e-3
    assert relative_error(found_S, S) < 1e-3
    assert info.rank == 2 and info.converged
    assert info.sparsity.item() == pytest.approx(0.05, abs=0.005)


def test_with_20_columns_it_gives_what_the_method_gives():
    # few columns: principal component pursuit itself is a few percent off, however well it is solved
    L, S = planted(4000, 20, rank=2, share=0.05, seed=0)
    found_L, _, info = robust_pca(L + S)
    assert info.converged and relative_error(found_L, L) < 0.06


def test_the_solution_is_optimal():
    # optimality of min ||L||_* + lambda ||S||_1: no small exchange between L and S lowers the objective
    L, S = planted(300, 12, rank=1, share=0.1, seed=3)
    M = (L + S).double()
    lambda_ = 300**-0.5
    found_L, found_S, _ = robust_pca(M)

    def objective(delta):
        return torch.linalg.matrix_norm(found_L + delta, "nuc") + lambda_ * (found_S - delta).abs().sum()

    best = objective(torch.zeros_like(M))
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        direction = torch.randn(M.shape, generator=generator, dtype=torch.float64)
        assert objective(1e-3 * direction) >= best - 1e-6 * best
    assert objective(L.double() - found_L) >= best - 1e-6 * best  # not even the planted parts


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 60), C=st.integers(1, 12), seed=st.integers(0, 2**16))
def test_parts_add_up(n, C, seed):
    M = torch.randn(n, C, generator=torch.Generator().manual_seed(seed))
    L, S, info = robust_pca(M)
    assert info.converged and info.residual < 1e-7
    torch.testing.assert_close(L + S, M, atol=1e-5, rtol=1e-5)


def test_a_batch_gives_what_each_matrix_gives():
    matrices = [sum(planted(200, 10, rank, 0.1, seed=rank)) for rank in (1, 2, 3)]
    L, S, info = robust_pca(torch.stack(matrices))
    for index, matrix in enumerate(matrices):
        alone_L, alone_S, alone_info = robust_pca(matrix)
        torch.testing.assert_close(L[index], alone_L)
        torch.testing.assert_close(S[index], alone_S)
        assert info.iterations[index] == alone_info.iterations


def test_scale_and_transposition_carry_over():
    M = sum(planted(200, 10, 2, 0.1, seed=0)).double()
    L, S, _ = robust_pca(M)
    torch.testing.assert_close(robust_pca(1e-6 * M)[0], 1e-6 * L)
    torch.testing.assert_close(robust_pca(M.T)[1], S.T)


def test_zeros():
    L, S, info = robust_pca(torch.zeros(2, 30, 5))
    assert not L.any() and not S.any()
    assert info.converged.all() and not info.iterations.any() and not info.rank.any()


def test_a_column_of_zeros_stays():
    M = sum(planted(500, 10, 1, 0.05, seed=0))
    M[:, 4] = 0
    L, S, info = robust_pca(M)
    assert info.converged
    torch.testing.assert_close(L[:, 4] + S[:, 4], torch.zeros(500), atol=1e-5, rtol=0)


def test_identical_columns_are_low_rank():
    column = torch.randn(400, 1)
    L, S, info = robust_pca(column.expand(400, 20))
    assert info.rank == 1
    assert S.norm() < 1e-5 * L.norm()


def test_it_says_when_it_does_not_converge():
    *_, info = robust_pca(sum(planted(300, 10, 2, 0.1, seed=0)), max_iter=3)
    assert not info.converged and info.iterations == 3 and info.residual > 1e-7


@pytest.mark.parametrize(
    "M, options, message",
    [
        (torch.ones(3), {}, "2 or more dimensions, got torch.float32 of .3,."),
        (torch.ones(3, 3, dtype=torch.int64), {}, "floating point tensor"),
        (torch.full((3, 3), torch.nan), {}, "NaN or infinite"),
        (torch.ones(3, 3), {"lambda_": 0.0}, "lambda_ > 0, got 0.0"),
        (torch.ones(3, 3), {"tol": -1.0}, "tol > 0, got -1.0"),
        (torch.ones(3, 3), {"max_iter": 0}, "max_iter > 0, got 0"),
    ],
)
def test_errors(M, options, message):
    with pytest.raises(ValueError, match=message):
        robust_pca(M, **options)
