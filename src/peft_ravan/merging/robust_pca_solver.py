"""
Robust PCA of batches of matrices: when to check for convergence, and which matrices are done. The iteration is in
`robust_pca_iteration.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from .robust_pca_iteration import Iteration, block_entries


# A look costs about as much as two iterations. It recomputes exactly what is approximated in between.
ITERATIONS_PER_LOOK = 10
FIRST_HURRY = 20
HURRY_REST = 200
# in the first PATIENT_ITERATIONS, the penalty changes only if the gap is above FAR_FROM_TOLERANCE times the tolerance
PATIENT_ITERATIONS = 200
FAR_FROM_TOLERANCE = 20
# matrices continue in float64 if a gap does not shrink to the share PROGRESS within ITERATIONS_PER_PROGRESS iterations
ITERATIONS_PER_PROGRESS = 50
PROGRESS = 0.7
# The Gram matrix of many columns is decomposed in all early iterations, and later only once every
# ITERATIONS_PER_DECOMPOSITION iterations. For few columns it is always decomposed, because approximating the
# decomposition would take as long.
FEW_COLUMNS = 32
EARLY_ITERATIONS = 20
ITERATIONS_PER_DECOMPOSITION = 5
# small matrices are solved together up to this many blocks
PART_BLOCKS = 2


@dataclass(frozen=True)
class RobustPCAInfo:
    """
    The figures of a decomposition. For a batch of matrices, every field has one entry per matrix.

    Args:
        iterations (`torch.Tensor`): The number of iterations, int64.
        gap (`torch.Tensor`):
            The duality gap relative to the objective, float64. The objective of L and S exceeds the optimum by at most
            this share of the objective.
        converged (`torch.Tensor`): Whether the gap reached the tolerance, bool.
        rank (`torch.Tensor`): The number of singular values of L above 1e-6 of the largest, int64.
        sparsity (`torch.Tensor`):
            The share of nonzero entries in S, float64. The other entries are 0 up to the accuracy of the iteration.
    """

    iterations: torch.Tensor
    gap: torch.Tensor
    converged: torch.Tensor
    rank: torch.Tensor
    sparsity: torch.Tensor


class _Batch:
    """A batch `[batch, C, n]` of matrices with n >= C, to be solved into L and S."""

    def __init__(
        self,
        M: torch.Tensor,
        L: torch.Tensor,
        S: torch.Tensor,
        lambda_: float,
        tol: float,
        max_iter: int,
    ):
        self.L, self.S, self.tol, self.max_iter = L, S, tol, max_iter
        self.state = Iteration(M, L, S, lambda_)
        dtypes = (torch.int64, torch.float64, torch.bool, torch.int64, torch.float64)
        self.info = RobustPCAInfo(*(torch.zeros(len(M), dtype=dtype, device=M.device) for dtype in dtypes))
        self.active = torch.arange(len(M), device=M.device)  # the matrices that are still in the state
        self.last_gap = torch.full_like(self.info.gap, torch.inf)

    def solve(self) -> RobustPCAInfo:
        state = self.state
        has_few_columns = state.Z.shape[-2] <= FEW_COLUMNS
        state.measure()
        for iteration in range(1, self.max_iter + 1):
            looks = iteration % ITERATIONS_PER_LOOK == 0 or iteration == self.max_iter
            if looks:
                self._look(iteration)
                if not len(self.active):
                    break
            elif has_few_columns or iteration <= EARLY_ITERATIONS or iteration % ITERATIONS_PER_DECOMPOSITION == 0:
                state.decompose()
            else:
                state.approximate()
            rest = 1 + iteration // HURRY_REST
            state.step(hurry=looks and iteration >= FIRST_HURRY and (iteration // 10 - 1) % (2 + rest) < 2)
        return self.info

    def _look(self, iteration: int) -> None:
        """Check which matrices are done, and how to continue with the others."""
        state = self.state
        state.measure()
        gap = state.certify()
        done = gap <= self.tol if iteration < self.max_iter else torch.ones_like(gap, dtype=torch.bool)
        if done.any():
            self._finish(done, gap, iteration)
            gap, self.last_gap = gap[~done], self.last_gap[~done]
        if not len(self.active):
            return
        if iteration % ITERATIONS_PER_PROGRESS == 0:
            is_stuck = gap > PROGRESS * self.last_gap
            self.last_gap = gap
            if is_stuck.any() and state.Z.dtype != torch.float64:
                state.keep(slice(None), torch.float64)
                state.measure()
            is_far = gap > FAR_FROM_TOLERANCE * self.tol
            state.balance(is_far if iteration <= PATIENT_ITERATIONS else torch.ones_like(is_far), iteration)

    def _finish(self, done: torch.Tensor, gap: torch.Tensor, iteration: int) -> None:
        state, info, indices = self.state, self.info, self.active[done]
        info.iterations[indices] = torch.where(state.objective[done] > 0, iteration, 0)
        info.gap[indices], info.converged[indices] = gap[done], gap[done] <= self.tol
        info.rank[indices], info.sparsity[indices] = state.rank()[done], state.sparsity()[done]
        for index in done.nonzero().flatten().tolist():
            state.finish(index)
        if state.Z is not self.L:
            self.L[indices], self.S[indices] = state.Z[done].to(self.L), state.X[done].to(self.S)
        self.active = self.active[~done]
        if len(self.active):
            state.keep(~done, state.Z.dtype)


def solve_in_parts(
    M: torch.Tensor, lambda_: float, tol: float, max_iter: int
) -> tuple[torch.Tensor, torch.Tensor, RobustPCAInfo]:
    """Solve `[batch, C, n]`, a few matrices at a time."""
    # L and S serve as memory for the iteration until they are written
    L, S = (torch.empty(M.shape, dtype=M.dtype, device=M.device) for _ in range(2))
    size = max(1, PART_BLOCKS * block_entries(M.device) // max(1, M[0].numel()))
    infos = []
    for start in range(0, len(M), size):
        part = slice(start, start + size)
        infos.append(_Batch(M[part], L[part], S[part], lambda_, tol, max_iter).solve())
    joined = {field.name: torch.cat([getattr(info, field.name) for info in infos]) for field in fields(RobustPCAInfo)}
    return L, S, RobustPCAInfo(**joined)
