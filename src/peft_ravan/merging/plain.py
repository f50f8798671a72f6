"""Converts what a client sends into what merge methods can rely on: plain dense tensors, read once."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from peft import LoraConfig

from .safetensors_state import SafetensorsState
from .updates import ClientUpdate, UpdateError


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# float64, in which weights are computed, cannot represent every integer above this
MAX_NUM_EXAMPLES = 2**53
# names of tensors and clients appear in messages and records
MAX_NAME_LENGTH = 1000


def plain_update(update: Any, client: str = "") -> ClientUpdate:
    """
    Read an upload once and convert it to a plain one: a dict of dense tensors. Anything that cannot be converted is
    refused, whatever error it raises. Whether the upload fits an adapter is not checked.

    Args:
        update (`Any`): What was received. It should be a [`ClientUpdate`].
        client (`str`, *optional*): The name of the sender, for messages. By default the name in the update.

    Returns:
        [`ClientUpdate`]: A new update. Its tensors share memory with the received ones and have no gradients. A
        [`SafetensorsState`] stays in its file.

    Raises:
        UpdateError: if it is not a [`ClientUpdate`], or one of its fields is invalid.
    """
    try:
        if not isinstance(update, ClientUpdate):
            raise UpdateError(f"{client or 'a client'}: must upload a ClientUpdate, got {type(update).__name__}.")
        client_id = update.client_id
        _check_name(client_id, "names of clients", client or "a client")
        client = client or (f"client {client_id!r}" if client_id else "a client without a name")
        return ClientUpdate(
            _plain_state(update.state, client),
            _plain_num_examples(update.num_examples, client),
            client_id,
            _plain_heads(update.trained_heads, client),
            _plain_config(update.config, client),
        )
    except UpdateError:
        raise
    except Exception as error:  # objects that claim to be a mapping, a tensor or a number can raise anything
        reason = f"{type(error).__name__}: {error}"[:MAX_NAME_LENGTH]
        raise UpdateError(f"{client or 'a client'}: its update cannot be read ({reason}).") from error


def _plain_state(state: Any, client: str) -> Mapping[str, torch.Tensor]:
    if isinstance(state, SafetensorsState):
        for name in state:
            _check_name(name, "the names in state", client)
        return state  # its tensors are the same whenever they are read
    tensors = _items(state, "state", client)
    plain = {name: _plain_tensor(tensor, f"{client}, tensor {name!r}:") for name, tensor in tensors.items()}
    for name, tensor in plain.items():
        if tensor.dtype not in DTYPES:
            raise UpdateError(f"{client}, tensor {name!r}: must be a floating point tensor, got {tensor.dtype}.")
    return plain


def _items(mapping: Any, field: str, client: str) -> dict[str, Any]:
    if not isinstance(mapping, Mapping):
        raise UpdateError(f"{client}: {field} must map names to tensors, got {type(mapping).__name__}.")
    items = {}
    for name in mapping:
        _check_name(name, f"the names in {field}", client)
        items[name] = mapping[name]
    return items


def _check_name(name: Any, what: str, client: str) -> None:
    # a subclass could define comparison and hashing as it likes
    if type(name) is not str or len(name) > MAX_NAME_LENGTH:
        found = f"one of {len(name):,}" if type(name) is str else type(name).__name__
        raise UpdateError(f"{client}: {what} must be strings of at most {MAX_NAME_LENGTH:,} characters, got {found}.")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UpdateError(f"{client}: {what} must be text that can be written as UTF-8, got {name!r}.") from None


def _plain_tensor(tensor: Any, where: str, kind: str = "a floating point tensor") -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise UpdateError(f"{where} must be {kind}, got {type(tensor).__name__}.")
    found = _why_not_plain(tensor)
    if found:
        raise UpdateError(f"{where} must be {kind} of plain, dense memory, got {found}. Convert it before the upload.")
    return tensor.detach()


def _why_not_plain(tensor: torch.Tensor) -> str | None:
    # other classes, such as those of quantized tensors, say nothing reliable about their memory
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        return f"a tensor with the layout {tensor.layout}"
    if tensor.is_quantized:
        return f"a quantized tensor ({tensor.dtype})"
    if tensor.is_meta:
        return "a tensor on the meta device, without values"
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * step for size, step in steps)
    if tensor.numel() and (last + 1) * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "a tensor whose memory was freed"
    return None


def _plain_num_examples(num_examples: Any, client: str) -> int:
    # NumPy integers are accepted, too; bool is an integer by inheritance only
    is_integer = hasattr(type(num_examples), "__index__") and not isinstance(num_examples, (bool, torch.Tensor))
    count = operator.index(num_examples) if is_integer else 0
    if not is_integer or not 1 <= count <= MAX_NUM_EXAMPLES:
        shown = repr(num_examples) if not is_integer or abs(count) <= MAX_NUM_EXAMPLES else "a larger one"
        raise UpdateError(
            f"{client}: num_examples must be an integer of 1 or more, and at most 2**53, since it weighs the mean, got "
            f"{shown}. Leave out clients that did not train."
        )
    return int(count)


def _plain_heads(trained_heads: Any, client: str) -> dict[str, torch.Tensor] | None:
    if trained_heads is None:
        return None
    masks = {}
    for name, mask in _items(trained_heads, "trained_heads", client).items():
        if mask is None:
            continue
        where = f"{client}, tensor {name!r}: trained_heads"
        mask = _plain_tensor(mask, where, "a bool tensor")
        masks[name] = mask.cpu()
    return masks or None


def _plain_config(config: Any, client: str) -> LoraConfig | None:
    if config is None:
        return None
    if not isinstance(config, LoraConfig):
        raise UpdateError(f"{client}: its config must be a LoraConfig, got {type(config).__name__}.")
    numbers = {"r": config.r, "lora_alpha": config.lora_alpha}
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, field) or {}
        for key, value in pattern.items():
            _check_pattern(key, f"{client}: `{field}` of its config")
            numbers[f"{field}[{key!r}]"] = value
    for name, value in numbers.items():
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or not 0 < value < MAX_NUM_EXAMPLES or not math.isfinite(value):
            raise UpdateError(f"{client}: `{name}` of its config must be a number above 0, got {value!r}.")
    return config


def _check_pattern(pattern: Any, where: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise UpdateError(f"{where} has {pattern!r}, which is not a regular expression ({error}).") from error
