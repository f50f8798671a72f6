"""
What of an adapter travels between a server and its clients, by the names of the adapter's checkpoint.

A Ravan checkpoint has four tensors a target; one without bases has a fingerprint and a record of the layer in the place
of two of them. Only the products s*H travel, under the name of the core: the bases are
common and frozen, and s and H have no meaning of their own once they leave the client that trained them.
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
    """Whether a checkpoint name is that of a core, whose tensor holds one `r x r` matrix a head: `[h, r, r]`."""
    return name.endswith(CORE_NAME)


def is_scaling(name: str) -> bool:
    """Whether a checkpoint name is that of the heads' scalings, `[h]`."""
    return name.endswith(SCALING_NAME)


def is_basis(name: str) -> bool:
    """Whether a checkpoint name is that of a frozen basis."""
    return name.endswith(BASES_NAMES)


def is_record(name: str) -> bool:
    """Whether a checkpoint name is that of a fact about the bases or the layer, which no parameter or buffer holds."""
    return name.endswith((FINGERPRINT_NAME, LAYER_NAME))


def has_part(name: str, parts: Iterable[str]) -> bool:
    """Whether one of some parts of names, such as `".lora_A."`, is in a name."""
    return any(part in name for part in parts)


def scaling_name(core_name: str) -> str:
    """The checkpoint name of the scalings that belong to a core."""
    return core_name.removesuffix(CORE_NAME) + SCALING_NAME


def exchange_state(checkpoint: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Reduce an adapter's checkpoint to what travels: s*H under the names of the cores, and all that is neither a scaling
    nor a basis nor a record of one (LoRA's matrices, the task head) as it is.

    Args:
        checkpoint (`Mapping[str, torch.Tensor]`):
            Checkpoint names to tensors, as `peft.get_peft_model_state_dict` gives them. A core without scalings is
            taken to be a product already.

    Returns:
        `dict[str, torch.Tensor]`: The tensors that travel, in the order of the checkpoint. Those that are not products
        are the tensors of the checkpoint themselves, not copies.
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
    The inverse of [`exchange_state`]: put tensors that travelled back into a checkpoint. The scalings become 1, so that
    the product is the core; the bases stay.

    Args:
        state (`Mapping[str, torch.Tensor]`): The tensors that travelled.
        checkpoint (`Mapping[str, torch.Tensor]`): The checkpoint whose names and remaining tensors are kept.

    Returns:
        `dict[str, torch.Tensor]`: The names of `checkpoint`, in its order.
    """
    return {
        name: state[name] if name in state else torch.ones_like(tensor) if is_scaling(name) else tensor
        for name, tensor in checkpoint.items()
    }
