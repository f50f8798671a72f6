"""
The part of an adapter that a server and its clients exchange, by the names of the adapter's checkpoint.

A Ravan checkpoint has four tensors per target. In a checkpoint without bases, a fingerprint and a record of the layer
replace two of them. Only the products s*H are sent, under the name of the core: the bases are common and frozen, and s
and H have no meaning of their own outside of the client that trained them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from .functional import scaled_cores


CORE_NAME = "ravan_H"
SCALING_NAME = "ravan_s"
BASES_NAMES = ("ravan_A", "ravan_B")
FINGERPRINT_NAME = "ravan_fingerprint"
LAYER_NAME = "ravan_layer"


def is_core(name: str) -> bool:
    """Whether a checkpoint name is that of a core, whose tensor holds one `r x r` matrix per head: `[h, r, r]`."""
    return name.endswith(CORE_NAME)


def is_scaling(name: str) -> bool:
    """Whether a checkpoint name is that of the heads' scalings, `[h]`."""
    return name.endswith(SCALING_NAME)


def is_basis(name: str) -> bool:
    """Whether a checkpoint name is that of a frozen basis."""
    return name.endswith(BASES_NAMES)


def is_record(name: str) -> bool:
    """Whether a checkpoint name is that of a record of the bases or the layer, which is no parameter or buffer."""
    return name.endswith((FINGERPRINT_NAME, LAYER_NAME))


def has_part(name: str, parts: Iterable[str]) -> bool:
    """Whether a name contains one of the given parts, such as `".lora_A."`."""
    return any(part in name for part in parts)


def scaling_name(core_name: str) -> str:
    """The checkpoint name of the scalings that belong to a core."""
    return core_name.removesuffix(CORE_NAME) + SCALING_NAME


def exchange_state(checkpoint: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Reduce an adapter's checkpoint to what is exchanged: s*H under the names of the cores, and all other tensors
    (LoRA's matrices, the task head) as they are, without scalings, bases and records.

    Args:
        checkpoint (`Mapping[str, torch.Tensor]`):
            Checkpoint names to tensors, as returned by `peft.get_peft_model_state_dict`. A core without scalings is
            treated as a product.

    Returns:
        `dict[str, torch.Tensor]`: The tensors to send, in the order of the checkpoint. Tensors that are not products
        are taken from the checkpoint without a copy.
    """
    state = {}
    for name, tensor in checkpoint.items():
        if is_scaling(name) or is_basis(name) or is_record(name):
            continue
        if is_core(name) and scaling_name(name) in checkpoint:
            tensor = scaled_cores(tensor, checkpoint[scaling_name(name)])
        state[name] = tensor
    return state


def checkpoint_state(
    state: Mapping[str, torch.Tensor], checkpoint: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    The inverse of [`exchange_state`]: put exchanged tensors back into a checkpoint. The scalings become 1, so that the
    product is the core. The bases do not change.

    Args:
        state (`Mapping[str, torch.Tensor]`): The exchanged tensors.
        checkpoint (`Mapping[str, torch.Tensor]`): The checkpoint whose names and remaining tensors are kept.

    Returns:
        `dict[str, torch.Tensor]`: The names of `checkpoint`, in its order.
    """
    return {
        name: state[name] if name in state else torch.ones_like(tensor) if is_scaling(name) else tensor
        for name, tensor in checkpoint.items()
    }
