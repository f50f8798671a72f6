"""Text from users and strangers in a card, where it must mean nothing."""

from __future__ import annotations

import re
from typing import Any


_LINKS = re.compile(r"\[([^\[\]]*)\]\((https://[^\s()<>|\\\[\]]+)\)")


def plain_text(text: str) -> str:
    """
    Args:
        text (`str`): What a user has given.

    Returns:
        `str`: The same on one line, without a meaning to Markdown.
    """
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def table_cell(value: Any) -> str:
    """
    Args:
        value (`Any`): A fact, which may come from a stranger's file.

    Returns:
        `str`: The same for a table: it cannot leave its cell, and means nothing to Markdown, apart from links to pages.
    """
    text = " ".join(str(value).split())
    parts, end = [], 0
    for link in _LINKS.finditer(text):
        before = _escaped(text[end : link.start()])
        # with that before it, a link is a picture, which is loaded without a click
        parts += [f"{before[:-1]}\\!" if before.endswith("!") else before, f"[{_escaped(link[1])}]({link[2]})"]
        end = link.end()
    return "".join([*parts, _escaped(text[end:])])


def _escaped(text: str) -> str:
    # an underscore within a word means nothing, and names of metrics have many
    text = re.sub(r"([\\`*\[\]|~])|(?<![^\W_])(_)|(_)(?![^\W_])", r"\\\g<0>", text)
    return text.replace("<", "&lt;")
