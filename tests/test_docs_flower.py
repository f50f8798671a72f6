"""docs/flower.md is correct: its code is that of a new app, its tables match the apps, and its commands exist."""

import dataclasses
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

from peft_ravan.trainers import FederatedArguments, SecureAggregation

from .markdown import code_blocks, dead_links, rows, section


ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "flower.md"
TEXT = PAGE.read_text()
EXAMPLE = ROOT / "trainers" / "flower" / "template"


def keys(table: list[list[str]]) -> set[str]:
    return {key for cells in table for key in re.findall(r"`([a-z-]+)`", cells[0])}


def test_the_code_is_that_of_the_example():
    [code] = code_blocks(TEXT)
    docstring, _, rest = (EXAMPLE / "federation.py").read_text().partition('"""\n\n')
    assert docstring.startswith('"""') and code == rest


def test_links_lead_somewhere():
    assert dead_links(PAGE) == []


def test_the_keys_of_the_tables_are_those_that_the_apps_read():
    text = section(TEXT, "Configuration")
    of_node, of_run = text.split("In the configuration of a run")
    sources = {name: (ROOT / "trainers" / "flower" / f"{name}.py").read_text() for name in ("node", "server_app")}
    read = set(re.findall(r'node_config(?:\.get\(|\[)[\'"]([a-z-]+)', sources["node"]))
    assert keys(rows(of_node)) == read | {"state-dir"}
    assert keys(rows(of_run)) == set(re.findall(r'config\.get\("([a-z-]+)"', sources["server_app"])) | {"state-dir"}


def test_the_reasons_of_the_table_are_those_in_the_code():
    code = "".join(path.read_text() for path in (ROOT / "trainers").rglob("*.py"))
    reasons = [
        reason for cells in rows(section(TEXT, "When something fails")) for reason in re.findall("`(.*?)`", cells[1])
    ]
    assert len(reasons) == 7
    for reason in reasons:
        for part in reason.split(" ... "):
            assert part.removesuffix(" ...") in code, reason


def test_the_example_has_what_its_run_needs():
    tomllib = pytest.importorskip("tomllib")
    app = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    code = (EXAMPLE / "federation.py").read_text()
    assert set(re.findall(r'config\["([a-z-]+)"\]', code)) | {"min-nodes", "node-timeout", "round-timeout"} == set(
        app["config"]
    )
    for component in app["components"].values():
        module, _, name = component.partition(":")
        assert f"{module}.py" in app["fab-include"] and re.search(rf"^{name} = make_", code, flags=re.MULTILINE)


def test_the_settings_of_secure_aggregation_are_in_the_table_with_their_defaults():
    text = section(TEXT, "Secure aggregation")
    table = {cells[0].strip("`"): cells[1] for cells in rows(text) if cells[0] != "Setting"}
    defaults = SecureAggregation()
    assert set(table) == {field.name for field in dataclasses.fields(SecureAggregation)}
    assert defaults.threshold == 2 / 3 and "(2/3)" in table["threshold"]
    assert f"({defaults.clipping_range})" in table["clipping_range"]
    assert f"is {10 * defaults.clipping_range / 2**32:.0e} for 10 clients".replace("e-0", "e-") in text


def test_the_options_that_do_not_go_with_secure_aggregation_are_refused():
    text = section(TEXT, "What does not go with it", level=3)
    [line] = [line for line in text.splitlines() if line.startswith("- `privacy`")]
    names = re.findall(r"`(\w+)`", line)
    values = {"privacy": {"clip_norm": 1.0, "noise_multiplier": 1.0}, "max_update_norm": 1.0}
    assert names == ["privacy", "max_update_norm", "scaffold", "eval_clients"]
    for name in names:
        with pytest.raises(ValueError, match=f"`secure_aggregation` does not go with `{name}`"):
            FederatedArguments("out", secure_aggregation=True, **{name: values.get(name, True)})


@pytest.mark.parametrize("command", ["flower-superlink", "flower-supernode"])
def test_the_options_of_the_commands_exist(command, monkeypatch, capsys):
    pytest.importorskip("flwr")
    [program] = importlib.metadata.entry_points(group="console_scripts", name=command)
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit):
        program.load()()
    known = capsys.readouterr().out
    lines = [line for line in TEXT.splitlines() if line.startswith(command)]
    used = {option for line in lines for option in re.findall(r" (--[a-z-]+)", line)}
    assert lines and not [option for option in used if option not in known]
