"""
Checks that the regular expressions of a configuration, which may come from an untrusted file, terminate.

PEFT matches them with `re`, which tries all ways to match and cannot be interrupted: `(([a-z_.]+)+)+X` practically
never ends. So they are first tried in a separate process with a time limit. Another engine would not detect the
problem: the `regex` package handles the same pattern immediately.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from peft import PeftConfig


# matching all patterns of a configuration against all names normally takes milliseconds
LIMIT_IN_SECONDS = 10.0
# without one of these there is only one way to match, so there is nothing to try
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
        text (`str`): The expression as given there.
        template (`str`): The expression that PEFT builds from it, with `{}` as the placeholder.
        method (`str`): The function of `re` that PEFT uses.
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
        names (`Iterable[str]`): The module names that its patterns are matched against.

    Raises:
        ValueError: if one of its patterns is not a regular expression, or takes too long.
    """
    patterns = list(_patterns_of(config))
    for pattern in patterns:
        try:
            re.compile(pattern.expression)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"`{pattern.field}` has {_shown(pattern.text)}, which is not a regular expression: {error}."
            ) from error
    slow = [pattern for pattern in patterns if _CHOICES.search(pattern.text)]
    names = sorted(set(names))
    if not slow or not names:
        return
    finished = _number_finished(slow, names)
    if finished < len(slow):
        pattern = slow[finished]
        raise ValueError(
            f"`{pattern.field}` has {_shown(pattern.text)}: matching it against the names of {len(names)} modules "
            f"takes longer than {LIMIT_IN_SECONDS:g} s. Write the pattern without repetitions within repetitions, or "
            "name the modules."
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
    """How many of the patterns, in order, finished within the limit. All of them if no process can be started."""
    if not sys.executable:
        return len(patterns)
    given = json.dumps([[(pattern.method, pattern.expression) for pattern in patterns], names])
    # isolated mode without site packages starts faster
    command = [sys.executable, "-I", "-S", "-c", _TRY_THEM]
    try:
        # unbuffered, so that nothing is read ahead that `communicate` would then miss
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    except OSError:
        return len(patterns)
    with process:
        process.stdout.readline()  # wait until it has started, however long that takes
        try:
            finished, _ = process.communicate(given.encode(), timeout=LIMIT_IN_SECONDS)
        except subprocess.TimeoutExpired as error:
            process.kill()
            finished = error.stdout or b""
    return finished.count(b"\n")


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:77]!r}..."
