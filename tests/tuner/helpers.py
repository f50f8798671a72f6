"""Helpers for the tests of the tuner."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def random_layer(d_in, d_out, num_heads, r, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    basis_A, basis_B = draw(num_heads * r, d_in), draw(d_out, num_heads * r)
    core, scaling = draw(num_heads, r, r).requires_grad_(), draw(num_heads).requires_grad_()
    return draw(d_out, d_in), draw(d_out), basis_A, basis_B, core, scaling


def tokens():
    return torch.randint(0, 30, (4, 9))


LAYERS = {
    "Linear": (lambda: nn.Linear(20, 14), lambda: torch.randn(4, 9, 20)),
    "Linear without bias": (lambda: nn.Linear(20, 14, bias=False), lambda: torch.randn(4, 9, 20)),
    "Conv1D": (lambda: Conv1D(14, 20), lambda: torch.randn(4, 9, 20)),
    "Embedding": (lambda: nn.Embedding(30, 16), tokens),
    "Conv2d": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), lambda: torch.randn(4, 6, 9, 9)),
    "Conv2d with another padding": (
        lambda: nn.Conv2d(6, 10, (3, 1), padding=(1, 0), padding_mode="circular", dilation=(2, 1)),
        lambda: torch.randn(4, 6, 9, 9),
    ),
    "Conv2d pointwise": (lambda: nn.Conv2d(6, 10, 1), lambda: torch.randn(4, 6, 9, 9)),
    "Conv2d in groups": (lambda: nn.Conv2d(6, 10, 3, groups=2), lambda: torch.randn(4, 6, 9, 9)),
}
