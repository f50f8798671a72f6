"""
Regular expressions of a configuration, which may come from a stranger's file: whether they end.

PEFT matches them with `re`, which tries all ways to match and cannot be told to stop: `(([a-z_.]+)+)+X` takes longer than
anybody waits. So they are tried in a process of its own, with a limit, before they are used. Another engine would not
tell: on the same pattern that of the package `regex` is done at once.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from peft import PeftConfig


# all patterns of a configuration over all names take milliseconds
LIMIT_IN_SECONDS = 10.0
# without one of these there is one way to match, and nothing to try
_CHOICES = re.compile(r"[*+?{|]")
_TRY_THEM = """
import json, re, sys
print(flush=True)
patterns, names = json.load(sys.stdin)
for method, expression in patterns:
    match = getattr(re.compile(expression), method)
    for name in names:
        match(name)
    print(flush=True)
"""


@dataclass(frozen=True)
class Pattern:
    """
    A regular expression of a configuration, as PEFT matches it.

    Args:
        field (`str`): The field of the configuration.
        text (`str`): The expression as it stands there.
        template (`str`): What PEFT makes of it, with `{}` in its place.
        method (`str`): The function of `re`.
    """

    field: str
    text: str
    template: str = "{}"
    method: str = "match"

    @property
    def expression(self) -> str:
        return self.template.replace("{}", self.text)


def check_patterns(config: PeftConfig, names: Iterable[str]) -> None:
    """
    Args:
        config ([`~peft.PeftConfig`]): The configuration of an adapter.
        names (`Iterable[str]`): The names that its patterns are matched against, those of modules.

    Raises:
        ValueError: if one of its patterns is no regular expression, or takes too long.
    """
    patterns = list(_patterns_of(config))
    for pattern in patterns:
        try:
            re.compile(pattern.expression)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"`{pattern.field}` has {_shown(pattern.text)}, which is no regular expression: {error}."
            ) from error
    slow = [pattern for pattern in patterns if _CHOICES.search(pattern.text)]
    names = sorted(set(names))
    if not slow or not names:
        return
    finished = _number_finished(slow, names)
    if finished < len(slow):
        pattern = slow[finished]
        raise ValueError(
            f"`{pattern.field}` has {_shown(pattern.text)}: to match it against the names of {len(names)} modules takes "
            f"longer than {LIMIT_IN_SECONDS:g} s. Write the pattern without repetitions within repetitions, or name the "
            "modules."
        )


def _patterns_of(config: PeftConfig) -> Iterator[Pattern]:
    for field in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, field, None), str):
            yield Pattern(field, getattr(config, field), method="fullmatch")
    for text in _strings(getattr(config, "modules_to_save", None)):
        yield Pattern("modules_to_save", text, r"(^|.*\.){}($|\..*)")
    for text in _strings(getattr(config, "layers_pattern", None)):
        yield Pattern("layers_pattern", text, r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")
    for field in ("rank_pattern", "heads_pattern", "alpha_pattern"):
        for text in _strings(getattr(config, field, None)):
            yield Pattern(field, text, r"(.*\.)?({})$")


def _strings(value: object) -> Iterator[str]:
    values = [value] if isinstance(value, str) else value or ()
    return (text for text in values if isinstance(text, str))


def _number_finished(patterns: Sequence[Pattern], names: Sequence[str]) -> int:
    """How many of the patterns, in turn, were matched within the limit. Where no process can be started, all count as such."""
    if not sys.executable:
        return len(patterns)
    given = json.dumps([[(pattern.method, pattern.expression) for pattern in patterns], names])
    # isolated, and without the packages that are installed: it starts faster
    command = [sys.executable, "-I", "-S", "-c", _TRY_THEM]
    try:
        # not buffered, so that nothing is read ahead that `communicate` would not see
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    except OSError:
        return len(patterns)
    with process:
        process.stdout.readline()  # it has started, however long that took
        try:
            finished, _ = process.communicate(given.encode(), timeout=LIMIT_IN_SECONDS)
        except subprocess.TimeoutExpired as error:
            process.kill()
            finished = error.stdout or b""
    return finished.count(b"\n")


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:77]!r}..."
