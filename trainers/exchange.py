"""
What travels between a server and its clients: a task down, a reply up, and the bytes of both.

A message is a safetensors file. Its metadata hold the fields of the message as JSON, and which tensors it has; the tensors
themselves lie one after another, all of one dtype together, so that a small tensor costs no header of its own. The bytes
that a run counts are the bytes of this format.
"""

from __future__ import annotations

import base64
import functools
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, ClassVar, TypeVar

import safetensors
import safetensors.torch
import torch

from .serialized import DTYPE_NAMES, serialized_bytes


FORMAT_VERSION = 1
PURPOSES = ("train", "warm_up", "sketch")
# far above what an adapter has, and far below what it takes to fill a memory
MAX_HEADER_BYTES = 2**24
MAX_MANIFEST_BYTES = 2**25
MAX_TENSORS = 100_000
MAX_TEXT_LENGTH = 10_000

# what a message may have, in the order in which safetensors lays out tensors
_SENT = ("I64", "F64", "I32", "F32", "I16", "BF16", "F16", "I8", "U8", "BOOL")
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items() if name in _SENT}

State = Mapping[str, torch.Tensor]
AnyMessage = TypeVar("AnyMessage", bound="Message")
# the field that a tensor belongs to, its name, its dtype and its shape
Entry = tuple[str, str, str, tuple[int, ...]]
# makes of a JSON value the value of a field, or raises a ValueError that says what it must be
Check = Callable[[Any], Any]


class MessageError(ValueError):
    """Bytes that are no message of this version. Nothing of them was used."""


# ---- What the fields of a message may be -------------------------------------------


def _integer(least: int, most: int = 2**63 - 1) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"an integer from {least} to {most}")
        return value

    return check


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError("a number")
    return float(value)


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > MAX_TEXT_LENGTH:
        raise ValueError(f"a text of up to {MAX_TEXT_LENGTH} characters")
    return value


def _one_of(*choices: str) -> Check:
    def check(value: Any) -> str:
        if type(value) is not str or value not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return value

    return check


def _optional(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


# ---- Messages ----------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """What tasks and replies have in common: their bytes."""

    # the fields that hold tensors by name, or `None`; the others are JSON
    TENSOR_FIELDS: ClassVar[tuple[str, ...]] = ()
    JSON_FIELDS: ClassVar[Mapping[str, Check]] = {}

    def to_bytes(self) -> bytes:
        """
        Returns:
            `bytes`: The message.
        """
        by_dtype: dict[str, list[torch.Tensor]] = {}
        for section, name, dtype, _ in self._entries():
            by_dtype.setdefault(dtype, []).append(getattr(self, section)[name].detach().cpu().reshape(-1))
        return safetensors.torch.save({dtype: torch.cat(flat) for dtype, flat in by_dtype.items()}, self._metadata())

    @property
    def num_bytes(self) -> int:
        """The length of the message in bytes. The message is not made for this."""
        sizes: dict[str, int] = {}
        for _, _, dtype, shape in self._entries():
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
        flat = {dtype: torch.empty(size, dtype=_DTYPES[dtype], device="meta") for dtype, size in sizes.items()}
        return serialized_bytes(flat, self._metadata())

    @classmethod
    def from_bytes(cls: type[AnyMessage], data: bytes) -> AnyMessage:
        """
        Args:
            data (`bytes`): A message of this kind, from anywhere.

        Returns:
            The message.

        Raises:
            MessageError: if it is cut off, larger than it says, of another kind or version, or if its fields are not those
                that it should have. All sizes are compared with each other before a tensor is made.
        """
        metadata = _read_metadata(data)
        fields = _parse_json(metadata["message"], "the fields")
        if not isinstance(fields, dict) or fields.pop("kind", None) != cls.__name__:
            raise MessageError(f"The message is no {cls.__name__}.")
        version = fields.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise MessageError(
                f"The message has format version {version!r:.20}, and this version reads {FORMAT_VERSION}."
            )
        values = cls._checked(fields)
        return cls(**values, **_read_tensors(data, _read_manifest(metadata["tensors"], cls.TENSOR_FIELDS)))

    @classmethod
    def _checked(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        if fields.keys() != cls.JSON_FIELDS.keys():
            other = sorted(fields.keys() ^ cls.JSON_FIELDS.keys())[0]
            raise MessageError(f"The message {'has' if other in fields else 'lacks'} the field {other!r:.100}.")
        values = {}
        for name, check in cls.JSON_FIELDS.items():
            try:
                values[name] = check(fields[name])
            except ValueError as error:
                raise MessageError(f"The field {name!r} must be {error}, got {fields[name]!r:.100}.") from None
        return values

    def _entries(self) -> list[Entry]:
        entries = [
            (section, name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            for section in self.TENSOR_FIELDS
            for name, tensor in (getattr(self, section) or {}).items()
        ]
        order = {dtype: index for index, dtype in enumerate(_DTYPES)}
        return sorted(entries, key=lambda entry: order[entry[2]])  # stable: a mapping keeps its order within a dtype

    def _metadata(self) -> dict[str, str]:
        fields = {name: getattr(self, name) for name in self.JSON_FIELDS}
        fields = {name: asdict(value) if is_dataclass(value) else value for name, value in fields.items()}
        present = tuple(name for name in self.TENSOR_FIELDS if getattr(self, name) is not None)
        message = {"kind": type(self).__name__, "format_version": FORMAT_VERSION, **fields}
        return {
            "message": json.dumps(message, separators=(",", ":")),
            "tensors": _manifest(present, tuple(self._entries())),
        }


@dataclass(frozen=True)
class HeadChoice:
    """
    Which heads a client trains.

    Args:
        share (`float`): The share of the heads that it can train, above 0 and up to 1.
        selection (`str`): How they are chosen, one of `HEAD_SELECTIONS`.
        allocation (`str`): How the share is spent over targets, one of `HEAD_ALLOCATIONS`.
        seed (`int`): The seed of the choice.
    """

    share: float
    selection: str
    allocation: str
    seed: int

    @classmethod
    def from_json(cls, value: Any) -> HeadChoice:
        checks = {"share": _number, "selection": _text, "allocation": _text, "seed": _integer(0)}
        if not isinstance(value, dict) or value.keys() != checks.keys():
            raise ValueError(f"an object with {', '.join(checks)}")
        return cls(**{name: check(value[name]) for name, check in checks.items()})


@dataclass(frozen=True)
class ClientTask(Message):
    """
    What a server asks of one client.

    Args:
        round_number (`int`): The round, from 1; 0 is the one that makes bases.
        client (`str`): The name of the client.
        state (`Mapping[str, torch.Tensor]`): The global state, or what of it the client needs, by checkpoint names.
        seed (`int`): The seed of the local training.
        purpose (`str`, *optional*, defaults to `"train"`):
            `"train"`; or in round 0 `"warm_up"`, to train the task head only, and `"sketch"`, to sketch the gradient.
        run (`str`, *optional*): The name of the run, which the reply has, too.
        attempt (`int`, *optional*, defaults to 1): How often the round is tried, this time included.
        learning_rate_factor (`float`, *optional*, defaults to 1.0): What the learning rate of the round is multiplied by.
        max_steps (`int`, *optional*): How many steps to train, or batches to sketch. By default as the client's arguments
            say.
        heads ([`HeadChoice`], *optional*): Which heads the client trains. By default all.
        kept_in (`int`, *optional*): The last round whose update of this client was merged, from which it has what it keeps
            for itself. By default it has not taken part.
        control (`Mapping[str, torch.Tensor]`, *optional*): SCAFFOLD's c.
    """

    TENSOR_FIELDS: ClassVar[tuple[str, ...]] = ("state", "control")
    JSON_FIELDS: ClassVar[Mapping[str, Check]] = {
        "round_number": _integer(0),
        "client": _text,
        "seed": _integer(0, 2**32 - 1),
        "purpose": _one_of(*PURPOSES),
        "run": _text,
        "attempt": _integer(1),
        "learning_rate_factor": _number,
        "max_steps": _optional(_integer(1)),
        "heads": _optional(HeadChoice.from_json),
        "kept_in": _optional(_integer(1)),
    }

    round_number: int
    client: str
    state: State
    seed: int
    purpose: str = "train"
    run: str = ""
    attempt: int = 1
    learning_rate_factor: float = 1.0
    max_steps: int | None = None
    heads: HeadChoice | None = None
    kept_in: int | None = None
    control: State | None = None


@dataclass(frozen=True)
class ClientReply(Message):
    """
    What a client sends back.

    Args:
        round_number (`int`): The round, as the task has it.
        client (`str`): The name of the client.
        purpose (`str`, *optional*, defaults to `"train"`): As the task has it.
        run (`str`, *optional*): As the task has it.
        attempt (`int`, *optional*, defaults to 1): As the task has it.
        update (`Mapping[str, torch.Tensor]`, *optional*): What the client uploads, or `None` if it has failed.
        num_examples (`int`, *optional*, defaults to 0): The examples that it has trained on.
        trained_heads (`Mapping[str, torch.Tensor]`, *optional*): As [`~peft_ravan.merging.ClientUpdate`] has them.
        train_loss (`float`, *optional*, defaults to 0.0): Its mean local training loss.
        learning_rate (`float`, *optional*): Its learning rate, if it has trained.
        control_change (`Mapping[str, torch.Tensor]`, *optional*): By how much SCAFFOLD's c_i has changed.
        failure (`str`, *optional*): Why it has failed.
        error (`Exception`, *optional*): The error, where the client and the server are one process. It is never sent.
    """

    TENSOR_FIELDS: ClassVar[tuple[str, ...]] = ("update", "trained_heads", "control_change")
    JSON_FIELDS: ClassVar[Mapping[str, Check]] = {
        "round_number": _integer(0),
        "client": _text,
        "purpose": _one_of(*PURPOSES),
        "run": _text,
        "attempt": _integer(1),
        "num_examples": _integer(0),
        "train_loss": _number,
        "learning_rate": _optional(_number),
        "failure": _optional(_text),
    }

    round_number: int
    client: str
    purpose: str = "train"
    run: str = ""
    attempt: int = 1
    update: State | None = None
    num_examples: int = 0
    trained_heads: State | None = None
    train_loss: float = 0.0
    learning_rate: float | None = None
    control_change: State | None = None
    failure: str | None = None
    error: Exception | None = field(default=None, compare=False, repr=False)


# ---- Bytes -------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)  # that of a state is the same for all clients of a round
def _manifest(present: tuple[str, ...], entries: tuple[Entry, ...]) -> str:
    """Which tensors there are, compressed: their names are long, and much alike."""
    text = json.dumps([present, entries], separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _read_manifest(text: str, sections: tuple[str, ...]) -> tuple[list[str], list[Entry]]:
    try:
        unpacked = zlib.decompressobj()
        manifest = unpacked.decompress(base64.b64decode(text, validate=True), MAX_MANIFEST_BYTES)
    except (ValueError, zlib.error) as error:
        raise MessageError(f"The list of the tensors is damaged ({error}).") from error
    if not unpacked.eof or unpacked.unused_data:
        raise MessageError(f"The list of the tensors is cut off, or above {MAX_MANIFEST_BYTES:,} bytes.")
    parsed = _parse_json(manifest, "the list of the tensors")
    is_pair = isinstance(parsed, list) and len(parsed) == 2 and all(isinstance(part, list) for part in parsed)
    if not is_pair or len(parsed[1]) > MAX_TENSORS:
        raise MessageError(f"The list of the tensors is none, or has more than {MAX_TENSORS:,} of them.")
    present, entries = parsed
    if [name for name in sections if name in present] != present:
        raise MessageError("The message has tensors in fields that it should not have.")
    checked = [_checked_entry(entry, present) for entry in entries]
    if len({entry[:2] for entry in checked}) < len(checked):
        raise MessageError("The message has two tensors of one name.")
    return present, checked


def _checked_entry(entry: Any, present: list[str]) -> Entry:
    if isinstance(entry, list) and len(entry) == 4:
        section, name, dtype, shape = entry
        if (
            section in present
            and type(name) is str
            and len(name) <= MAX_TEXT_LENGTH
            and type(dtype) is str
            and dtype in _DTYPES
            and type(shape) is list
            and len(shape) <= 8
            and all(type(size) is int and 0 <= size < 2**40 for size in shape)
        ):
            return section, name, dtype, tuple(shape)
    raise MessageError(f"The list of the tensors has an entry that is none: {entry!r:.100}.")


def _read_metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise MessageError(f"The message is cut off, or its header is above {MAX_HEADER_BYTES:,} bytes.")
    header = _parse_json(bytes(data[8 : 8 + length]), "the header")
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.keys() != {"message", "tensors"}:
        raise MessageError("The header is not that of a message.")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise MessageError("The header is not that of a message.")
    return metadata


def _parse_json(text: str | bytes, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"The message is damaged: {what} cannot be read ({error}).") from error


def _read_tensors(data: bytes, manifest: tuple[list[str], list[Entry]]) -> dict[str, dict[str, torch.Tensor]]:
    present, entries = manifest
    sizes: dict[str, int] = {}
    for _, _, dtype, shape in entries:
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
    if sum(size * _DTYPES[dtype].itemsize for dtype, size in sizes.items()) > len(data):
        raise MessageError("The message is shorter than its tensors.")
    try:
        flat = safetensors.torch.load(bytes(data))  # which compares its header with the length, and copies
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise MessageError(f"The message is damaged: its tensors cannot be read ({error}).") from error
    if {dtype: (tensor.dtype, tuple(tensor.shape)) for dtype, tensor in flat.items()} != {
        dtype: (_DTYPES[dtype], (size,)) for dtype, size in sizes.items()
    }:
        raise MessageError("The tensors of the message are not those of its list.")
    tensors: dict[str, dict[str, torch.Tensor]] = {section: {} for section in present}
    parts = {dtype: iter(_parts(flat[dtype], [e for e in entries if e[2] == dtype])) for dtype in sizes}
    for section, name, dtype, _ in entries:
        tensors[section][name] = next(parts[dtype])
    return tensors


def _parts(flat: torch.Tensor, entries: list[Entry]) -> Iterator[torch.Tensor]:
    for part, (_, _, _, shape) in zip(flat.split([math.prod(e[3]) for e in entries]), entries, strict=True):
        yield part.view(shape)
