"""
The arithmetic of one Ravan layer: the output it adds, or the output of the whole layer at once, without loops over
heads.

Shapes: T tokens (all leading dimensions of the input combined), d_in, d_out, h heads of rank r.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def scaled_cores(core: torch.Tensor, scaling: torch.Tensor) -> torch.Tensor:
    """
    The products s_i * H_i. They enter the weight linearly, and they are what is uploaded and averaged.

    Args:
        core (`torch.Tensor`): H, `[h, r, r]`.
        scaling (`torch.Tensor`): s, `[h]`.

    Returns:
        `torch.Tensor`: `[h, r, r]`.
    """
    return scaling[:, None, None] * core


def _project_basis_B(basis_B: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """[B_1 P_1 ... B_h P_h], `[d_out, h*r]`, for the products P_i = s_i H_i, `[h, r, r]`."""
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


def _mix(per_head: torch.Tensor, products: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """`P_i u_i` of all heads, with the projected input as `[h, T, r]` and the result in its original shape."""
    return torch.bmm(per_head, products.transpose(1, 2)).transpose(0, 1).reshape(shape)


class _ExpandSomeHeads(torch.autograd.Function):
    """`sum_i B_i P_i u_i`. Saves and differentiates only what the products of the given heads need."""

    @staticmethod
    def forward(ctx, inner, basis_B, products, heads):
        num_heads, r, _ = products.shape
        per_head = inner.reshape(-1, num_heads, r).transpose(0, 1)  # [h, T, r]
        ctx.save_for_backward(per_head[heads], basis_B, products, heads)
        ctx.inner_shape = inner.shape
        return F.linear(_mix(per_head, products, inner.shape), basis_B)

    @staticmethod
    def backward(ctx, grad_output):
        inner_heads, basis_B, products, heads = ctx.saved_tensors
        num_heads, r, _ = products.shape
        grad = grad_output.reshape(-1, grad_output.shape[-1])  # [T, d_out]
        # autocast no longer applies here, so the bases are cast to the dtype of the output explicitly
        basis_B = basis_B.to(grad.dtype)
        grad_inner = None
        if ctx.needs_input_grad[0]:
            outer = (grad @ basis_B).reshape(-1, num_heads, r).transpose(0, 1)  # [h, T, r]
            grad_inner = _mix(outer, products.to(grad.dtype).transpose(1, 2), ctx.inner_shape)
            outer = outer[heads]
        else:
            outer = (grad @ _columns_of(basis_B, heads, r)).reshape(-1, len(heads), r).transpose(0, 1)  # [k, T, r]
        grad_heads = torch.bmm(outer.transpose(1, 2), inner_heads.to(grad.dtype))  # [k, r, r]
        return grad_inner, None, _among_all(grad_heads, heads, products), None


def _columns_of(basis_B: torch.Tensor, heads: torch.Tensor, r: int) -> torch.Tensor:
    """The bases B of some heads, `[d_out, k*r]`."""
    return basis_B.reshape(len(basis_B), -1, r)[:, heads].flatten(1)


def _rows_of(basis_A: torch.Tensor, heads: torch.Tensor, r: int) -> torch.Tensor:
    """The bases A of some heads, `[k*r, d_in]`."""
    return basis_A.reshape(-1, r, basis_A.shape[1])[heads].flatten(0, 1)


def _among_all(grad_heads: torch.Tensor, heads: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Expand the gradient of some heads' products to all products, `[h, r, r]`, with zeros elsewhere."""
    return torch.zeros_like(products).index_copy_(0, heads, grad_heads.to(products.dtype))


def expand(
    inner: torch.Tensor,
    basis_B: torch.Tensor,
    core: torch.Tensor,
    scaling: torch.Tensor,
    heads: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Map the projected input of all heads to the output: `sum_i s_i B_i H_i u_i` for each token u.

    Args:
        inner (`torch.Tensor`): The input projected by the stacked A, `[..., h*r]`.
        basis_B (`torch.Tensor`): The stacked B, `[d_out, h*r]`.
        core (`torch.Tensor`): H, `[h, r, r]`.
        scaling (`torch.Tensor`): s, `[h]`.
        heads (`torch.Tensor`, *optional*):
            The indices of the heads whose H and s get a gradient, `[k]`. The gradient of the others is 0. By default
            all.

    Returns:
        `torch.Tensor`: `[..., d_out]`.
    """
    num_heads, r, _ = core.shape
    products = scaled_cores(core, scaling)
    if heads is not None:
        return _ExpandSomeHeads.apply(inner, basis_B, products, heads)
    if num_heads == 1:
        inner = F.linear(inner, products[0])
    else:
        # heads first, so that the batched product reads each head as a strided slice instead of copying it
        per_head = inner.reshape(-1, num_heads, r).transpose(0, 1)  # [h, T, r]
        inner = _mix(per_head, products, inner.shape)
    return F.linear(inner, basis_B)


def delta_output(
    x: torch.Tensor,
    basis_A: torch.Tensor,
    basis_B: torch.Tensor,
    core: torch.Tensor,
    scaling: torch.Tensor,
    heads: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The output that the adapter adds to its layer, `x @ (sum_i s_i B_i H_i A_i).T`, computed with two thin products.

    Args:
        x (`torch.Tensor`): The input, `[..., d_in]`.
        basis_A (`torch.Tensor`): The stacked A, `[h*r, d_in]`.
        basis_B (`torch.Tensor`): The stacked B, `[d_out, h*r]`.
        core (`torch.Tensor`): H, `[h, r, r]`.
        scaling (`torch.Tensor`): s, `[h]`.
        heads (`torch.Tensor`, *optional*): The heads that get a gradient, as for [`expand`].

    Returns:
        `torch.Tensor`: `[..., d_out]`.
    """
    return expand(F.linear(x, basis_A), basis_B, core, scaling, heads)


def dense_is_cheaper(
    num_tokens: int, d_in: int, d_out: int, total_rank: int, training: bool, trained_rank: int | None = None
) -> bool:
    """
    Whether [`adapted_linear`] needs fewer multiplications than the base layer and [`delta_output`] together.

    The thin products cost `T * h*r * (d_in + d_out)` in the forward pass and the same in the backward pass. The
    alternative is to form the weight, `h*r * d_in * d_out`, once in the forward and once in the backward pass, plus
    the gradient of the cores in the cheaper of two ways.

    Args:
        num_tokens (`int`): T.
        d_in (`int`): Number of input features.
        d_out (`int`): Number of output features.
        total_rank (`int`): h * r.
        training (`bool`): Whether there is a backward pass.
        trained_rank (`int`, *optional*): k * r, if only k heads get a gradient.

    Returns:
        `bool`: Whether it is cheaper.
    """
    trained_rank = total_rank if trained_rank is None else trained_rank
    thin = num_tokens * total_rank * (d_in + d_out)
    forming = total_rank * d_in * d_out
    if not training:
        return forming < thin
    core_gradient = min(num_tokens * trained_rank * (d_in + d_out), (num_tokens + trained_rank) * d_in * d_out)
    return 2 * forming + core_gradient < 2 * thin


class _AdaptedLinear(torch.autograd.Function):
    """`x @ (W + sum_i B_i P_i A_i).T + bias`. The dense weight is recomputed in the backward pass, not stored."""

    @staticmethod
    def forward(ctx, x, weight, bias, basis_A, basis_B, products, heads):
        ctx.save_for_backward(x, weight, basis_A, basis_B, products, heads)
        dense = torch.addmm(weight, _project_basis_B(basis_B, products), basis_A)  # [d_out, d_in]
        return F.linear(x, dense, bias)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, basis_A, basis_B, products, heads = ctx.saved_tensors
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
            grad_products = _products_gradient(x_rows, grad_rows, basis_A, basis_B, products, heads)
        return grad_x, grad_weight, grad_bias, None, None, grad_products, None


def _products_gradient(
    x: torch.Tensor,
    grad: torch.Tensor,
    basis_A: torch.Tensor,
    basis_B: torch.Tensor,
    products: torch.Tensor,
    heads: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient of the products, `[h, r, r]`, which is 0 except for the given heads."""
    num_heads, r, _ = products.shape
    if heads is None:
        return _gradient_of_heads(x, grad, basis_A, basis_B, num_heads, r)
    A_of_heads, B_of_heads = _rows_of(basis_A, heads, r), _columns_of(basis_B, heads, r)
    return _among_all(_gradient_of_heads(x, grad, A_of_heads, B_of_heads, len(heads), r), heads, products)


def _gradient_of_heads(
    x: torch.Tensor, grad: torch.Tensor, basis_A: torch.Tensor, basis_B: torch.Tensor, num_heads: int, r: int
) -> torch.Tensor:
    """`B_i^T (grad^T x) A_i^T`, `[h, r, r]`, in the cheaper of two orders."""
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
    heads: torch.Tensor | None = None,
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
        heads (`torch.Tensor`, *optional*): The heads that get a gradient, as for [`expand`].

    Returns:
        `torch.Tensor`: `[..., d_out]`.
    """
    return _AdaptedLinear.apply(x, weight, bias, basis_A, basis_B, scaled_cores(core, scaling), heads)
