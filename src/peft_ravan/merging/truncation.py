"""
Recompute LoRA's A and B of a given rank from the update of a weight.

LoRA initialises one of them with zeros and the other one randomly. The random one is called the frame here: A of a
linear layer, B of an embedding. Its rows (or the columns of B) are directions and are kept orthonormal. The singular
values go into the other factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig

from ..tuner.linalg import svd_of_product
from .averaging import client_weights, mean_state
from .lora import LoraTarget, is_lora_matrix, keep_trainable, product_targets, stacked_factors
from .updates import ClientUpdate


def truncated_factors(
    target: LoraTarget, left: torch.Tensor, right: torch.Tensor | None, like: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], float]:
    """
    The best approximation of `left @ right` by B A of the global rank, from the singular value decomposition U S V^T,
    sorted by singular value: A = V^T and B = U S, or for an embedding B = c U and A = S V^T / c with c = sqrt(d_out).
    The directions have about the same norm as in LoRA's initialisation.

    If the product has a lower rank than the adapter, some directions are left over. They add nothing but can still be
    trained: the frame gets further orthonormal directions, taken from the global frame as far as possible, and the
    other factor gets zeros.

    Args:
        target ([`LoraTarget`]): The module.
        left (`torch.Tensor`): `[d_out, k]`, or the whole product.
        right (`torch.Tensor`): `[k, d_in]`, or `None`.
        like (`Mapping[str, torch.Tensor]`): The global state, which determines the rank, dtypes and devices.

    Returns:
        `tuple[dict[str, torch.Tensor], float]`: A and B by their names, and the share of the squared norm that they
        keep.
    """
    other, frame, kept = _other_and_frame_of_product(target, left, right, like)
    B, A = target.swapped(other, frame)
    # with a rank above d_in or d_out, there are not enough orthonormal directions
    return target.as_state(*keep_trainable(B, A, *target.factors(like)), like), kept


def aligned_factors(
    target: LoraTarget, state: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    The factors of [`truncated_factors`], aligned with the global ones: B Q^T and Q A with the rotation Q that brings
    both nearest to them (orthogonal Procrustes). A decomposition chooses new factors in every round, so their
    difference from the global ones does not describe an update of the weight. A rotation preserves the product and the
    norms of A and B.

    Args:
        target ([`LoraTarget`]): The module.
        state (`Mapping[str, torch.Tensor]`): The state with the product.
        like (`Mapping[str, torch.Tensor]`): The global state, of the same rank.

    Returns:
        `dict[str, torch.Tensor]`: A and B by their names.
    """
    B, A = target.factors(state)
    other, frame, _ = _other_and_frame_of_product(target, B, A, like)
    global_other, global_frame = _other_and_frame(target, like)
    rotation = nearest_orthonormal(global_frame @ frame.T + global_other.T @ other)  # [r, r]
    return target.as_state(*target.swapped(other @ rotation.T, rotation @ frame), like)


def orthonormal_factors(
    target: LoraTarget, state: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    Replace the directions of A, or of B for an embedding, by the nearest orthonormal ones after a step. The other
    factor is not changed.

    Args:
        target ([`LoraTarget`]): The module.
        state (`Mapping[str, torch.Tensor]`): The state after the step.
        like (`Mapping[str, torch.Tensor]`): The global state, which determines the dtypes and devices.

    Returns:
        `dict[str, torch.Tensor]`: A and B by their names.
    """
    other, frame = _other_and_frame(target, state)
    frame = _length_of_directions(target, frame) * nearest_orthonormal(frame)
    return target.as_state(*target.swapped(other, frame), like)


def _other_and_frame(target: LoraTarget, state: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    B, A = target.factors(state)
    return target.swapped(B.double(), A.double())


def _length_of_directions(target: LoraTarget, frame: torch.Tensor) -> float:
    # LoRA initialises A of linear layers with rows of norm 0.6, and B of embeddings with entries of variance 1
    return frame.shape[1] ** 0.5 if target.is_embedding else 1.0


def _other_and_frame_of_product(
    target: LoraTarget, left: torch.Tensor, right: torch.Tensor | None, like: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    global_other, global_frame = _other_and_frame(target, like)
    U, S, Vh, kept = svd_of_product(left, right, rank=len(global_frame))
    U, Vh = (factor.to(global_frame) for factor in target.swapped(U, Vh))
    S = S.to(global_frame)
    # below this, a value is only rounding error and has no direction
    live = S > 10 * torch.finfo(target.factors(like)[1].dtype).eps * S.max()
    U, S, Vh = U[:, live], S[live], Vh[live]
    length = _length_of_directions(target, global_frame)
    other, frame = torch.zeros_like(global_other), torch.zeros_like(global_frame)
    other[:, : len(S)] = U * S / length
    directions = _completed(Vh, global_frame)
    frame[: len(directions)] = length * directions
    return other, frame, kept


def _completed(rows: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """
    Extend orthonormal rows `[q, d]` to `min(r, d)`, first by the main directions of a source `[r, d]`, then by any.
    """
    rank, d = min(source.shape), source.shape[1]
    if len(rows) == rank:
        return rows
    rest = source - (source @ rows.T) @ rows
    _, S, others = torch.linalg.svd(rest, full_matrices=False)
    others = others[S > 1e-6 * source.norm()]
    any_others = torch.randn(rank, d, dtype=rows.dtype, generator=torch.Generator().manual_seed(0)).to(rows)
    candidates = torch.cat([rows, others, any_others])
    return torch.cat([rows, torch.linalg.qr(candidates.T).Q.T[len(rows) : rank]])


def nearest_orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    """
    Args:
        matrix (`torch.Tensor`): `[m, n]`.

    Returns:
        `torch.Tensor`: The nearest matrix in the Frobenius norm with orthonormal rows, or with orthonormal columns if
        these are fewer.
    """
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U @ Vh


def mean_of_products(
    global_state: Mapping[str, torch.Tensor], updates: Sequence[ClientUpdate], config: LoraConfig | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """
    Average LoRA's products B A, truncated to the global rank, and all other tensors as they are.

    Args:
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        updates (`Sequence[ClientUpdate]`): What the clients uploaded.
        config ([`~peft.LoraConfig`], *optional*): The configuration of the global adapter.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, float]]`: The mean state, and for each adapted module the share of
        the squared norm of its mean product that is left.
    """
    weights = client_weights(updates)
    lora_names = tuple(name for name in global_state if is_lora_matrix(name))
    state, kept_energy = mean_state(global_state, updates, leave_out=lora_names), {}
    for target in product_targets(global_state, config):
        stacked = stacked_factors(target, updates, weights, global_state, config)
        matrices, kept_energy[target.module] = truncated_factors(target, *stacked, like=global_state)
        state.update(matrices)
    return state, kept_energy
