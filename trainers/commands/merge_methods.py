"""Merge methods on the command line: their names, their options and the numbers of examples."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import yaml

from peft_ravan.merging import MERGE_METHODS


def describe_methods() -> str:
    """
    Returns:
        `str`: A list of the merge methods and their options with defaults.
    """
    lines = []
    for method in MERGE_METHODS.values():
        lines.append(f"{method.name}: {method.pretty_name}. {method.summary}")
        options_help = method.options_help
        lines += [f"    {name}={default}  {options_help.get(name, '')}" for name, default in method.options.items()]
    return "\n".join(lines)


def parse_options(given: Iterable[str]) -> dict[str, Any]:
    """
    Args:
        given (`Iterable[str]`): Options as `name=value`, with values in YAML syntax.

    Returns:
        `dict[str, Any]`: The options by name.

    Raises:
        ValueError: if one of them does not have this form.
    """
    options = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"An option is given as name=value, such as beta=2, got {text!r}.")
        options[name] = parse_value(value)
    return options


def parse_value(text: str) -> Any:
    """
    Args:
        text (`str`): A value in YAML syntax.

    Returns:
        `Any`: The value.
    """
    try:
        return float(text) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text) else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def parse_examples(text: str | None) -> list[int] | None:
    """
    Args:
        text (`str`, *optional*): Integers, separated by commas or spaces.

    Returns:
        `list[int]`: The integers.

    Raises:
        ValueError: if it contains anything else.
    """
    if text is None:
        return None
    try:
        return [int(number) for number in re.split(r"[,\s]+", text.strip())]
    except ValueError:
        raise ValueError(f"Numbers of examples are integers, such as 120,80,300, got {text!r}.") from None
