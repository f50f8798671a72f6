"""
The frozen bases of a Ravan adapter: B and A of every target, made from a seed or from a matrix.

The bases of all heads are stacked: A is `[h*r, d_in]` and B is `[d_out, h*r]`. Head i owns the rows of A and the
columns of B from `i*r` to `(i+1)*r`. Random numbers are always drawn on the CPU in float64, from a generator seeded by
the configuration and the name of the target. So the bases do not depend on the device or dtype of the model, the
global random state, or the name of the adapter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .linalg import truncated_svd


# The factor by which h*r may exceed the larger side of a target. Beyond that side, more heads add no rank, but
# adapters with stacked heads (`add_weighted_adapter` with "cat") can have more. There is a limit because a number from
# an untrusted file may be anything.
MAX_EXCESS = 16


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


@dataclass(frozen=True)
class BasesKind:
    """
    A kind of bases.

    Args:
        make (`Callable`):
            Maps shape, generator and matrix to A `[h*r, d_in]` and B `[d_out, h*r]`. The matrix, `[d_out, d_in]`, is
            the weight of the target or its gradient.
        summary (`str`):
            A description in one sentence.
        from_matrix (`str`, *optional*):
            The matrix that the bases are made from: `"weight"`, `"gradient"` or none.
        orthonormal_heads (`str`, *optional*):
            What has to fit into the smaller side of the target: `"all"` heads, `"one"` head, or nothing.
        shares_directions (`bool`, *optional*, defaults to `False`):
            Whether all heads have the same directions.
    """

    make: Callable[[BasesShape, torch.Generator, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
    summary: str
    from_matrix: str | None = None
    orthonormal_heads: str | None = None
    shares_directions: bool = False


def _orthonormal_columns(num_rows: int, num_columns: int, generator: torch.Generator) -> torch.Tensor:
    gaussian = torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64)
    columns, triangle = torch.linalg.qr(gaussian)
    # With QR, the sign of each column depends on the library. Gram-Schmidt always gives a positive diagonal.
    return columns * torch.where(triangle.diagonal() < 0, -1.0, 1.0)


def gram_schmidt(
    shape: BasesShape, generator: torch.Generator, matrix: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal columns over all heads' B and orthonormal rows over all heads' A (Ravan, section 4)."""
    basis_B = _orthonormal_columns(shape.d_out, shape.total_rank, generator)  # [d_out, h*r]
    basis_A = _orthonormal_columns(shape.d_in, shape.total_rank, generator).T  # [h*r, d_in]
    return basis_A, basis_B


def normal(
    shape: BasesShape, generator: torch.Generator, matrix: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Independent normal entries of variance 1/d: a column of B and a row of A have an expected squared norm of 1."""
    basis_B = torch.randn(shape.d_out, shape.total_rank, generator=generator, dtype=torch.float64)
    basis_A = torch.randn(shape.total_rank, shape.d_in, generator=generator, dtype=torch.float64)
    return basis_A / shape.d_in**0.5, basis_B / shape.d_out**0.5


def constant(
    shape: BasesShape, generator: torch.Generator, matrix: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same orthonormal B and A for every head, so that the rank of the update stays r (a control of the paper)."""
    basis_B = _orthonormal_columns(shape.d_out, shape.r, generator)
    basis_A = _orthonormal_columns(shape.d_in, shape.r, generator).T
    return basis_A.repeat(shape.num_heads, 1), basis_B.repeat(1, shape.num_heads)


def shared(
    shape: BasesShape, generator: torch.Generator, matrix: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """B_i = B P_i and A_i = Q_i A with random r x r P_i and Q_i: the rank of the update stays r (also a control)."""
    basis_B = _orthonormal_columns(shape.d_out, shape.r, generator)
    basis_A = _orthonormal_columns(shape.d_in, shape.r, generator).T
    mixers = torch.randn(2, shape.num_heads, shape.r, shape.r, generator=generator, dtype=torch.float64)
    P, Q = mixers / shape.r**0.5  # entries of variance 1/r keep the expected norms at 1
    return (Q @ basis_A).flatten(0, 1), torch.cat([basis_B @ P_i for P_i in P], dim=1)


def singular_directions(
    shape: BasesShape, generator: torch.Generator, matrix: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Head i takes the i-th block of r singular directions of a matrix."""
    U, _, Vh = truncated_svd(matrix, shape.total_rank, generator)
    return Vh, U


BASES: dict[str, BasesKind] = {
    "gram_schmidt": BasesKind(
        gram_schmidt,
        "All columns of all B and all rows of all A are orthonormal.",
        orthonormal_heads="all",
    ),
    "normal": BasesKind(normal, "Independent normal entries of variance 1/d."),
    "constant": BasesKind(
        constant,
        "The same B and A for every head; the rank of the update stays r.",
        orthonormal_heads="one",
        shares_directions=True,
    ),
    "shared": BasesKind(
        shared,
        "One B and A, mixed by random r x r matrices; the rank stays r.",
        orthonormal_heads="one",
        shares_directions=True,
    ),
    "weight_svd": BasesKind(
        singular_directions,
        "Blocks of singular directions of the weight (one head: LoRA-XS).",
        from_matrix="weight",
        orthonormal_heads="all",
    ),
    "gradient_svd": BasesKind(
        singular_directions,
        "Blocks of singular directions of a gradient (one head: LoRA-SB).",
        from_matrix="gradient",
        orthonormal_heads="all",
    ),
}


SCALES = ("lora", "paper")
# from sweeps of the learning rate over three models and four sizes of heads, see docs/ravan.md
LORA_SCALE = 64.0


def check_scale(scale: float | str) -> None:
    """
    Args:
        scale (`float` or `str`): The scale to check.

    Raises:
        ValueError: if it is neither one of `SCALES` nor a positive number.
    """
    is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not (0 < scale < math.inf if is_number else scale in SCALES):
        raise ValueError(f"`bases_scale` must be one of {list(SCALES)} or a positive number, got {scale!r}.")


def scale_of(scale: float | str, init_bases: str, shape: BasesShape) -> float:
    """
    Args:
        scale (`float` or `str`): The `bases_scale` of the configuration.
        init_bases (`str`): The kind of bases, one of `BASES`.
        shape (`BasesShape`): The shape of the target and of its heads.

    Returns:
        `float`: The factor of the products of B and A.
    """
    if scale == "paper":
        return 1.0
    if scale != "lora":
        return float(scale)
    # A first step of Adam adds about the same number to all entries of all cores. With orthonormal directions, the output
    # then changes by r * sqrt(h * r) / sqrt(d_in) times that number, and by sqrt(h) more if the heads share directions.
    step = shape.r * shape.total_rank**0.5
    if BASES[init_bases].shares_directions:
        step *= shape.num_heads**0.5
    return LORA_SCALE * (shape.d_in * shape.d_out) ** 0.25 / step


def check_bases_name(init_bases: str) -> None:
    """
    Args:
        init_bases (`str`): The name to check.

    Raises:
        ValueError: if there are no bases of that name.
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
        ValueError: if `init_bases` is unknown, if such bases cannot have this shape, or if they would be unreasonably
            large.
    """
    check_bases_name(init_bases)
    sizes = f"d_in = {shape.d_in} and d_out = {shape.d_out}"
    longer_side = max(shape.d_in, shape.d_out)
    if shape.r > longer_side or shape.total_rank > MAX_EXCESS * longer_side:
        raise ValueError(
            f"r must be at most max(d_in, d_out), and num_heads * r at most {MAX_EXCESS} times that, but for the target "
            f"{target_name!r} num_heads * r = {shape.num_heads} * {shape.r} = {shape.total_rank}, {sizes}. The rank of an "
            "update is never above the smaller of both. Use a smaller `r` or `num_heads`."
        )
    way_out = "Use a smaller `r` or `num_heads`, or `init_bases='normal'`."
    kind = BASES[init_bases]
    if kind.orthonormal_heads == "all" and shape.total_rank > min(shape.d_in, shape.d_out):
        raise ValueError(
            f"`init_bases={init_bases!r}` needs num_heads * r <= min(d_in, d_out), but for the target {target_name!r} "
            f"num_heads * r = {shape.num_heads} * {shape.r} = {shape.total_rank}, {sizes}. {way_out}"
        )
    if kind.orthonormal_heads == "one" and shape.r > min(shape.d_in, shape.d_out):
        raise ValueError(
            f"`init_bases={init_bases!r}` needs r <= min(d_in, d_out), but for the target {target_name!r} "
            f"r = {shape.r}, {sizes}. {way_out}"
        )


def make_bases(
    init_bases: str,
    shape: BasesShape,
    seed: int,
    target_name: str,
    matrix: torch.Tensor | None = None,
    scale: float | str = "paper",
) -> tuple[torch.Tensor, torch.Tensor]:
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
            The name of the target within the base model, such as `"model.layers.0.self_attn.q_proj"`. Targets with
            different names get different bases.
        matrix (`torch.Tensor`, *optional*):
            The weight or gradient `[d_out, d_in]` that the bases are made from. Bases that need a matrix are those of
            `"gram_schmidt"` until there is one.
        scale (`float` or `str`, *optional*, defaults to `"paper"`):
            The factor of the products of B and A, one of `SCALES` or a number. Each of them has its square root.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: A `[h*r, d_in]` and B `[d_out, h*r]`, in float32 on the CPU.

    Raises:
        ValueError: if `init_bases` is unknown, or the bases do not fit the target. Nothing is allocated in that case.
    """
    check_bases_fit(init_bases, shape, target_name)
    kind = BASES["gram_schmidt"] if BASES[init_bases].from_matrix and matrix is None else BASES[init_bases]
    digest = hashlib.sha256(f"{seed}/{target_name}".encode()).digest()
    # set the device explicitly: the model may be built under a default device such as meta or cuda
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        basis_A, basis_B = kind.make(shape, generator, matrix)
        factor = scale_of(scale, init_bases, shape) ** 0.5
        return (basis_A * factor).float().cpu().contiguous(), (basis_B * factor).float().cpu().contiguous()
