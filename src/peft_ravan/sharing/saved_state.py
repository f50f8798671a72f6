"""Checks the tensors of a saved adapter before their numbers are used to compute or allocate anything."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import psutil
import torch

from ..merging.lora import lora_targets
from ..tuner.bases import BasesShape
from ..tuner.saved_bases import LAYER_KINDS
from ..tuner.state import (
    BASES_NAMES,
    CORE_NAME,
    FINGERPRINT_NAME,
    LAYER_NAME,
    SCALING_NAME,
    is_basis,
    is_core,
    is_record,
    is_scaling,
)


# in the record of a layer, the number of its kind is followed by its sizes
_NUM_SIZES = {"conv2d": 4}
_KINDS = (CORE_NAME, SCALING_NAME, *BASES_NAMES, FINGERPRINT_NAME, LAYER_NAME)


def check_saved_state(state: Mapping[str, torch.Tensor]) -> None:
    """
    Args:
        state (`Mapping[str, torch.Tensor]`): The tensors of a Ravan adapter by their checkpoint names.

    Raises:
        ValueError: if a tensor of a target is missing, or its shape or dtype does not match the others.
    """
    targets = {name.removesuffix(f".{CORE_NAME}") for name in state if name.endswith(f".{CORE_NAME}")}
    if not targets:
        raise ValueError(f"There is no tensor of the name {CORE_NAME!r}, the cores of the heads.")
    for name in filter(_is_ravan, state):
        target, _, kind = name.rpartition(".")
        if target not in targets or kind not in _KINDS:
            raise ValueError(f"There is a tensor {name!r}, but none of the name {CORE_NAME!r} beside it.")
    for target in sorted(targets):
        _check_target(state, target)


def check_saved_lora_state(state: Mapping[str, torch.Tensor]) -> None:
    """
    Args:
        state (`Mapping[str, torch.Tensor]`): The tensors of a LoRA adapter by their checkpoint names.

    Raises:
        ValueError: if one of the two matrices of a target is missing or is not a matrix, or if there are tensors of
            Ravan.
    """
    for name in filter(_is_ravan, state):
        raise ValueError(f"There is a Ravan tensor, {name!r}, but this is a LoRA adapter.")
    for target in lora_targets(state):
        for name in (target.A_name, target.B_name):
            if name not in state:
                raise ValueError(f"The tensor {name!r} is missing.")
            if state[name].dim() < 2 or not state[name].numel() or not state[name].is_floating_point():
                raise ValueError(f"{name} must be a matrix of floating point numbers, got {_shown(state[name])}.")


def _is_ravan(name: str) -> bool:
    return is_core(name) or is_scaling(name) or is_basis(name) or is_record(name)


def _check_target(state: Mapping[str, torch.Tensor], target: str) -> None:
    core = state[f"{target}.{CORE_NAME}"]
    if core.dim() != 3 or core.shape[1] != core.shape[2] or not core.numel() or not core.is_floating_point():
        raise ValueError(
            f"{target}.{CORE_NAME} must be floating point numbers of shape [h, r, r], got {_shown(core)}."
        )
    _check_shape(state, f"{target}.{SCALING_NAME}", (len(core),), "one number for each head")
    num_bases = sum(f"{target}.{name}" in state for name in BASES_NAMES)
    sizes = _check_record(state, target)
    if num_bases:
        _check_bases(state, target, sizes)
    elif f"{target}.{FINGERPRINT_NAME}" in state:
        fingerprint = state[f"{target}.{FINGERPRINT_NAME}"]
        if fingerprint.dim() != 2 or not len(fingerprint) or len(core) % len(fingerprint) or fingerprint.shape[1] != 8:
            raise ValueError(f"{target}.{FINGERPRINT_NAME} must have the shape [h, 8], got {_shown(fingerprint)}.")


def _check_bases(state: Mapping[str, torch.Tensor], target: str, sizes: tuple[int, ...] | None) -> None:
    num_cores, r, _ = state[f"{target}.{CORE_NAME}"].shape
    rows, columns = (state.get(f"{target}.{name}") for name in BASES_NAMES)
    if rows is None or columns is None:
        raise ValueError(f"{target} has one of {' and '.join(BASES_NAMES)} only.")
    name = f"{target}.{BASES_NAMES[0]}"
    if rows.dim() != 2 or not rows.numel() or not rows.is_floating_point():
        raise ValueError(f"{name} must be floating point numbers of shape [h * r, d_in], got {_shown(rows)}.")
    if len(rows) % r or num_cores % (len(rows) // r):
        raise ValueError(
            f"{name} has {len(rows)} rows, which are not those of the heads of {num_cores} cores of rank {r}."
        )
    d_out = sizes[0] if sizes is not None else len(columns) if columns.dim() else 1
    _check_shape(state, f"{target}.{BASES_NAMES[1]}", (d_out, len(rows)), "[d_out, h * r]")
    if sizes is not None and prod(sizes[1:]) != rows.shape[1]:
        raise ValueError(
            f"{target}.{LAYER_NAME} says d_in = {prod(sizes[1:])}, but {name} has {rows.shape[1]} columns."
        )


def _check_record(state: Mapping[str, torch.Tensor], target: str) -> tuple[int, ...] | None:
    """The sizes of the layer, if it has a record."""
    record = state.get(f"{target}.{LAYER_NAME}")
    if record is None:
        return None
    if record.dim() == 1 and len(record) and record.dtype == torch.int64:
        number, *sizes = record.tolist()
        kind = LAYER_KINDS[number] if 0 <= number < len(LAYER_KINDS) else None
        if kind is not None and len(sizes) == _NUM_SIZES.get(kind, 2) and min(sizes) > 0:
            return tuple(sizes)
    raise ValueError(
        f"{target}.{LAYER_NAME} must be the number of a kind of layer and its sizes, integers, got {_shown(record)}."
    )


def _check_shape(state: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...], what: str) -> None:
    if name not in state:
        raise ValueError(f"The tensor {name!r} is missing.")
    if tuple(state[name].shape) != shape or not state[name].is_floating_point():
        raise ValueError(f"{name} must be {what}, {list(shape)}, got {_shown(state[name])}.")


def _shown(tensor: torch.Tensor) -> str:
    values = f" {tensor.tolist()}" if tensor.dim() == 1 and 0 < len(tensor) <= 5 else ""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{values}"


def check_memory(shape: BasesShape, target_name: str) -> None:
    """
    Check that there is enough memory for bases that are not in a file. Nothing else in the file confirms the size that
    it claims for them.

    Args:
        shape ([`BasesShape`]): The shape of the bases.
        target_name (`str`): The name of the target, for the message.

    Raises:
        ValueError: if there is not enough memory to make them.
    """
    # generated and decomposed in float64, with one copy, and stored in float32
    needed, available = 20 * shape.total_rank * (shape.d_in + shape.d_out), psutil.virtual_memory().available
    if needed > available:
        raise ValueError(
            f"The bases of {target_name!r} are not in the file, which says that the layer has d_in = {shape.d_in} and d_out = "
            f"{shape.d_out}: making those of {shape.num_heads} heads of rank {shape.r} takes {needed / 1e9:,.0f} GB, "
            f"but only {available / 1e9:,.0f} GB of memory are free."
        )
