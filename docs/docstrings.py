"""What griffe does not read as the documentation of transformers does, put into the form that griffe reads."""

import re
import textwrap

import griffe


FENCE = re.compile(r"^ *```(?:py|python)?\n", flags=re.MULTILINE)
EXAMPLE = re.compile(r"^Examples?:\n.*?(?=^\S|\Z)", flags=re.MULTILINE | re.DOTALL)
ATTRIBUTES = re.compile(r"^\*\*Attributes\*\*:\n((?:    .*\n?|\n)+)", flags=re.MULTILINE)


def as_griffe_reads(text: str) -> str:
    """Examples without fences, since `>>>` marks them as code, and the list of attributes as a list of Markdown."""
    text = EXAMPLE.sub(lambda match: FENCE.sub("", match[0] + "\n") if ">>>" in match[0] else match[0], text)
    return ATTRIBUTES.sub(lambda match: f"**Attributes:**\n\n{as_list(match[1])}\n", text)


def as_list(text: str) -> str:
    """An indented list, whose items go on two columns further, with the four columns that Markdown needs."""
    return re.sub(r"^  (?=\S)", "    ", textwrap.dedent(text), flags=re.MULTILINE)


# mixins whose arguments people look for under the class that they make
SHOWN_UNDER = {"trainers.arguments.FederatedArgumentsMixin": "trainers.arguments.FederatedArguments"}


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed, and lists the arguments of mixins where they are used."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = as_griffe_reads(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        for mixin, shown_under in SHOWN_UNDER.items():
            move_arguments(pkg[mixin], pkg[shown_under])


def move_arguments(source: griffe.Class, target: griffe.Class) -> None:
    """Move all but the first paragraph of the docstring of a class to that of another class."""
    summary, _, rest = source.docstring.value.partition("\n\n")
    source.docstring.value = f"{summary}\n\nIts arguments are listed under [`{target.name}`]."
    target.docstring.value = f"{target.docstring.value.rstrip()}\n\n{rest}"
