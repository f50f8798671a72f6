"""
The frozen bases of a Ravan adapter: B and A of every target, made from a seed.

The heads' bases are held stacked: A is `[h*r, d_in]` and B is `[d_out, h*r]`; head i owns rows, respectively columns,
`i*r` to `(i+1)*r`. Random numbers are always drawn on the CPU in float64, from a generator seeded by the configuration
and the name of the target, so that the bases depend neither on the device or the dtype of the model nor on the global
random state, nor on what the adapter is called.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BasesShape:
    """
    The shape of the bases of one target.

    Args:
        d_in (`int`): Number of input features of the target.
        d_out (`int`): Number of output features of the target.
        num_heads (`int`): Number of heads, h.
        r (`int`): Rank of one head.
    """

    d_in: int
    d_out: int
    num_heads: int
    r: int

    @property
    def total_rank(self) -> int:
        return self.num_heads * self.r


def _orthonormal_columns(num_rows: int, num_columns: int, generator: torch.Generator) -> torch.Tensor:
    gaussian = torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64)
    columns, triangle = torch.linalg.qr(gaussian)
    # QR leaves the sign of each column to the library; a positive diagonal is what Gram-Schmidt gives everywhere.
    return columns * torch.where(triangle.diagonal() < 0, -1.0, 1.0)


def gram_schmidt(shape: BasesShape, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal columns over all heads' B and orthonormal rows over all heads' A (Ravan, section 4)."""
    basis_B = _orthonormal_columns(shape.d_out, shape.total_rank, generator)  # [d_out, h*r]
    basis_A = _orthonormal_columns(shape.d_in, shape.total_rank, generator).T  # [h*r, d_in]
    return basis_A, basis_B


def normal(shape: BasesShape, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Independent normal entries of variance 1/d: a column of B and a row of A have an expected squared norm of 1."""
    basis_B = torch.randn(shape.d_out, shape.total_rank, generator=generator, dtype=torch.float64)
    basis_A = torch.randn(shape.total_rank, shape.d_in, generator=generator, dtype=torch.float64)
    return basis_A / shape.d_in**0.5, basis_B / shape.d_out**0.5


BASES: dict[str, Callable[[BasesShape, torch.Generator], tuple[torch.Tensor, torch.Tensor]]] = {
    "gram_schmidt": gram_schmidt,
    "normal": normal,
}


def check_bases_name(init_bases: str) -> None:
    """
    Args:
        init_bases (`str`): The name to check.

    Raises:
        ValueError: if no bases of that name are known.
    """
    if init_bases not in BASES:
        raise ValueError(f"`init_bases` must be one of {sorted(BASES)}, got {init_bases!r}.")


def check_bases_fit(init_bases: str, shape: BasesShape, target_name: str) -> None:
    """
    Args:
        init_bases (`str`): The kind of bases, one of `BASES`.
        shape (`BasesShape`): The shape of the target and of its heads.
        target_name (`str`): The name of the target, for the message.

    Raises:
        ValueError: if `init_bases` is unknown, or if such bases cannot be made in this shape.
    """
    check_bases_name(init_bases)
    if init_bases == "gram_schmidt" and shape.total_rank > min(shape.d_in, shape.d_out):
        raise ValueError(
            "`init_bases='gram_schmidt'` needs num_heads * r <= min(d_in, d_out), but for the target "
            f"{target_name!r} num_heads * r = {shape.num_heads} * {shape.r} = {shape.total_rank}, d_in = {shape.d_in} "
            f"and d_out = {shape.d_out}. Use a smaller `r` or `num_heads`, or `init_bases='normal'`."
        )


def make_bases(init_bases: str, shape: BasesShape, seed: int, target_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Make the frozen bases of one target.

    Args:
        init_bases (`str`):
            The kind of bases, one of `BASES`.
        shape (`BasesShape`):
            The shape of the target and of its heads.
        seed (`int`):
            `projection_seed` of the configuration.
        target_name (`str`):
            The name of the target within the base model, such as `"model.layers.0.self_attn.q_proj"`. Targets of
            different names get different bases.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: A `[h*r, d_in]` and B `[d_out, h*r]`, in float32 on the CPU.

    Raises:
        ValueError: if `init_bases` is unknown, or if `"gram_schmidt"` does not fit into the target.
    """
    check_bases_fit(init_bases, shape, target_name)
    digest = hashlib.sha256(f"{seed}/{target_name}".encode()).digest()
    # explicit device: the model may be built under a default device such as meta or cuda
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        basis_A, basis_B = BASES[init_bases](shape, generator)
        return basis_A.float().contiguous(), basis_B.float().contiguous()
