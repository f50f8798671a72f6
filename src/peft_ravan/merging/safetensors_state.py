"""Uploads that stay in their files until a merge asks for them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch
from safetensors import safe_open


class SafetensorsState(Mapping):
    """
    The tensors of a safetensors file by name. Each is read when it is requested, and not kept. A merge that works
    layer by layer then needs the memory of one layer only.

    Args:
        path (`str` or `os.PathLike`): The file.

    Raises:
        FileNotFoundError: if there is no such file.
        safetensors.SafetensorError: if it is not a safetensors file, or is truncated.
    """

    def __init__(self, path: str | os.PathLike):
        self._file = safe_open(path, framework="pt")
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # the method of Mapping would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
