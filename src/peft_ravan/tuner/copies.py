"""
Several copies of one Ravan layer at once, which differ in H and s only: as for clients that train the same adapter, each on
its own rows of a common batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .functional import expand
from .linear import Linear


def forward_of_copies(copies: Sequence[Linear], x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """
    The output of copies of a layer with one active adapter, each for its own rows of the input. The base weight and the
    bases, which they share, are applied to all rows at once.

    Args:
        copies (`Sequence[Linear]`): K copies of a layer.
        x (`torch.Tensor`): The input, `[n_1 + ... + n_K, ..., d_in]`.
        sizes (`Sequence[int]`): The rows of each copy, n_1 to n_K.

    Returns:
        `torch.Tensor`: The output, `[n_1 + ... + n_K, ..., d_out]`.
    """
    layer = copies[0]
    [adapter] = layer.active_adapters
    result = layer.base_layer(x)
    tensors = [copy.adapter_tensors(adapter) for copy in copies]
    basis_A, basis_B, _, _ = tensors[0]
    cores = torch.stack([core for _, _, core, _ in tensors])  # [K, h, r, r]
    scalings = torch.stack([scaling for *_, scaling in tensors])  # [K, h]
    if layer.cast_input_dtype_enabled:
        x = layer._cast_input_dtype(x, basis_A.dtype)
    else:
        basis_A, basis_B, cores, scalings = (tensor.to(x.dtype) for tensor in (basis_A, basis_B, cores, scalings))
    inner = F.linear(layer.ravan_dropout[adapter](x), basis_A)  # [n_1 + ... + n_K, ..., h*r]
    if len(set(sizes)) == 1:
        delta = F.linear(_mix_of_copies(inner, scalings[..., None, None] * cores), basis_B)
    else:
        parts = zip(inner.split(list(sizes)), cores, scalings, strict=True)
        delta = torch.cat([expand(part, basis_B, core, scaling) for part, core, scaling in parts])
    return (result + delta).to(result.dtype)


def _mix_of_copies(inner: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """`P_i u_i` of all heads of all copies, for products P_i = s_i H_i, `[K, h, r, r]`, and the same rows for each."""
    num_copies, num_heads, r, _ = products.shape
    per_head = inner.reshape(num_copies, -1, num_heads, r).transpose(1, 2)  # [K, h, n, r]
    return (per_head @ products.transpose(2, 3)).transpose(1, 2).reshape(inner.shape)
