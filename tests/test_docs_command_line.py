"""docs/command_line.md is correct: its commands run as printed, and its tables are complete."""

import dataclasses
import re
import shlex
from pathlib import Path

import datasets

from peft_ravan.merging import MERGE_METHODS
from peft_ravan.trainers.commands.run_arguments import DataArguments, ModelArguments, TextArguments

from .commands.conftest import place, run, saved  # noqa: F401
from .commands.helpers import COMMANDS
from .conftest import sentence
from .markdown import rows, section


PAGE = Path(__file__).parent.parent / "docs" / "command_line.md"
TEXT = PAGE.read_text()


def test_the_commands_run_in_order(place, hub):  # noqa: F811
    [config] = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    (place / "run.yaml").write_text(config)
    examples = datasets.Dataset.from_list([{"text": sentence(start), "label": start % 2} for start in range(60)])
    for name in ("train.csv", "test.csv"):
        examples.to_csv(place / name)
    lines = "".join(re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)).splitlines()
    assert {shlex.split(line)[1] for line in lines} == set(COMMANDS) - {"demo"}
    for line in lines:
        program, *words = shlex.split(line)
        ended = run(*words)
        assert (program, ended.code) == ("peft-ravan", 0), (line, ended)
    assert (place / "heads.png").exists() and (place / "run" / "rounds.jsonl").exists()
    assert hub.private["clinics/merged"]


def test_the_tables_have_every_command_and_argument():
    assert [row[0].strip("`") for row in rows(TEXT)] == COMMANDS
    arguments = [name for row in rows(section(TEXT, "train")) for name in re.findall(r"`(\w+)`", row[0])]
    classes = (ModelArguments, DataArguments, TextArguments)
    assert sorted(arguments) == sorted(field.name for cls in classes for field in dataclasses.fields(cls))


def test_the_table_of_starts_has_every_method_that_needs_one():
    named = {name for row in rows(section(TEXT, "merge")) for name in re.findall(r"`(\w+)`", row[0])}
    assert named == {name for name, method in MERGE_METHODS.items() if method.from_start or method.frozen_in(1)}
