"""
How the tensors of a round are made small on their way between a server and its clients, and what they mean there.

In float32, tensors are sent as they are. Otherwise clients upload the change of each tensor, which is smaller than the
tensor itself and can be rounded to fewer bits. The server adds it to its own tensor and not to the rounded one that it
has sent, so what rounding costs a download never enters the state of the server.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from peft_ravan.merging import UpdateError
from peft_ravan.merging.changes import working_dtype

from .quantization import (
    BLOCK_SIZE,
    LEVELS,
    SENT_DTYPES,
    QuantizedTensor,
    dequantize,
    quantize,
    to_bfloat16,
)
from .seeds import derive_seed


# the defaults of the arguments of a federated trainer
DEFAULT_UPLOAD_DTYPE = "int4"
DEFAULT_DOWNLOAD_DTYPE = "float32"

State = Mapping[str, torch.Tensor]
# tensors of which some may be quantized
SentState = Mapping[str, torch.Tensor | QuantizedTensor]


@dataclass(frozen=True)
class ExchangeSettings:
    """
    How tensors are sent.

    Args:
        upload_dtype (`str`, *optional*, defaults to `"float32"`): What clients round their uploads to, one of
            `SENT_DTYPES`. `"float32"` stands for the dtypes of the adapter.
        download_dtype (`str`, *optional*, defaults to `"float32"`): What the server rounds to.
        exact (`tuple[str, ...]`, *optional*): The names of tensors that the server sends as they are, such as running
            statistics, which may not become zero or negative.
        masked (`bool`, *optional*, defaults to `False`): Whether clients mask what they upload, so that only its sum over
            clients can be read. They mask changes that are not rounded before, whatever `upload_dtype` is.

    Raises:
        ValueError: if there is no such dtype.
    """

    upload_dtype: str = "float32"
    download_dtype: str = "float32"
    exact: tuple[str, ...] = ()
    masked: bool = False

    def __post_init__(self):
        for name in ("upload_dtype", "download_dtype"):
            value = getattr(self, name)
            if value not in SENT_DTYPES:
                raise ValueError(f"`{name}` must be one of {', '.join(SENT_DTYPES)}, got {value!r}.")

    @property
    def change_dtype(self) -> str | None:
        """
        The dtype of the changes that clients upload, or `None` if they upload whole tensors. They also upload changes
        if only downloads are rounded.
        """
        if self.masked:
            return "float32"
        return None if self.upload_dtype == self.download_dtype == "float32" else self.upload_dtype

    def sparing(self, names: Collection[str]) -> ExchangeSettings:
        """
        Args:
            names (`Collection[str]`): The names of tensors.

        Returns:
            [`ExchangeSettings`]: The same settings, with these tensors sent as they are.
        """
        return replace(self, exact=tuple(names))

    def sent(self, state: State) -> SentState:
        """
        Args:
            state (`Mapping[str, torch.Tensor]`): A state of the server.

        Returns:
            `Mapping[str, torch.Tensor | QuantizedTensor]`: What clients are sent, rounded to the nearest values, since
            the server keeps what is not sent.
        """
        return compress(state, self.download_dtype, exact=self.exact)

    def describe(self) -> str:
        """
        Returns:
            `str`: How tensors are sent, for a card.
        """
        names = [
            f"{dtype} in blocks of {BLOCK_SIZE}" if dtype in LEVELS else dtype
            for dtype in (self.upload_dtype, self.download_dtype)
        ]
        if self.masked:
            names[0] = "masked integers of 32 bits, of which the server sees only sums over clients"
        return f"uploads are changes in {names[0]}, downloads are in {names[1]}"


def compress(state: State, dtype: str, seed: int | None = None, exact: Collection[str] = ()) -> SentState:
    """
    Args:
        state (`Mapping[str, torch.Tensor]`): Tensors by name.
        dtype (`str`): One of `SENT_DTYPES`.
        seed (`int`, *optional*): The seed of stochastic rounding. By default numbers are rounded to the nearest values.
        exact (`Collection[str]`, *optional*): The names of tensors that are left as they are.

    Returns:
        `Mapping[str, torch.Tensor | QuantizedTensor]`: The tensors to send. Those that are not floating point, or already
        as small, are left as they are.
    """
    if dtype == "float32":
        return state
    sent = {}
    for name, tensor in state.items():
        if name in exact or not tensor.is_floating_point() or (dtype == "bfloat16" and tensor.itemsize <= 2):
            sent[name] = tensor
            continue
        # a generator for each tensor, so that the order of the tensors makes no difference
        generator = None if seed is None else torch.Generator().manual_seed(derive_seed(seed, name))
        sent[name] = to_bfloat16(tensor, generator) if dtype == "bfloat16" else quantize(tensor, dtype, generator)
    return sent


def decompress(state: SentState) -> State:
    """
    Args:
        state (`Mapping[str, torch.Tensor | QuantizedTensor]`): Tensors as they were sent.

    Returns:
        `Mapping[str, torch.Tensor]`: The tensors, in float32 where they were quantized.
    """
    if not any(isinstance(tensor, QuantizedTensor) for tensor in state.values()):
        return state
    return {
        name: dequantize(tensor) if isinstance(tensor, QuantizedTensor) else tensor for name, tensor in state.items()
    }


def changes(trained: State, start: State, trained_heads: State | None = None) -> dict[str, torch.Tensor]:
    """
    Args:
        trained (`Mapping[str, torch.Tensor]`): What a client has trained. Of the cores in `trained_heads` only the
            trained heads, `[k, r, r]`.
        start (`Mapping[str, torch.Tensor]`): What it was sent.
        trained_heads (`Mapping[str, torch.Tensor]`, *optional*): As in [`~peft_ravan.merging.ClientUpdate`].

    Returns:
        `dict[str, torch.Tensor]`: The differences, in at least float32. Tensors that are not floating point are
        returned as they are.

    Raises:
        UpdateError: if a tensor was not sent, or has another shape than the one that was sent.
    """
    differences = {}
    for name, tensor in trained.items():
        before = _part_of(start, name, tensor, trained_heads)
        # what was sent in another dtype was rounded when it was loaded into the model
        differences[name] = (
            tensor.to(working_dtype(tensor)) - before.to(tensor) if tensor.is_floating_point() else tensor
        )
    return differences


def with_changes(own: State, differences: State, trained_heads: State | None = None) -> dict[str, torch.Tensor]:
    """
    The inverse of [`changes`], at the server.

    Args:
        own (`Mapping[str, torch.Tensor]`): The state of the server.
        differences (`Mapping[str, torch.Tensor]`): The changes of a client.
        trained_heads (`Mapping[str, torch.Tensor]`, *optional*): As in [`~peft_ravan.merging.ClientUpdate`].

    Returns:
        `dict[str, torch.Tensor]`: What the client would have trained from that state, in the dtypes of the state.

    Raises:
        UpdateError: if a change does not fit the state.
    """
    changed = {}
    for name, tensor in differences.items():
        before = _part_of(own, name, tensor, trained_heads)
        if tensor.is_floating_point() != before.is_floating_point():
            raise UpdateError(f"tensor {name!r}: must be {before.dtype}, got {tensor.dtype}.")
        changed[name] = (
            (before.to(working_dtype(before)) + tensor.to(before.device)).to(before.dtype)
            if tensor.is_floating_point()
            else tensor
        )
    return changed


def _part_of(state: State, name: str, tensor: torch.Tensor, trained_heads: State | None) -> torch.Tensor:
    """The part of a state that a client has trained, on the device of the state."""
    if name not in state:
        raise UpdateError(f"tensor {name!r}: not expected in the update, since the client was not sent it.")
    part, mask = state[name], (trained_heads or {}).get(name)
    if mask is not None:
        is_mask = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool
        if not is_mask or not part.dim() or mask.shape != (len(part),):
            raise UpdateError(f"tensor {name!r}: trained_heads must be a bool tensor with one entry per head.")
        part = part[mask.to(part.device)]
    if part.shape != tensor.shape:
        raise UpdateError(
            f"tensor {name!r}: must have shape {tuple(part.shape)}, like the part of the state that it changes, got "
            f"{tuple(tensor.shape)}."
        )
    return part
