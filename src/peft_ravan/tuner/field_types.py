"""Checks whether the values of a configuration's fields match their annotations."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Collection, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from peft import PeftConfig


_PLAIN_TYPES = (str, bool, dict, list, type(None))


def check_field_types(config: PeftConfig, names: Collection[str] | None = None) -> None:
    """
    Check the types of a configuration's fields. Dataclasses accept anything, so a wrong value would only cause an
    error much later, in another place.

    Args:
        config ([`~peft.PeftConfig`]): A configuration.
        names (`Collection[str]`, *optional*): The fields to check, by default all.

    Raises:
        ValueError: if the value of a field does not match its annotation.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if (names is None or field.name in names) and not _is_a(value, hints[field.name]):
            raise ValueError(f"`{field.name}` must be {_name(field.type)}, got {value!r:.80}.")


def _is_a(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is_a(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if hint in (int, float):
        # configurations mix the two, as in `lora_alpha: int` with 0.5
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is dict:
        keys, values = arguments
        return isinstance(value, Mapping) and all(_is_a(k, keys) and _is_a(v, values) for k, v in value.items())
    if origin is tuple:
        # JSON has lists instead of tuples
        return isinstance(value, (list, tuple)) and all(
            _is_a(entry, argument) for entry, argument in zip(value, arguments, strict=False)
        )
    if origin in (list, set):
        return isinstance(value, (list, tuple, set)) and all(_is_a(entry, arguments[0]) for entry in value)
    if hint in _PLAIN_TYPES:
        return isinstance(value, hint)
    # one of PEFT's own classes, or a type that cannot be checked
    return True


def _name(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else str(annotation).replace("typing.", "")
