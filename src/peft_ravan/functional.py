"""The arithmetic of one Ravan layer, without loops over heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def scaled_cores(core: torch.Tensor, scaling: torch.Tensor) -> torch.Tensor:
    """
    The products s_i * H_i, which is what enters the weight linearly, is uploaded and is averaged.

    Args:
        core (`torch.Tensor`): H, `[h, r, r]`.
        scaling (`torch.Tensor`): s, `[h]`.

    Returns:
        `torch.Tensor`: `[h, r, r]`.
    """
    return scaling[:, None, None] * core


def delta_output(
    x: torch.Tensor, basis_A: torch.Tensor, basis_B: torch.Tensor, core: torch.Tensor, scaling: torch.Tensor
) -> torch.Tensor:
    """
    What the adapter adds to the output of its layer: `x @ (sum_i s_i B_i H_i A_i).T`.

    Args:
        x (`torch.Tensor`): The input, `[..., d_in]`.
        basis_A (`torch.Tensor`): The stacked A, `[h*r, d_in]`.
        basis_B (`torch.Tensor`): The stacked B, `[d_out, h*r]`.
        core (`torch.Tensor`): H, `[h, r, r]`.
        scaling (`torch.Tensor`): s, `[h]`.

    Returns:
        `torch.Tensor`: `[..., d_out]`.
    """
    num_heads, r, _ = core.shape
    inner = F.linear(x, basis_A)  # [..., h*r]
    if num_heads == 1:
        inner = F.linear(inner, scaled_cores(core, scaling)[0])
    else:
        # heads first, so that the batched product reads a head as a strided slice instead of copying it
        per_head = inner.reshape(-1, num_heads, r).transpose(0, 1)  # [h, tokens, r]
        per_head = torch.bmm(per_head, scaled_cores(core, scaling).transpose(1, 2))  # [h, tokens, r]
        inner = per_head.transpose(0, 1).reshape(inner.shape)
    return F.linear(inner, basis_B)


def delta_weight(
    basis_A: torch.Tensor, basis_B: torch.Tensor, core: torch.Tensor, scaling: torch.Tensor
) -> torch.Tensor:
    """
    The weight update `sum_i s_i B_i H_i A_i`.

    Args:
        basis_A (`torch.Tensor`): The stacked A, `[h*r, d_in]`.
        basis_B (`torch.Tensor`): The stacked B, `[d_out, h*r]`.
        core (`torch.Tensor`): H, `[h, r, r]`.
        scaling (`torch.Tensor`): s, `[h]`.

    Returns:
        `torch.Tensor`: `[d_out, d_in]`.
    """
    num_heads, r, _ = core.shape
    per_head_B = basis_B.reshape(-1, num_heads, r).transpose(0, 1)  # [h, d_out, r]
    projected = torch.bmm(per_head_B, scaled_cores(core, scaling))  # [h, d_out, r]
    return projected.transpose(0, 1).reshape(basis_B.shape) @ basis_A
