"""
Files of adapters without their bases, which all later versions of torch and of this package must still read.

They were written once, with torch 2.13.0, by

    python -m tests.tuner.small_files

and are never written again: bases that are computed differently must be refused, not accepted. A kind of bases without
a file is added by its own call of `write`.
"""

from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn

from peft_ravan import RavanConfig


FOLDER = Path(__file__).parent / "small_files"
KINDS = ("gram_schmidt", "normal", "constant", "shared", "weight_svd")


def make_base() -> nn.Module:
    """A model whose weights do not depend on random numbers and have well-separated singular values."""
    base = nn.Sequential(nn.Linear(24, 20), nn.Linear(20, 16))
    with torch.no_grad():
        for layer in base:
            d_out, d_in = layer.weight.shape
            angles = torch.outer(torch.arange(1, d_out + 1).double(), torch.arange(1, d_in + 1).double())
            Q = torch.linalg.qr(torch.sin(angles)).Q[:, :12]
            P = torch.linalg.qr(torch.cos(angles.T)).Q[:, :12]
            layer.weight.copy_(Q * 0.7 ** torch.arange(12) @ P.T)
            layer.bias.zero_()
    return base


def make_input() -> torch.Tensor:
    """`[3, 24]`"""
    return torch.sin(torch.arange(72.0)).reshape(3, 24)


def write(init_bases: str) -> None:
    """Write the file of one kind of bases, and print a part of what its model computes."""
    config = RavanConfig(
        r=3, num_heads=2, target_modules=["0", "1"], init_bases=init_bases, projection_seed=7, save_projection=False
    )
    model = get_peft_model(make_base(), config).eval()
    for number, layer in enumerate(model.base_model.model):
        core = torch.cos(torch.arange(18.0) + number).reshape(2, 3, 3)
        layer.ravan_H["default"].data.copy_(core)
        layer.ravan_s["default"].data.copy_(torch.tensor([0.5, -2.0]))
    model.save_pretrained(FOLDER / init_bases)
    (FOLDER / init_bases / "README.md").unlink()
    print(f"{init_bases}: {model(make_input())[0, :4].tolist()}")


if __name__ == "__main__":
    for kind in KINDS:
        write(kind)
