"""
A whole adapted layer computed with its formed weight, `W + sum_i s_i B_i H_i A_i`: one dense product instead of the base
layer and two thin products.

Shapes as in [`peft_ravan.tuner.functional`].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .functional import among_all, columns_of, mix, products_gradient, rows_of, scaled_cores


def is_kept(num_tokens: int, d_in: int, d_out: int) -> bool:
    """
    Whether a formed weight is kept from the forward to the backward pass, if the model allows it: if it is not larger
    than the input and the output of the layer together. With all heads trained, this is also the condition for it to
    be cheaper than thin products.

    Args:
        num_tokens (`int`): T.
        d_in (`int`): Number of input features.
        d_out (`int`): Number of output features.

    Returns:
        `bool`: Whether it is kept.
    """
    return d_in * d_out <= num_tokens * (d_in + d_out)


def dense_is_cheaper(
    num_tokens: int,
    d_in: int,
    d_out: int,
    total_rank: int,
    training: bool,
    trained_rank: int | None = None,
    keep: bool = False,
) -> bool:
    """
    Whether [`adapted_linear`] needs fewer multiplications than the base layer and thin products together.

    The thin products cost `T * h*r * (d_in + d_out)` in the forward pass and the same in the backward pass. The
    alternative is to form the weight, `h*r * d_in * d_out`, in the forward pass and, unless it is kept, once more in
    the backward pass, plus the gradient of the cores in the cheaper of two ways.

    Args:
        num_tokens (`int`): T.
        d_in (`int`): Number of input features.
        d_out (`int`): Number of output features.
        total_rank (`int`): h * r.
        training (`bool`): Whether there is a backward pass.
        trained_rank (`int`, *optional*): k * r, if only k heads get a gradient.
        keep (`bool`, *optional*, defaults to `False`): Whether the formed weight is kept for the backward pass.

    Returns:
        `bool`: Whether it is cheaper.
    """
    trained_rank = total_rank if trained_rank is None else trained_rank
    thin = num_tokens * total_rank * (d_in + d_out)
    forming = total_rank * d_in * d_out
    if not training:
        return forming < thin
    core_gradient = min(num_tokens * trained_rank * (d_in + d_out), (num_tokens + trained_rank) * d_in * d_out)
    return (1 if keep else 2) * forming + core_gradient < 2 * thin


def form_weight(
    weight: torch.Tensor, basis_A: torch.Tensor, basis_B: torch.Tensor, products: torch.Tensor
) -> torch.Tensor:
    """
    Args:
        weight (`torch.Tensor`): The base weight W, `[d_out, d_in]`.
        basis_A (`torch.Tensor`): The stacked A, `[h*r, d_in]`.
        basis_B (`torch.Tensor`): The stacked B, `[d_out, h*r]`.
        products (`torch.Tensor`): The products s_i * H_i, `[h, r, r]`.

    Returns:
        `torch.Tensor`: The formed weight, `[d_out, d_in]`.
    """
    return torch.addmm(weight, basis_B, mix(basis_A, products))


class _AdaptedLinear(torch.autograd.Function):
    """
    `x @ (W + sum_i B_i P_i A_i).T + bias`, with a formed weight that is given, or kept, or formed again.

    The gradient of the products comes from x or, if it is given, from what the bases A project of it, `[k*r, T]`, which
    is smaller. The output does not depend on the latter, so its gradient is none, but second derivatives reach x by it.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, basis_A, basis_B, products, heads, inner, keep, formed):
        if formed is None:
            formed = form_weight(weight, basis_A, basis_B, products)
        # Saved like an input, and not as an attribute: gradient checkpointing and hooks of saved tensors then apply to
        # it, and it is freed with the graph.
        kept = formed if keep and ctx.needs_input_grad[0] else None
        needs_x = ctx.needs_input_grad[1] or (ctx.needs_input_grad[5] and inner is None)
        ctx.save_for_backward(x if needs_x else None, weight, basis_A, basis_B, products, heads, inner, kept)
        ctx.input_shape = x.shape
        return F.linear(x, formed, bias)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, basis_A, basis_B, products, heads, inner, formed = ctx.saved_tensors
        x_rows = None if x is None else x.reshape(-1, x.shape[-1])  # [T, d_in]
        grad_rows = grad_output.reshape(-1, grad_output.shape[-1])  # [T, d_out]
        grad_x = grad_weight = grad_bias = grad_products = None
        if ctx.needs_input_grad[0]:
            # a second derivative goes through the forming, too
            if formed is None or torch.is_grad_enabled():
                formed = form_weight(weight, basis_A, basis_B, products)
            grad_x = (grad_rows @ formed).reshape(ctx.input_shape)
        if ctx.needs_input_grad[1]:
            grad_weight = grad_rows.T @ x_rows
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(dim=0)
        if ctx.needs_input_grad[5]:
            A_of_heads, B_of_heads, num_heads = _of_heads(basis_A, basis_B, products, heads)
            if inner is None:
                left, right = B_of_heads.T @ (grad_rows.T @ x_rows), A_of_heads
            else:
                left, right = B_of_heads.T @ grad_rows.T, inner
            grad_products = products_gradient(left, right, num_heads)
            if heads is not None:
                grad_products = among_all(grad_products, heads, products)
        return grad_x, grad_weight, grad_bias, None, None, grad_products, None, None, None, None


def _of_heads(
    basis_A: torch.Tensor, basis_B: torch.Tensor, products: torch.Tensor, heads: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The bases of the heads that get a gradient, `[k*r, d_in]` and `[d_out, k*r]`, and k."""
    if heads is None:
        return basis_A, basis_B, len(products)
    r = products.shape[1]
    return rows_of(basis_A, heads, r), columns_of(basis_B, heads, r), len(heads)


def _inner_of_heads(
    x: torch.Tensor, basis_A: torch.Tensor, basis_B: torch.Tensor, products: torch.Tensor, heads: torch.Tensor | None
) -> torch.Tensor | None:
    """
    What the bases A of the heads that get a gradient project, `[k*r, T]`. `None` if there is no gradient, or if it is
    cheaper to start from `grad^T x`, `[d_out, d_in]`.
    """
    if not (torch.is_grad_enabled() and products.requires_grad):
        return None
    rows = x.reshape(-1, x.shape[-1])
    A_of_heads, _, _ = _of_heads(basis_A, basis_B, products, heads)
    num_tokens, d_in = rows.shape
    d_out, trained_rank = len(basis_B), len(A_of_heads)
    if (num_tokens + trained_rank) * d_in * d_out < num_tokens * trained_rank * (d_in + d_out):
        return None
    return A_of_heads @ rows.T


def adapted_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    basis_A: torch.Tensor,
    basis_B: torch.Tensor,
    core: torch.Tensor,
    scaling: torch.Tensor,
    heads: torch.Tensor | None = None,
    keep: bool = False,
    formed: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The whole adapted layer, `x @ (W + sum_i s_i B_i H_i A_i).T + bias`, computed with one dense product.

    Args:
        x (`torch.Tensor`): The input, `[..., d_in]`.
        weight (`torch.Tensor`): The base weight W, `[d_out, d_in]`.
        bias (`torch.Tensor`, *optional*): The base bias, `[d_out]`.
        basis_A (`torch.Tensor`): The stacked A, `[h*r, d_in]`.
        basis_B (`torch.Tensor`): The stacked B, `[d_out, h*r]`.
        core (`torch.Tensor`): H, `[h, r, r]`.
        scaling (`torch.Tensor`): s, `[h]`.
        heads (`torch.Tensor`, *optional*):
            The indices of the heads whose H and s get a gradient, `[k]`. The gradient of the others is 0. By default
            all.
        keep (`bool`, *optional*, defaults to `False`):
            Whether the formed weight is kept for the backward pass, which frees it. Otherwise it is formed again there.
        formed (`torch.Tensor`, *optional*):
            The result of [`form_weight`] for these arguments, without a graph, if it is known. By default it is
            computed.

    Returns:
        `torch.Tensor`: `[..., d_out]`.
    """
    products = scaled_cores(core, scaling)
    inner = _inner_of_heads(x, basis_A, basis_B, products, heads)
    return _AdaptedLinear.apply(x, weight, bias, basis_A, basis_B, products, heads, inner, keep, formed)
