"""
Tensors with few bits a number: blocks of numbers that share a scale, as in QSGD (Alistarh et al., NeurIPS 2017).

A number is sent as an integer, its multiple of the scale of its block. Stochastic rounding makes this unbiased: a number
between two multiples becomes one or the other, so that its expected value is the number itself. The mean over many
clients therefore comes out right, although each client forgets what rounding has cost it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


BLOCK_SIZE = 64
# the largest code of each dtype; codes are symmetric, so that 0 is exact
LEVELS = {"int8": 127, "int4": 7}
SENT_DTYPES = ("float32", "bfloat16", *LEVELS)
_SMALLEST_SCALE = torch.finfo(torch.bfloat16).tiny


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """
    A tensor as integers and scales.

    Args:
        codes (`torch.Tensor`): One integer a number: int8 `[n]`, or for `"int4"` uint8 `[ceil(n / 2)]` with two numbers
            in a byte, the first one in the lower half.
        scales (`torch.Tensor`): The scales of the blocks, bfloat16 `[ceil(n / 64)]`.
        shape (`tuple[int, ...]`): The shape of the tensor.
        dtype (`str`): `"int8"` or `"int4"`.

    Raises:
        ValueError: if these do not fit together.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self):
        sizes = code_sizes(self.dtype, math.prod(self.shape))
        dtypes = (code_dtype(self.dtype), torch.bfloat16)
        for tensor, size, dtype in zip((self.codes, self.scales), sizes, dtypes, strict=True):
            if tensor.shape != (size,) or tensor.dtype != dtype:
                raise ValueError(
                    f"A tensor of shape {tuple(self.shape)} in {self.dtype} needs {size} numbers of {dtype}, got "
                    f"{tensor.dtype} of shape {tuple(tensor.shape)}."
                )


def code_dtype(dtype: str) -> torch.dtype:
    """
    Args:
        dtype (`str`): `"int8"` or `"int4"`.

    Returns:
        `torch.dtype`: The dtype of the codes.
    """
    return torch.int8 if dtype == "int8" else torch.uint8


def code_sizes(dtype: str, numel: int) -> tuple[int, int]:
    """
    Args:
        dtype (`str`): `"int8"` or `"int4"`.
        numel (`int`): How many numbers a tensor has.

    Returns:
        `tuple[int, int]`: The number of its codes, in bytes, and the number of its scales, of two bytes each.
    """
    return (numel if dtype == "int8" else -(-numel // 2)), -(-numel // BLOCK_SIZE)


def quantize(tensor: torch.Tensor, dtype: str, generator: torch.Generator | None = None) -> QuantizedTensor:
    """
    Args:
        tensor (`torch.Tensor`): A floating point tensor of any shape. It is rounded to float32 first.
        dtype (`str`): `"int8"` or `"int4"`.
        generator (`torch.Generator`, *optional*): The random numbers of stochastic rounding. By default numbers are
            rounded to the nearest multiple.

    Returns:
        [`QuantizedTensor`]: The tensor. A number differs from the original by less than the scale of its block, and on
        average by nothing. A block with NaN or infinity becomes NaN as a whole.
    """
    numbers = tensor.detach().cpu().float().reshape(-1)
    blocks = torch.nn.functional.pad(numbers, (0, -len(numbers) % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    scales = _scales(blocks.abs().amax(dim=1), LEVELS[dtype])
    usable = scales > 0  # neither zero nor NaN
    multiples = torch.where(usable[:, None], blocks, 0) / torch.where(usable, scales.float(), 1)[:, None]
    if generator is None:
        codes = multiples.round()
    else:
        below = multiples.floor()
        # compared with the remainder and not added: a sum near an integer would be rounded up to it
        codes = below + (torch.rand(multiples.shape, generator=generator) < multiples - below)
    codes = codes.to(torch.int8).reshape(-1)[: len(numbers)]
    return QuantizedTensor(codes if dtype == "int8" else _packed(codes), scales, tuple(tensor.shape), dtype)


def dequantize(quantized: QuantizedTensor) -> torch.Tensor:
    """
    Args:
        quantized ([`QuantizedTensor`]): A tensor as integers and scales.

    Returns:
        `torch.Tensor`: The tensor in float32.
    """
    numel = math.prod(quantized.shape)
    codes = quantized.codes if quantized.dtype == "int8" else _unpacked(quantized.codes, numel)
    return (codes * quantized.scales.float().repeat_interleave(BLOCK_SIZE)[:numel]).view(quantized.shape)


def to_bfloat16(tensor: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    Args:
        tensor (`torch.Tensor`): A floating point tensor. It is rounded to float32 first.
        generator (`torch.Generator`, *optional*): The random numbers of stochastic rounding. By default numbers are
            rounded to the nearest one.

    Returns:
        `torch.Tensor`: The tensor in bfloat16, on the CPU. NaN and infinity stay what they are.
    """
    numbers = tensor.detach().cpu().float()
    if generator is None:
        return numbers.bfloat16()
    # bfloat16 is the upper half of float32, so a random lower half is added and the sum cut off
    noise = torch.randint(2**16, numbers.shape, generator=generator, dtype=torch.int32)
    rounded = (numbers.view(torch.int32) + noise & -(2**16)).view(torch.float32)
    return torch.where(numbers.isfinite(), rounded, numbers).bfloat16()


def _scales(largest: torch.Tensor, levels: int) -> torch.Tensor:
    """The scales of blocks by their largest absolute values, rounded up, so that no code is above `levels`."""
    nearest = (largest / levels).bfloat16()
    next_larger = (nearest.view(torch.int16) + 1).view(torch.bfloat16)
    # the product is exact: it has 8 bits of the scale and at most 7 of `levels`
    scales = torch.where(nearest.float() * levels < largest, next_larger, nearest)
    # subnormal scales would be lost where they are flushed to zero
    scales = torch.where(largest > 0, scales.clamp(min=_SMALLEST_SCALE), 0)
    return torch.where(largest.isfinite(), scales, math.nan)


def _packed(codes: torch.Tensor) -> torch.Tensor:
    halves = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(torch.uint8) & 0xF
    return halves[0::2] | halves[1::2] << 4


def _unpacked(packed: torch.Tensor, numel: int) -> torch.Tensor:
    halves = torch.stack([packed & 0xF, packed >> 4], dim=1).reshape(-1)[:numel]
    return (halves ^ 8).to(torch.int8) - 8  # the fourth bit is the sign
