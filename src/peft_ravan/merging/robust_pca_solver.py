"""
Robust PCA: split a matrix into a low-rank part and a sparse part by principal component pursuit,

    min ||L||_* + lambda ||S||_1   subject to   L + S = M

(Candes et al., Robust Principal Component Analysis?, J. ACM 2011), solved by the inexact augmented Lagrangian method of
Lin, Chen and Ma, The Augmented Lagrange Multiplier Method for Exact Recovery of Corrupted Low-Rank Matrices, 2010,
algorithm 5, with over-relaxation (Boyd et al., Distributed Optimization and Statistical Learning via the Alternating
Direction Method of Multipliers, 2011, section 3.4.3).

With Y the dual variable and t the inverse of the penalty, an iteration is

    Z = M + t Y - S,                       L <- Z with its singular values lowered by t
    R = M + t Y - a L - (1 - a) (M - S),   t Y <- R clipped to [-lambda t, lambda t],   S <- R - t Y

Only Z's Gram matrix needs all rows at once, so one sweep over blocks of rows that fit in the processor's cache makes L, S
and the next Z, and adds up the Gram matrix of the latter. Memory holds M, L, S and Z, and an `n x n` matrix is never made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch


# The penalty 1/t starts at 1.25 / ||M||_2, as in Lin et al. They let it grow by half in every iteration, which can freeze
# L and S before they are optimal: on 1,000 x 50 matrices of rank 2 with 5 % of entries hit, the error of L was up to 2e-4
# then, against 6e-7 with a fifth. With over-relaxation growth by 1.4 is as accurate there, and where L is not recovered as
# near to the optimum within a third, in 0.6 times the iterations.
INITIAL_PENALTY = 1.25
PENALTY_GROWTH = 1.4
MAX_PENALTY_GROWTH = 1e7
RELAXATION = 1.6
# A warm start whose duality gap is below this share of the objective begins at a penalty so much larger. One that is
# further off is not used: under a large penalty the iteration could not get away from it any more.
WARM_START_GAP = 0.25
WARM_START_PENALTY = 16.0
# half a megabyte in float32: with the parts of M, L, S and Z it stays in a core's cache
CPU_BLOCK_ENTRIES = 2**17
# as many matrices are solved together: enough for all threads to have work, little enough for the cores' caches together
CPU_BATCH_ENTRIES = 2**20
# a block is small against its matrix, unless the matrix is so small that a block is little work
MIN_BLOCK_ENTRIES = 2**15
# launching kernels must cost little against running them
CUDA_BLOCK_ENTRIES = 2**23


@dataclass(frozen=True)
class RobustPCAInfo:
    """
    How a decomposition went. For a batch of matrices every field has one entry a matrix.

    Args:
        iterations (`torch.Tensor`): The number of iterations, int64.
        residual (`torch.Tensor`): `||M - L - S||_F / ||M||_F` at the end, float64.
        converged (`torch.Tensor`): Whether the residual came below the tolerance, bool.
        rank (`torch.Tensor`): The number of singular values of L above 1e-6 of the largest, int64.
        sparsity (`torch.Tensor`): The share of entries of S that are not zero, float64.
    """

    iterations: torch.Tensor
    residual: torch.Tensor
    converged: torch.Tensor
    rank: torch.Tensor
    sparsity: torch.Tensor


def _block_entries(device: torch.device) -> int:
    if device.type != "cpu":
        return CUDA_BLOCK_ENTRIES
    return CPU_BLOCK_ENTRIES * max(1, torch.get_num_threads() // 4)


def _per_matrix(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.to(like.dtype)[:, None, None]


class _Sweeps:
    """Work on matrices `[batch, n, C]` by blocks of rows."""

    def __init__(self, like: torch.Tensor):
        self.batch, self.n, self.C = like.shape
        entries = like.numel()  # several small matrices make one block by themselves
        if self.batch == 1:
            entries = min(_block_entries(like.device), max(MIN_BLOCK_ENTRIES, like.numel() // 4))
        self.rows = max(1, min(self.n, entries // (self.batch * self.C)))
        # the same memory serves as a block in the matrices' dtype and as half a block in float64
        self.memory = like.new_empty(self.batch * (self.rows + self.rows % 2) * self.C)

    def blocks(self) -> Iterator[slice]:
        for start in range(0, self.n, self.rows):
            yield slice(start, min(start + self.rows, self.n))

    def scratch(self, block: slice) -> torch.Tensor:
        rows = block.stop - block.start
        return self.memory[: self.batch * rows * self.C].view(self.batch, rows, self.C)

    def add_gram(self, gram: torch.Tensor, X: torch.Tensor) -> None:
        """Add `X^T X` of a block. In float64, because the Gram matrix squares the condition number."""
        if X.dtype == torch.float64:
            gram.add_(X.mT @ X)
            return
        memory = self.memory.view(torch.float64)
        for part in X.split((self.rows + 1) // 2, dim=1):
            part = memory[: part.numel()].view(part.shape).copy_(part)
            gram.add_(part.mT @ part)  # much faster than baddbmm_

    def new_gram(self) -> torch.Tensor:
        return self.memory.new_zeros(self.batch, self.C, self.C, dtype=torch.float64)

    def gram(self, X: torch.Tensor) -> torch.Tensor:
        gram = self.new_gram()
        for block in self.blocks():
            self.add_gram(gram, X[:, block])
        return gram


class _ThinProduct:
    """
    Multiply by `V diag(factors) V^T`, `[batch, C, C]`. `factors` `[batch, C]` are of singular values in ascending order,
    and most of the first are 0: then two products with few columns cost less than one.
    """

    def __init__(self, V: torch.Tensor, factors: torch.Tensor, dtype: torch.dtype):
        C = V.shape[-1]
        rank = int(torch.count_nonzero(factors.amax(dim=0)))
        right = (V[..., C - rank :] * factors[:, None, C - rank :]).mT
        self.is_thin = 4 * rank <= C
        self.first = V[..., C - rank :].to(dtype) if self.is_thin else (V[..., C - rank :] @ right).to(dtype)
        self.second = right.to(dtype) if self.is_thin else None

    def __call__(self, X: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if self.is_thin:
            return torch.bmm(X @ self.first, self.second, out=out)
        return torch.bmm(X, self.first, out=out)


def _singular_values(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values, ascending, `[batch, C]`, and right singular vectors, `[batch, C, C]`."""
    eigenvalues, V = torch.linalg.eigh(gram)
    return eigenvalues.clamp_(min=0).sqrt_(), V


class _Solver:
    """The iteration for a batch `[batch, n, C]` of matrices. Writes into `L` and `S`."""

    def __init__(self, M: torch.Tensor, L: torch.Tensor, S: torch.Tensor, lambda_: float):
        self.M, self.L, self.S, self.Z = M, L, S, torch.empty_like(M)
        self.lambda_ = lambda_
        self.sweeps = _Sweeps(M)
        self.gram = self.sweeps.gram(M)
        self.norm = self.gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1).sqrt()  # [batch]
        # a matrix of zeros is done after one iteration, whatever the penalty
        spectral_norm = torch.linalg.eigvalsh(self.gram)[..., -1].clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        self.threshold = spectral_norm / INITIAL_PENALTY  # t, [batch]
        self.min_threshold = self.threshold / MAX_PENALTY_GROWTH
        largest_entry = torch.linalg.vector_norm(M, ord=torch.inf, dim=(-2, -1)).double()
        self.dual_scale = torch.maximum(spectral_norm, largest_entry / lambda_)  # the first Y is M / dual_scale

    def start_cold(self) -> None:
        self.S.zero_()
        factor = 1 + self.threshold / self.dual_scale
        torch.mul(self.M, _per_matrix(factor, self.M), out=self.Z)
        self.gram *= factor[:, None, None].square()

    def start_warm(self, L: torch.Tensor, S: torch.Tensor) -> None:
        is_near = self._estimate_dual(L, S) <= WARM_START_GAP
        factor = (1 + self.threshold / self.dual_scale).to(self.M)
        self.threshold = torch.where(is_near, self.threshold / WARM_START_PENALTY, self.threshold)
        self.S.copy_(S)
        self.Z.mul_(_per_matrix(self.threshold, self.M)).add_(self.M).sub_(self.S)
        for index in (~is_near).nonzero().flatten().tolist():
            self.S[index].zero_()
            torch.mul(self.M[index], factor[index], out=self.Z[index])
        self.gram = self.sweeps.gram(self.Z)

    def _estimate_dual(self, L: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
        """
        Put an estimate of Y that goes with L and S into Z: at the optimum Y is `lambda sign(S)` where S is not zero, and
        has the singular vectors of L with singular values 1. Returns the duality gap over the objective, `[batch]`.
        """
        singular_values, V = _singular_values(self.sweeps.gram(L))
        inverse = torch.where(singular_values > 1e-4 * singular_values[:, -1:], 1 / singular_values, 0.0)
        polar = _ThinProduct(V, inverse, L.dtype)
        objective, product, gram = singular_values.sum(dim=-1), torch.zeros_like(self.norm), self.sweeps.new_gram()
        for block in self.sweeps.blocks():
            M, L_block, S_block, Y = self.M[:, block], L[:, block], S[:, block], self.Z[:, block]
            polar(L_block, out=Y).clamp_(-self.lambda_, self.lambda_)
            torch.sign(S_block, out=(signs := self.sweeps.scratch(block)))
            Y.mul_(1 - signs.abs()).add_(signs, alpha=self.lambda_)
            product += torch.mul(M, Y, out=signs).sum(dim=(-2, -1), dtype=torch.float64)
            objective += self.lambda_ * torch.sub(M, L_block, out=signs).abs_().sum(dim=(-2, -1), dtype=torch.float64)
            self.sweeps.add_gram(gram, Y)
        dual_norm = torch.linalg.eigvalsh(gram)[..., -1].clamp(min=1).sqrt()  # Y is feasible after division by it
        return 1 - product / dual_norm / objective

    def step(self) -> torch.Tensor:
        """One iteration. Returns the relative residuals, `[batch]`."""
        singular_values, V = _singular_values(self.gram)
        self.lowered = (singular_values - self.threshold[:, None]).clamp_(min=0)  # the singular values of L
        shrink = _ThinProduct(V, self.lowered / singular_values.clamp(min=torch.finfo(V.dtype).tiny), self.M.dtype)

        next_threshold = torch.maximum(self.threshold / PENALTY_GROWTH, self.min_threshold)
        bound = _per_matrix(self.lambda_ * self.threshold, self.M)
        lower_bound, ratio = -bound, _per_matrix(next_threshold / self.threshold, self.M)
        squared_gap = torch.zeros_like(self.norm)
        gram = self.gram.zero_()
        for block in self.sweeps.blocks():
            M, L, S, Z = (part[:, block] for part in (self.M, self.L, self.S, self.Z))
            shrink(Z, out=L)
            # R, in place of S
            S.mul_(2 - RELAXATION).add_(Z).add_(M, alpha=RELAXATION - 1).sub_(L, alpha=RELAXATION)
            torch.minimum(S, bound, out=Z)
            torch.maximum(Z, lower_bound, out=Z)  # t Y
            S.sub_(Z)
            gap = torch.sub(M, S, out=self.sweeps.scratch(block)).sub_(L)
            squared_gap.addcmul_(gap_norm := torch.linalg.vector_norm(gap.flatten(1), dim=-1).double(), gap_norm)
            torch.addcmul(M, Z, ratio, out=Z).sub_(S)
            self.sweeps.add_gram(gram, Z)
        self.threshold = next_threshold
        return squared_gap.sqrt_() / self.norm.clamp(min=torch.finfo(torch.float64).tiny)

    def rank(self) -> torch.Tensor:
        return (self.lowered > 1e-6 * self.lowered[:, -1:]).sum(dim=-1)

    def sparsity(self) -> torch.Tensor:
        # the "norm" of order 0 counts without a temporary
        counts = (torch.linalg.vector_norm(self.S[:, block], ord=0, dim=(-2, -1)) for block in self.sweeps.blocks())
        return sum(count.double() for count in counts) / self.S[0].numel()

    def keep(self, indices: torch.Tensor) -> None:
        """Go on with these matrices only, on copies."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value[indices])
        self.sweeps = _Sweeps(self.M)


def _solve(
    M: torch.Tensor,
    L: torch.Tensor,
    S: torch.Tensor,
    warm_start: tuple[torch.Tensor, torch.Tensor] | None,
    lambda_: float,
    tol: float,
    max_iter: int,
) -> RobustPCAInfo:
    """Solve a batch `[batch, n, C]` of matrices with n >= C, into L and S."""
    solver = _Solver(M, L, S, lambda_)
    if warm_start is None:
        solver.start_cold()
    else:
        solver.start_warm(*warm_start)
    dtypes = (torch.int64, torch.float64, torch.bool, torch.int64, torch.float64)
    info = RobustPCAInfo(*(torch.zeros(len(M), dtype=dtype, device=M.device) for dtype in dtypes))
    active = torch.arange(len(M), device=M.device)  # the matrices that have not converged
    for iteration in range(1, max_iter + 1):
        residual = solver.step()
        converged = residual <= tol
        done = converged if iteration < max_iter else torch.ones_like(converged)
        if not done.any():
            continue
        indices = active[done]
        info.iterations[indices] = torch.where(solver.norm[done] > 0, iteration, 0)
        info.residual[indices], info.converged[indices] = residual[done], converged[done]
        info.rank[indices], info.sparsity[indices] = solver.rank()[done], solver.sparsity()[done]
        if solver.L is not L:
            L[indices], S[indices] = solver.L[done], solver.S[done]
        if done.all():
            break
        active = active[~done]
        solver.keep(~done)
    return info


def solve_in_parts(
    M: torch.Tensor, warm_start: tuple[torch.Tensor, torch.Tensor] | None, *options: float
) -> tuple[torch.Tensor, torch.Tensor, RobustPCAInfo]:
    """Solve `[batch, n, C]`, some matrices at once."""
    L, S = torch.empty_like(M), torch.empty_like(M)
    batch_entries = CPU_BATCH_ENTRIES if M.device.type == "cpu" else CUDA_BLOCK_ENTRIES
    size = max(1, batch_entries // max(1, M[0].numel()))
    infos = []
    for start in range(0, len(M), size):
        part = slice(start, start + size)
        start_part = None if warm_start is None else (warm_start[0][part], warm_start[1][part])
        infos.append(_solve(M[part], L[part], S[part], start_part, *options))
    joined = {field.name: torch.cat([getattr(info, field.name) for info in infos]) for field in fields(RobustPCAInfo)}
    return L, S, RobustPCAInfo(**joined)
