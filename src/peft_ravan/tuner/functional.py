"""
The arithmetic of one Ravan layer: the weight update, and the output it adds, without loops over heads.

Shapes: T tokens (all leading dimensions of the input combined), d_in, d_out, h heads of rank r. What the bases project
is laid out with the tokens last, `[h*r, T]`. Each head is then one block of memory, and matrix products are faster than
with `[T, h*r]`, where the length of a row is rarely a multiple of what the hardware works with.
"""

from __future__ import annotations

import torch


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


def by_head(projected: torch.Tensor, num_heads: int) -> torch.Tensor:
    """A view of `[h*r, n]` as `[h, r, n]`."""
    return projected.unflatten(0, (num_heads, -1))


def mix(projected: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """The columns of `[h*r, n]`, the part of each head multiplied by its product P_i, `[h, r, r]`."""
    return torch.bmm(products, by_head(projected, len(products))).flatten(0, 1)


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
    return basis_B @ mix(basis_A, scaled_cores(core, scaling))


def _sum_over_heads(
    inner: torch.Tensor, basis_B: torch.Tensor, products: torch.Tensor, result: torch.Tensor | None
) -> torch.Tensor:
    """`sum_i B_i P_i u_i`, `[T, d_out]`, of the columns u of inner `[h*r, T]`, added to a result if there is one."""
    mixed = mix(inner, products)
    return mixed.T @ basis_B.T if result is None else torch.addmm(result, mixed.T, basis_B.T)


class _ExpandSomeHeads(torch.autograd.Function):
    """[`_sum_over_heads`], which saves and differentiates only what the products of the given heads need."""

    @staticmethod
    def forward(ctx, inner, basis_B, products, result, heads):
        inner_heads = by_head(inner, len(products))[heads]  # [k, r, T]
        ctx.save_for_backward(inner_heads, basis_B, products, heads)
        return _sum_over_heads(inner, basis_B, products, result)

    @staticmethod
    def backward(ctx, grad):
        inner_heads, basis_B, products, heads = ctx.saved_tensors
        grad_inner = None
        if ctx.needs_input_grad[0]:
            outer = basis_B.T @ grad.T  # [h*r, T]
            grad_inner = mix(outer, products.transpose(1, 2))
            outer = by_head(outer, len(products))[heads].flatten(0, 1)  # [k*r, T]
        else:
            outer = columns_of(basis_B, heads, products.shape[1]).T @ grad.T
        grad_heads = products_gradient(outer, inner_heads.flatten(0, 1), len(heads))
        grad_result = grad if ctx.needs_input_grad[3] else None
        return grad_inner, None, among_all(grad_heads, heads, products), grad_result, None


def products_gradient(outer: torch.Tensor, inner: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The gradient of the products, `[h, r, r]`, from both sides of the cores, `[h*r, T]`."""
    return torch.bmm(by_head(outer, num_heads), by_head(inner, num_heads).transpose(1, 2))


def columns_of(basis_B: torch.Tensor, heads: torch.Tensor, r: int) -> torch.Tensor:
    """The bases B of some heads, `[d_out, k*r]`."""
    return basis_B.reshape(len(basis_B), -1, r)[:, heads].flatten(1)


def rows_of(basis_A: torch.Tensor, heads: torch.Tensor, r: int) -> torch.Tensor:
    """The bases A of some heads, `[k*r, d_in]`."""
    return basis_A.reshape(-1, r, basis_A.shape[1])[heads].flatten(0, 1)


def among_all(grad_heads: torch.Tensor, heads: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Expand the gradient of some heads' products to all products, `[h, r, r]`, with zeros elsewhere."""
    return torch.zeros_like(products).index_copy_(0, heads, grad_heads.to(products.dtype))


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes products of x. `None` if it does not apply."""
    device = x.device.type
    # without data there is no autocast
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _expand_columns(
    inner: torch.Tensor,
    basis_B: torch.Tensor,
    products: torch.Tensor,
    heads: torch.Tensor | None,
    result: torch.Tensor | None,
) -> torch.Tensor:
    """`[T, d_out]`, of inner `[h*r, T]`. All have one dtype, so that autocast has nothing to change in a function."""
    if heads is None:
        return _sum_over_heads(inner, basis_B, products, result)
    return _ExpandSomeHeads.apply(inner, basis_B, products, result, heads)


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
    dtype = autocast_dtype(inner) or inner.dtype
    columns = inner.to(dtype).reshape(-1, inner.shape[-1]).T
    output = _expand_columns(columns, basis_B.to(dtype), scaled_cores(core, scaling).to(dtype), heads, None)
    return output.reshape(*inner.shape[:-1], len(basis_B))


def delta_output(
    x: torch.Tensor,
    basis_A: torch.Tensor,
    basis_B: torch.Tensor,
    core: torch.Tensor,
    scaling: torch.Tensor,
    heads: torch.Tensor | None = None,
    result: torch.Tensor | None = None,
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
        result (`torch.Tensor`, *optional*): What it is added to, `[..., d_out]`. It is not changed.

    Returns:
        `torch.Tensor`: `[..., d_out]`.
    """
    dtype = autocast_dtype(x) or x.dtype
    inner = basis_A.to(dtype) @ x.to(dtype).reshape(-1, x.shape[-1]).T  # [h*r, T]
    adds_within = result is not None and result.dtype == dtype
    rows = result.reshape(-1, len(basis_B)) if adds_within else None
    output = _expand_columns(inner, basis_B.to(dtype), scaled_cores(core, scaling).to(dtype), heads, rows)
    output = output.reshape(*x.shape[:-1], len(basis_B))
    return output if result is None or adds_within else result + output
