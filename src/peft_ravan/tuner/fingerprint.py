"""
Fingerprints of bases: a few numbers for each head that show whether two adapters have the same bases.

Bases come from a QR or singular value decomposition, whose last bits depend on the machine, and they may be stored in
half precision. A hash would change with every bit. So a fingerprint consists of a few weighted sums of the entries,
which are compared with a tolerance. The weights are the fractional parts of multiples of square roots of primes. They
are not torch's random numbers, because a fingerprint has to detect changes in these.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


# one sum for each pair of primes: the first weights the long side of a basis, the second the r directions of a head
_PRIMES = ((2, 11), (3, 13), (5, 17), (7, 19))
# Half precision changes a sum by about 0.001. The sums of different bases differ by about 1.
TOLERANCE = 0.01


def make_fingerprint(basis_A: torch.Tensor, basis_B: torch.Tensor, num_heads: int) -> torch.Tensor:
    """
    Args:
        basis_A (`torch.Tensor`): The stacked A, `[h*r, d_in]`.
        basis_B (`torch.Tensor`): The stacked B, `[d_out, h*r]`.
        num_heads (`int`): The number of heads, h.

    Returns:
        `torch.Tensor`: `[h, 8]` in float32 on the CPU: four sums for A and four for B, each of size about 1 for bases
        with a scale of 1.
    """
    return torch.cat([_sums(basis_A, num_heads), _sums(basis_B.T, num_heads)], dim=1)


def fingerprints_of_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Args:
        state (`Mapping[str, torch.Tensor]`):
            The tensors of a Ravan adapter by their checkpoint names, with or without the bases.

    Returns:
        `dict[str, torch.Tensor]`: The fingerprint of each target, `[h, 8]`, by its checkpoint name.
    """
    fingerprints = {}
    for name, core in state.items():
        target, _, kind = name.rpartition(".")
        if kind != "ravan_H":
            continue
        if f"{target}.ravan_A" in state:
            basis_A, basis_B = state[f"{target}.ravan_A"], state[f"{target}.ravan_B"]
            fingerprints[target] = make_fingerprint(basis_A, basis_B, len(basis_A) // core.shape[-1])
        elif f"{target}.ravan_fingerprint" in state:
            fingerprints[target] = state[f"{target}.ravan_fingerprint"].float().cpu()
    return fingerprints


def fingerprint_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """
    Args:
        first (`torch.Tensor`): A fingerprint, `[h, 8]`.
        second (`torch.Tensor`): Another one.

    Returns:
        `float`: How much they differ. Above `TOLERANCE`, the bases are different. Infinite if the numbers of heads
        differ.
    """
    if first.shape != second.shape:
        return float("inf")
    first, second = first.float().cpu(), second.float().cpu()
    # bases with a larger scale have larger sums, whose rounding errors are larger, too
    size = torch.cat([first, second]).square().mean().sqrt().clamp(min=1)
    # NaN must not count as within the tolerance
    return ((first - second).abs().max() / size).nan_to_num(nan=float("inf")).item()


def _sums(basis: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Weighted sums of the stacked directions of all heads, `[h*r, d]`, as `[h, 4]`."""
    total_rank, d = basis.shape
    r = total_rank // num_heads
    along_d = torch.stack([_weights(d, prime) for prime, _ in _PRIMES], dim=1).to(basis.device)  # [d, 4]
    along_r = torch.stack([_weights(r, prime) for _, prime in _PRIMES], dim=1).to(basis.device)  # [r, 4]
    per_direction = (basis.float() @ along_d).reshape(num_heads, r, -1)
    return (per_direction * along_r).sum(dim=1).cpu() / r**0.5


def _weights(length: int, prime: int) -> torch.Tensor:
    """Numbers between -sqrt(3) and sqrt(3), of variance 1."""
    steps = torch.arange(1, length + 1, dtype=torch.float64, device="cpu") * prime**0.5
    return ((2 * steps.frac() - 1) * 3**0.5).float()
