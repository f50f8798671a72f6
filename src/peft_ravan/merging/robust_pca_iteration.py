"""
The iteration of robust PCA, for a batch of matrices: Douglas-Rachford splitting of

    min ||L||_* + lambda ||M - L||_1

(Eckstein and Bertsekas, On the Douglas-Rachford Splitting Method and the Proximal Point Algorithm for Maximal Monotone
Operators, Mathematical Programming 1992), which is the alternating direction method of multipliers with over-relaxation.
Its state Z tends to L + t Y, with Y the dual variable and 1/t the penalty. The penalty is constant: a growing one
would freeze the iteration before it reaches the optimum. With a between 1 and 2, an iteration is

    L = Z with its singular values lowered by t,   W = M - (2L - Z),   Z <- Z + a (L - Z + W clipped to [-lambda t, lambda t])

Here, everything is in units of lambda t: W is clipped to [-1, 1], and singular values are lowered by 1 / lambda.

Matrices are `[batch, C, n]`: with few clients C and many entries n, products are up to five times faster than with n
first. L is P Z, where the C x C matrix P is computed from the Gram matrix Z Z^T. Only the Gram matrix needs all
columns at once. So one sweep over blocks that fit in the processor's cache computes the next Z and accumulates the
change of the Gram matrix. The memory needed is M, Z, M in these units, and a few blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


RELAXATION = 1.8
# lambda t relative to the mean of |M|. From 0.2 to 0.4, the number of iterations is within a tenth of the minimum, for
# Gaussian, planted, common and heavy-tailed matrices of 64 x 4 to 12,288 x 50.
FIRST_UNIT = 0.3
# Where entries differ by orders of magnitude, t must change. If the movements of L and of t Y differ by more than the
# factor IMBALANCE, t changes by the root of their ratio, but at most by MAX_UNIT_CHANGE at once. The limit rises by
# its initial value every IMBALANCE_ITERATIONS iterations, so that the changes come to an end. Otherwise the iteration
# might not converge.
IMBALANCE = 5.0
IMBALANCE_ITERATIONS = 100
MAX_UNIT_CHANGE = 16.0
# Of all columns, one in SLOW_SHARE, those that move most, make SLOW_STEPS steps at once.
SLOW_SHARE = 16
SLOW_STEPS = 10
# blocks of Z and M and two temporaries fit in a core's cache
CPU_BLOCK_ENTRIES = 2**16
# launching kernels must be cheap compared to running them
CUDA_BLOCK_ENTRIES = 2**23
TINY = torch.finfo(torch.float64).tiny


def block_entries(device: torch.device) -> int:
    """The number of entries to work on at once."""
    return CPU_BLOCK_ENTRIES * torch.get_num_threads() if device.type == "cpu" else CUDA_BLOCK_ENTRIES


def _sum(X: torch.Tensor) -> torch.Tensor:
    """The sum over each matrix, `[batch]`."""
    return X.sum(dim=(-2, -1), dtype=torch.float64)


def _per_matrix(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.to(like.dtype)[:, None, None]


def _function_of(vectors: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (vectors * values[:, None]) @ vectors.mT


class Iteration:
    """
    The state of the iteration for a batch of matrices, and the operations on it.

    Args:
        M (`torch.Tensor`): The matrices, `[batch, C, n]`. They are not changed and need not be contiguous.
        Z (`torch.Tensor`): Memory for the state, with the shape of `M`.
        X (`torch.Tensor`): Memory for `M` in units, with the shape of `M`.
        lambda_ (`float`): The weight of the sparse part.
    """

    def __init__(self, M: torch.Tensor, Z: torch.Tensor, X: torch.Tensor, lambda_: float):
        self.M, self.Z, self.X, self.lambda_ = M, Z, X, lambda_
        self._make_temporaries()
        mean = sum(_sum(M[..., block].abs()) for block, *_ in self._blocks()) / M[0].numel()
        self.unit = torch.where(mean > 0, FIRST_UNIT * mean, 1.0)  # [batch]
        self.objective = torch.zeros_like(mean)
        self.bound = torch.zeros_like(mean)  # the highest lower bound of the optimum so far
        self._scale_M()
        self.Z.copy_(self.X)

    def _make_temporaries(self) -> None:
        batch, C, n = self.M.shape
        # a batch of several small matrices is one block
        self.length = n if batch > 1 else max(1, min(n, block_entries(self.M.device) // C))
        self.temporaries = self.Z.new_empty(2, batch, C, self.length)

    def _blocks(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Parts of the columns, each with two temporaries."""
        n = self.M.shape[-1]
        for start in range(0, n, self.length):
            block = slice(start, min(start + self.length, n))
            yield block, *self.temporaries[..., : block.stop - block.start]

    def _scale_M(self) -> None:
        torch.div(self.M, _per_matrix(self.unit, self.X), out=self.X)

    # ------------------------------------------------------------ P

    def measure(self) -> None:
        """Compute P and the Gram matrix of Z. The latter is in float64 because it squares the condition number."""
        self.gram = sum(_gram(self.Z[..., block]) for block, *_ in self._blocks())
        self.decompose()

    def decompose(self) -> None:
        """Compute P from the Gram matrix."""
        eigenvalues, self.vectors = torch.linalg.eigh(self.gram)
        singular_values = eigenvalues.clamp_(min=TINY).sqrt_()
        self.lowered = (singular_values - 1 / self.lambda_).clamp_(min=0)  # the singular values of L, ascending
        self._set_P(_function_of(self.vectors, self.lowered / singular_values))

    def approximate(self) -> None:
        """
        Compute P in a third of the time if the Gram matrix has changed little since it was decomposed. P is a function
        f of it. In a basis where it is almost diagonal, f multiplies its entries by the slopes of f between the two
        diagonal entries, up to second-order terms (Daleckii and Krein).
        """
        G = self.vectors.mT @ self.gram @ self.vectors
        diagonal = G.diagonal(dim1=-2, dim2=-1).clamp(min=TINY)
        limit = 1 / self.lambda_  # f(g) = 1 - limit / sqrt(g) above limit squared, and 0 below
        roots = diagonal.sqrt().clamp_(min=limit)
        first, second = roots[:, :, None], roots[:, None, :]
        slopes = limit / (first * second * (first + second))
        # between a diagonal entry above the limit and one below, f rises only on part of the way
        way = (diagonal[:, :, None] - diagonal[:, None, :]).abs_().clamp_(min=TINY)
        part = (first.square() - second.square()).abs_() / way
        G *= torch.where((first > limit) & (second > limit), slopes, slopes * part)
        G.diagonal(dim1=-2, dim2=-1).copy_(1 - limit / roots)
        self._set_P(self.vectors @ G @ self.vectors.mT)

    def _set_P(self, P: torch.Tensor) -> None:
        self.P = P.to(self.Z)
        identity = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
        self.reflection = torch.sub(identity, P, alpha=2).to(self.Z)

    # ------------------------------------------------------------ steps

    def step(self, hurry: bool) -> None:
        """
        One iteration.

        Args:
            hurry (`bool`): Whether to move the slowest columns ahead.
        """
        change, sizes = 0, self.Z.new_empty(len(self.Z), self.Z.shape[-1])
        for block, W, move in self._blocks():
            Z = self.Z[..., block]
            self._move(Z, self.X[..., block], W, move)
            if hurry:
                torch.sum(torch.mul(move, move, out=W), dim=1, out=sizes[:, block])
            Z.add_(move, alpha=RELAXATION / 2)
            # Z Z^T changes by twice the symmetric part of (new Z + old Z) / 2 times the transposed change of Z
            middle = torch.sub(Z, move, alpha=RELAXATION / 4, out=W)
            change = change + (middle @ move.mT).double()
        self.gram += (RELAXATION / 2) * (change + change.mT)
        if hurry:
            self._hurry(sizes)

    def _move(self, Z: torch.Tensor, X: torch.Tensor, W: torch.Tensor, out: torch.Tensor) -> None:
        """Twice `L - Z + W clipped` for some columns. `W` is a temporary."""
        torch.baddbmm(X, self.reflection, Z, out=W)
        torch.sub(X, Z, out=out).sub_(W)  # 2 (L - Z)
        out.add_(W.clamp_(-1, 1), alpha=2)

    def _hurry(self, sizes: torch.Tensor) -> None:
        """
        Move those columns ahead whose moves have the largest squared sizes, `[batch, n]`. While the others are almost
        right, some columns keep moving straight at a small, constant speed for hundreds of iterations. Moving them
        ahead saves a fifth of all iterations, and up to half for heavy-tailed matrices.
        """
        num_slow = sizes.shape[-1] // SLOW_SHARE
        if not num_slow:
            return
        columns = sizes.topk(num_slow, dim=-1).indices[:, None].expand(-1, self.Z.shape[1], -1)
        Z, X = self.Z.gather(-1, columns), self.X.gather(-1, columns)
        self.gram -= _gram(Z)
        W, move = torch.empty_like(Z), torch.empty_like(Z)
        for _ in range(SLOW_STEPS):
            self._move(Z, X, W, move)
            Z.add_(move, alpha=RELAXATION / 2)
        self.gram += _gram(Z)
        self.Z.scatter_(-1, columns, Z)

    def balance(self, is_far: torch.Tensor, iteration: int) -> None:
        """Change the penalty of those matrices, `[batch]`, whose L moves much more or much less than t Y."""
        limit = IMBALANCE * (1 + iteration / IMBALANCE_ITERATIONS)
        inside, outside = torch.zeros_like(self.unit), torch.zeros_like(self.unit)
        for block, W, move in self._blocks():
            self._move(self.Z[..., block], self.X[..., block], W, move)
            torch.bmm(self.P, move, out=W)
            inside += _sum(W.square())
            outside += _sum(move.sub_(W).square_())
        ratio = (inside.clamp(min=TINY) / outside.clamp(min=TINY)).sqrt()
        is_far = is_far & torch.maximum(ratio, 1 / ratio).gt(limit)
        if not is_far.any():
            return
        factor = torch.where(is_far, ratio.sqrt().clamp(1 / MAX_UNIT_CHANGE, MAX_UNIT_CHANGE), 1.0)
        # in the new units, L becomes L / factor, and t Y stays the same
        for block, L, _ in self._blocks():
            Z = self.Z[..., block]
            Z.addcmul_(torch.bmm(self.P, Z, out=L), _per_matrix(1 / factor - 1, Z))
        self.unit = self.unit * factor
        self._scale_M()
        self.measure()

    # ------------------------------------------------------------ results

    def certify(self) -> torch.Tensor:
        """
        Compute the objective of L and M - L, and a lower bound of the optimum: <Y, M> for any Y with entries in
        [-lambda, lambda] and a spectral norm of at most 1, such as (Z - L) / t, clipped and divided by its norm. P
        must belong to the current Z.

        Returns:
            `torch.Tensor`: The duality gap relative to the objective, `[batch]`.
        """
        product, norm_S, gram = torch.zeros_like(self.unit), torch.zeros_like(self.unit), 0
        for block, L, Y in self._blocks():
            Z, X = self.Z[..., block], self.X[..., block]
            torch.bmm(self.P, Z, out=L)
            torch.sub(Z, L, out=Y).clamp_(-1, 1)
            norm_S += _sum(L.sub_(X).abs_())
            product += _sum(torch.mul(X, Y, out=L))
            gram = gram + _gram(Y)
        norm_Y = self.lambda_ * torch.linalg.eigvalsh(gram)[:, -1].clamp(min=0).sqrt()
        self.objective = self.unit * (self.lowered.sum(dim=-1) + self.lambda_ * norm_S)
        self.bound = torch.maximum(self.bound, self.unit * self.lambda_ * product / norm_Y.clamp(min=1))
        gap = 1 - self.bound / self.objective.clamp(min=TINY)
        return torch.where(self.objective > 0, gap.clamp(min=0), 0.0)

    def rank(self) -> torch.Tensor:
        return (self.lowered > 1e-6 * self.lowered[:, -1:]).sum(dim=-1)

    def sparsity(self) -> torch.Tensor:
        """The share of the entries that are clipped, which are those that are not 0 in S."""
        counts = 0
        for block, W, _ in self._blocks():
            torch.baddbmm(self.X[..., block], self.reflection, self.Z[..., block], out=W)
            counts = counts + _sum(W.abs_() > 1)
        return counts / self.M[0].numel()

    def finish(self, index: int) -> None:
        """Overwrite Z of one matrix with L, and X with S."""
        P, unit = self.P[index], self.unit[index].to(self.Z)
        for block, L, _ in self._blocks():
            torch.mm(P, self.Z[index, :, block], out=L[index])
            L = torch.mul(L[index], unit, out=self.Z[index, :, block])
            torch.sub(self.M[index, :, block], L, out=self.X[index, :, block])

    def keep(self, is_kept: torch.Tensor, dtype: torch.dtype) -> None:
        """Continue with only these matrices, as copies in this dtype."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor) and name != "temporaries":
                setattr(self, name, value[is_kept])
        if dtype != self.Z.dtype:
            self.M, self.Z, self.X = self.M.to(dtype), self.Z.to(dtype), self.X.to(dtype)
            self._scale_M()
        self._make_temporaries()


def _gram(X: torch.Tensor) -> torch.Tensor:
    """`X X^T` in float64."""
    X = X.double()
    return X @ X.mT
