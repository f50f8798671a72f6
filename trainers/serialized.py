"""The size of tensors as a safetensors file, the format that clients and server exchange."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch


# the names that safetensors uses, in the order in which it lays out tensors
DTYPE_NAMES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16",
    torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_LAYOUT = {dtype: position for position, dtype in enumerate(DTYPE_NAMES)}


def serialized_bytes(state: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """
    Args:
        state (`Mapping[str, torch.Tensor]`): Tensors by name. They may be on the meta device.
        metadata (`Mapping[str, str]`, *optional*): The metadata of the file.

    Returns:
        `int`: The size of the tensors as a safetensors file, in bytes.
    """
    # computed, because serializing needs twice the memory of the tensors
    if any(tensor.dtype not in DTYPE_NAMES for tensor in state.values()):
        return len(safetensors.torch.save(dict(state), metadata))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name in sorted(state, key=lambda name: (_LAYOUT[state[name].dtype], name)):
        tensor = state[name]
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return 8 + len(text) + -len(text) % 8 + offset  # the length of the header, the header, padding, and the tensors
