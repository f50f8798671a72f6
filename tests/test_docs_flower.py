"""docs/flower.md is correct: its code is that of the example, its tables match the apps, and its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .markdown import code_blocks, dead_links, rows, section


ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "flower.md"
TEXT = PAGE.read_text()
EXAMPLE = ROOT / "examples" / "flower"


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
    sources = {
        name: (ROOT / "trainers" / "flower" / f"{name}.py").read_text() for name in ("client_app", "server_app")
    }
    read = set(re.findall(r'node_config(?:\.get\(|\[)[\'"]([a-z-]+)', sources["client_app"]))
    assert keys(rows(of_node)) == read | {"state-dir"}
    assert keys(rows(of_run)) == set(re.findall(r'config\.get\("([a-z-]+)"', sources["server_app"])) | {"state-dir"}


def test_the_reasons_of_the_table_are_those_in_the_code():
    code = "".join(path.read_text() for path in (ROOT / "trainers").rglob("*.py"))
    reasons = [
        reason for cells in rows(section(TEXT, "When something fails")) for reason in re.findall("`(.*?)`", cells[1])
    ]
    assert len(reasons) == 6
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


@pytest.mark.parametrize("command", ["flower-superlink", "flower-supernode"])
def test_the_options_of_the_commands_exist(command):
    pytest.importorskip("flwr")
    program = Path(sys.executable).parent / command
    if not program.exists():
        pytest.skip("the commands of Flower are not next to this Python")
    known = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
    lines = [line for line in TEXT.splitlines() if line.startswith(command)]
    used = {option for line in lines for option in re.findall(r" (--[a-z-]+)", line)}
    assert lines and not [option for option in used if option not in known]
