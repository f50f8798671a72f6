"""Malformed uploads of every kind, as hypothesis strategies. None of them may abort or affect a merge."""

from __future__ import annotations

import decimal
import fractions
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from peft import LoraConfig

from peft_ravan import RavanConfig
from peft_ravan.merging import ClientUpdate


class SubclassOfTensor(torch.Tensor):
    """A subclass of tensor, which could override its operations."""


class NameLikeAString(str):
    """A name that equals no other."""

    def __eq__(self, other):
        return False

    __hash__ = str.__hash__


class Raising(Mapping):
    """A mapping one of whose methods raises."""

    def __init__(self, state: Mapping[str, Any], method: str, error: type[Exception]):
        self._state, self._method, self._error = dict(state), method, error

    def _raise_in(self, method: str) -> None:
        if method == self._method:
            raise self._error(f"from {method}")

    def __getitem__(self, name):
        self._raise_in("getitem")
        return self._state[name]

    def __iter__(self) -> Iterator[str]:
        self._raise_in("iter")
        return iter(self._state)

    def __len__(self) -> int:
        self._raise_in("len")
        return len(self._state)


class Changing(Mapping):
    """A mapping that is valid when it is read for the first time, and changes afterwards."""

    def __init__(self, state: Mapping[str, torch.Tensor], later: Callable[[torch.Tensor], Any]):
        self._state, self._later, self._read = dict(state), later, set()

    def __getitem__(self, name):
        tensor = self._state[name]
        if name in self._read:
            return self._later(tensor)
        self._read.add(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


class RaisingIndex:
    def __index__(self):
        raise OverflowError("no such integer")


class Lookalike:
    """Has the fields of an update, but is not one."""

    def __init__(self, update: ClientUpdate):
        self.__dict__.update(vars(update))


def _changed(tensor: torch.Tensor, change: Callable[[torch.Tensor], Any]) -> Any:
    # to read memory that was freed ends the process
    return change(tensor) if tensor.untyped_storage().nbytes() else tensor


def _freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def _with_entries(*values: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[: len(values)] = torch.tensor(values, dtype=tensor.dtype)[: changed.numel()]
        return changed

    return change


# what takes the place of a tensor
TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.flatten(1).to_sparse_csr() if t.dim() > 1 else t.to_sparse(),
    "csc": lambda t: t.flatten(1).to_sparse_csc() if t.dim() > 1 else t.to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "meta": lambda t: t.to("meta"),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "subclass": lambda t: t.as_subclass(SubclassOfTensor),
    "freed": _freed,
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "integers": lambda t: t.long(),
    "numpy": lambda t: t.numpy(),
    "numpy-objects": lambda t: np.array([None, "x"], dtype=object),
    "list": lambda t: t.tolist(),
    "none": lambda t: None,
    "text": lambda t: "tensor",
    "transposed": lambda t: t.new_zeros(*reversed(t.shape), 1),
    "empty": lambda t: t[:0],
    "number": lambda t: t.sum(),
    "nan": _with_entries(torch.nan),
    "infinite": _with_entries(-torch.inf, torch.inf),
    "huge": _with_entries(3e38),
    "large": _with_entries(1e20, -1e20),
    "with-graph": lambda t: t.clone().requires_grad_() * 2,  # harmless
    "overlapping": lambda t: t.flatten()[:1].expand(t.numel()).reshape(t.shape),  # harmless
    "parameter": lambda t: torch.nn.Parameter(t.clone()),  # harmless
}
NAMES = [
    1,
    None,
    b"bytes",
    ("a", "tuple"),
    NameLikeAString("x"),
    "x" * 100_000,
    "../../x",
    "x\x00y",
    "\ud800",
    "",
    2.5,
]
NUM_EXAMPLES = [
    10**400, -(10**400), 2**63, 0, -1, True, 2.0, 2.5, float("nan"), float("inf"), "5", None, b"5", [5],
    decimal.Decimal(5), fractions.Fraction(5), np.float64(5), np.array([5, 5]), torch.tensor(5), RaisingIndex(),
    np.int64(5),
]  # fmt: skip
CLIENT_IDS = [
    [],
    {},
    7,
    None,
    b"client",
    ["client_0"],
    float("nan"),
    object(),
    "client_0",
    NameLikeAString("client_0"),
]
CONFIGS: list[Callable[[], Any]] = [
    lambda: LoraConfig(r=3, lora_alpha=float("nan")),
    lambda: LoraConfig(r=3, lora_alpha=float("inf")),
    lambda: LoraConfig(r=3, lora_alpha=0),
    lambda: LoraConfig(r=3, lora_alpha=-6),
    lambda: LoraConfig(r=3, lora_alpha=1e300),
    lambda: LoraConfig(r=3, lora_alpha=10**400),
    lambda: _with_field("lora_alpha", "6"),
    lambda: _with_field("lora_alpha", None),
    lambda: _with_field("r", 0),
    lambda: _with_field("alpha_pattern", {"(": 4}),
    lambda: _with_field("alpha_pattern", {3: 4}),
    lambda: _with_field("alpha_pattern", {".*": None}),
    lambda: _with_field("alpha_pattern", {".*": float("nan")}),
    lambda: _with_field("rank_pattern", [("q", 4)]),
    lambda: RavanConfig(),
    lambda: {"r": 3},
    lambda: "config",
]


MASK = torch.ones(3, dtype=torch.bool)
MASKS: list[Callable[[torch.Tensor], Any]] = [
    lambda m: m,
    lambda m: ~m,
    lambda m: m[:0],
    lambda m: torch.cat([m, m]),
    lambda m: m.float(),
    lambda m: m.long(),
    lambda m: m.tolist(),
    lambda m: m.numpy(),
    lambda m: m.to_sparse(),
    lambda m: m.to("meta"),
    lambda m: m[None],
    lambda m: m.as_subclass(SubclassOfTensor),
    lambda m: m.to(torch.complex64),
    lambda m: None,
    lambda m: 3,
]


def _with_field(name: str, value: Any) -> LoraConfig:
    config = LoraConfig(r=3, lora_alpha=6)
    setattr(config, name, value)
    return config


OTHER_THINGS: list[Callable[[ClientUpdate], Any]] = [
    lambda u: None,
    lambda u: dict(u.state),
    lambda u: (u.state, u.num_examples),
    lambda u: "update",
    lambda u: 5,
    lambda u: ClientUpdate,
    lambda u: object.__new__(ClientUpdate),
    Lookalike,
]
ERRORS = [RuntimeError, KeyError, TypeError, ValueError, OSError, MemoryError, RecursionError, AttributeError]


FIELDS: dict[str, list[Callable[[ClientUpdate], Any]]] = {
    "state": [
        *(lambda u, thing=thing: thing for thing in (None, [], 5, "state", {}, np.zeros(3))),
        lambda u: list(u.state.items()),
        lambda u: u,
        *(
            lambda u, method=method, error=error: Raising(u.state, method, error)
            for method in ("getitem", "iter", "len")
            for error in ERRORS
        ),
        *(lambda u, later=later: Changing(u.state, later) for later in TENSORS.values()),
    ],
    "num_examples": [lambda u, value=value: value for value in NUM_EXAMPLES],
    "client_id": [lambda u, value=value: value for value in CLIENT_IDS],
    "config": [lambda u, make=make: make() for make in CONFIGS],
    "trained_heads": [
        *(lambda u, whole=whole: whole for whole in ([[True]], "all", 5, torch.ones(3, dtype=torch.bool))),
        *(
            lambda u, make=make, name=name: {(next(iter(u.state)) if name is None else name): make(MASK)}
            for make in MASKS
            for name in (None, "x.ravan_H", *NAMES)
        ),
        lambda u: Raising(dict.fromkeys(u.state, MASK), "getitem", RuntimeError),
        lambda u: Raising(dict.fromkeys(u.state, MASK), "iter", OSError),
    ],
}


def every_kind(update: ClientUpdate) -> Iterator[Callable[[ClientUpdate], Any]]:
    """
    Args:
        update ([`ClientUpdate`]): An update, for the names of its tensors.

    Yields:
        `Callable`: Makes a malformed upload of an update with these names.
    """
    names = list(update.state)
    for name in (names[0], names[-1]):
        for change in TENSORS.values():
            yield lambda u, name=name, change=change: replace(
                u, state={**u.state, name: _changed(u.state[name], change)}
            )
    for name in NAMES:
        yield lambda u, name=name: replace(u, state={**u.state, name: u.state[names[0]]})
        yield lambda u, name=name: replace(
            u, state={name if old == names[0] else old: tensor for old, tensor in u.state.items()}
        )
    for field, makers in FIELDS.items():
        for make in makers:
            yield lambda u, field=field, make=make: replace(u, **{field: make(u)})
    yield from OTHER_THINGS


def malformed(update: ClientUpdate) -> st.SearchStrategy:
    """
    Args:
        update ([`ClientUpdate`]): A valid update.

    Returns:
        `SearchStrategy`: Malformed uploads made of it, of one or two kinds at once.
    """
    kinds = st.sampled_from(list(every_kind(update)))
    return st.lists(kinds, min_size=1, max_size=2).map(lambda makers: functools.reduce(_spoil, makers, update))


def _spoil(update: Any, make: Callable[[ClientUpdate], Any]) -> Any:
    try:
        return make(update)
    except Exception:  # what is malformed already cannot always be malformed once more
        return update
