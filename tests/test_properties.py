"""Properties are tested with the same examples in each run, and with others, and more of them, in the deep one."""

import os
import subprocess
import sys
from pathlib import Path

from .properties import DEEP_FACTOR


ROOT = Path(__file__).parent.parent
# without that of the suite, which needs seconds to load torch
CONFTEST = """
import pytest

from tests.properties import num_uploads, register_profiles

register_profiles()
fuzz_examples = pytest.fixture(lambda: num_uploads())
"""
PROPERTY = """
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples

drawn = []


@examples(4)
@given(st.integers(), st.text())
def test_property(number, text):
    drawn.append((number, text))


def test_uploads(fuzz_examples):
    Path(__file__).with_name("drawn").write_text(f"{len(drawn)} {fuzz_examples} {drawn}")
"""


def drawn(folder: Path, *options: str) -> tuple[int, int, str]:
    """Run a property in another process; how many examples and uploads there were, and the examples."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(PROPERTY)
    command = [sys.executable, "-m", "pytest", "-p", "_hypothesis_pytestplugin", str(folder / "test_it.py"), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    num_examples, num_uploads, examples = (folder / "drawn").read_text().split(maxsplit=2)
    return int(num_examples), int(num_uploads), examples


def test_examples_are_the_same_in_each_run_unless_it_is_deep(tmp_path):
    first = drawn(tmp_path)
    assert first[:2] == (4, 2_000)
    assert drawn(tmp_path) == first
    deep, again = (drawn(tmp_path, "--hypothesis-profile", "deep") for _ in range(2))
    assert deep[:2] == (4 * DEEP_FACTOR, 100_000) == again[:2]
    assert deep[2] != again[2]


def test_every_property_has_more_examples_in_the_deep_run():
    # a number that hypothesis is given itself stays what it is
    own = {ROOT / "tests" / "properties.py", Path(__file__)}
    files = [path for path in (ROOT / "tests").rglob("*.py") if path not in own]
    assert files and not [path for path in files if "max_examples" in path.read_text()]
