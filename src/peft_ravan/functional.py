"""
The arithmetic of one Ravan layer: what it adds, or the whole layer at once, without loops over heads.

Names of shapes: T tokens (all leading dimensions of the input together), d_in, d_out, h heads of rank r.
"""

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


def _project_basis_B(basis_B: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """[B_1 P_1 ... B_h P_h], `[d_out, h*r]`, of the products P_i = s_i H_i, `[h, r, r]`."""
    num_heads, r, _ = products.shape
    per_head = basis_B.reshape(-1, num_heads, r).transpose(0, 1)  # [h, d_out, r]
    return torch.bmm(per_head, products).transpose(0, 1).reshape(basis_B.shape)


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
    return _project_basis_B(basis_B, scaled_cores(core, scaling)) @ basis_A


def expand(inner: torch.Tensor, basis_B: torch.Tensor, core: torch.Tensor, scaling: torch.Tensor) -> torch.Tensor:
    """
    From the projected input of all heads to the output: `sum_i s_i B_i H_i u_i` for each token u.

    Args:
        inner (`torch.Tensor`): The input projected by the stacked A, `[..., h*r]`.
        basis_B (`torch.Tensor`): The stacked B, `[d_out, h*r]`.
        core (`torch.Tensor`): H, `[h, r, r]`.
        scaling (`torch.Tensor`): s, `[h]`.

    Returns:
        `torch.Tensor`: `[..., d_out]`.
    """
    num_heads, r, _ = core.shape
    products = scaled_cores(core, scaling)
    if num_heads == 1:
        inner = F.linear(inner, products[0])
    else:
        # heads first, so that the batched product reads a head as a strided slice instead of copying it
        per_head = inner.reshape(-1, num_heads, r).transpose(0, 1)  # [h, T, r]
        per_head = torch.bmm(per_head, products.transpose(1, 2))  # [h, T, r]
        inner = per_head.transpose(0, 1).reshape(inner.shape)
    return F.linear(inner, basis_B)


def delta_output(
    x: torch.Tensor, basis_A: torch.Tensor, basis_B: torch.Tensor, core: torch.Tensor, scaling: torch.Tensor
) -> torch.Tensor:
    """
    What the adapter adds to the output of its layer: `x @ (sum_i s_i B_i H_i A_i).T`, through two thin products.

    Args:
        x (`torch.Tensor`): The input, `[..., d_in]`.
        basis_A (`torch.Tensor`): The stacked A, `[h*r, d_in]`.
        basis_B (`torch.Tensor`): The stacked B, `[d_out, h*r]`.
        core (`torch.Tensor`): H, `[h, r, r]`.
        scaling (`torch.Tensor`): s, `[h]`.

    Returns:
        `torch.Tensor`: `[..., d_out]`.
    """
    return expand(F.linear(x, basis_A), basis_B, core, scaling)


def dense_is_cheaper(num_tokens: int, d_in: int, d_out: int, total_rank: int, training: bool) -> bool:
    """
    Whether [`adapted_linear`] costs fewer multiplications than the base layer and [`delta_output`] together.

    The thin products cost `T * h*r * (d_in + d_out)` forward and as much backward. Against that stand forming the weight,
    `h*r * d_in * d_out`, once forward and once backward, and the gradient of the cores, which is the cheaper of two ways.

    Args:
        num_tokens (`int`): T.
        d_in (`int`): Number of input features.
        d_out (`int`): Number of output features.
        total_rank (`int`): h * r.
        training (`bool`): Whether there is a backward pass.

    Returns:
        `bool`: Whether it is cheaper.
    """
    thin = num_tokens * total_rank * (d_in + d_out)
    forming = total_rank * d_in * d_out
    if not training:
        return forming < thin
    core_gradient = min(thin, num_tokens * d_in * d_out + forming)
    return 2 * forming + core_gradient < 2 * thin


class _AdaptedLinear(torch.autograd.Function):
    """`x @ (W + sum_i B_i P_i A_i).T + bias`. The dense weight is formed again in the backward pass, not kept."""

    @staticmethod
    def forward(ctx, x, weight, bias, basis_A, basis_B, products):
        ctx.save_for_backward(x, weight, basis_A, basis_B, products)
        dense = torch.addmm(weight, _project_basis_B(basis_B, products), basis_A)  # [d_out, d_in]
        return F.linear(x, dense, bias)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, basis_A, basis_B, products = ctx.saved_tensors
        x_rows = x.reshape(-1, x.shape[-1])  # [T, d_in]
        grad_rows = grad_output.reshape(-1, grad_output.shape[-1])  # [T, d_out]
        grad_x = grad_weight = grad_bias = grad_products = None
        if ctx.needs_input_grad[0]:
            dense = torch.addmm(weight, _project_basis_B(basis_B, products), basis_A)
            grad_x = (grad_rows @ dense).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = grad_rows.T @ x_rows
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(dim=0)
        if ctx.needs_input_grad[5]:
            grad_products = _products_gradient(x_rows, grad_rows, basis_A, basis_B, products.shape)
        return grad_x, grad_weight, grad_bias, None, None, grad_products


def _products_gradient(
    x: torch.Tensor, grad: torch.Tensor, basis_A: torch.Tensor, basis_B: torch.Tensor, shape: torch.Size
) -> torch.Tensor:
    """The gradient of the products, `B_i^T (grad^T x) A_i^T`, `[h, r, r]`, in the cheaper of two orders."""
    num_heads, r, _ = shape
    num_tokens, d_in = x.shape
    d_out = grad.shape[1]
    total_rank = num_heads * r
    if num_tokens * d_in * d_out + total_rank * d_in * d_out < num_tokens * total_rank * (d_in + d_out):
        left = basis_B.T @ (grad.T @ x)  # [h*r, d_in]
        return torch.bmm(left.reshape(num_heads, r, d_in), basis_A.reshape(num_heads, r, d_in).transpose(1, 2))
    outer = (grad @ basis_B).reshape(num_tokens, num_heads, r)
    inner = (x @ basis_A.T).reshape(num_tokens, num_heads, r)
    return torch.bmm(outer.permute(1, 2, 0), inner.transpose(0, 1))


def adapted_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    basis_A: torch.Tensor,
    basis_B: torch.Tensor,
    core: torch.Tensor,
    scaling: torch.Tensor,
) -> torch.Tensor:
    """
    The whole adapted layer, `x @ (W + sum_i s_i B_i H_i A_i).T + bias`, through one dense product.

    Args:
        x (`torch.Tensor`): The input, `[..., d_in]`.
        weight (`torch.Tensor`): The base weight W, `[d_out, d_in]`.
        bias (`torch.Tensor`, *optional*): The base bias, `[d_out]`.
        basis_A (`torch.Tensor`): The stacked A, `[h*r, d_in]`.
        basis_B (`torch.Tensor`): The stacked B, `[d_out, h*r]`.
        core (`torch.Tensor`): H, `[h, r, r]`.
        scaling (`torch.Tensor`): s, `[h]`.

    Returns:
        `torch.Tensor`: `[..., d_out]`.
    """
    return _AdaptedLinear.apply(x, weight, bias, basis_A, basis_B, scaled_cores(core, scaling))
