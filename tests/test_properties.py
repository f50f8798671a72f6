"""Properties are tested with the same examples in each run, and with more and different ones in the deep run."""

import os
import re
import subprocess
import sys
from pathlib import Path

from .properties import DEEP_FACTOR


ROOT = Path(__file__).parent.parent
# without that of the suite, which needs seconds to load torch
CONFTEST = """
from tests.properties import register_profiles

register_profiles()
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


def test_what_was_drawn():
    Path(__file__).with_name("drawn").write_text(f"{len(drawn)} {drawn}")
"""


def drawn(folder: Path, *options: str) -> tuple[int, str]:
    """Run a property in another process. Returns the number of examples and the examples."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(PROPERTY)
    command = [sys.executable, "-m", "pytest", "-p", "_hypothesis_pytestplugin", str(folder / "test_it.py"), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    num_examples, examples = (folder / "drawn").read_text().split(maxsplit=1)
    return int(num_examples), examples


def test_examples_are_the_same_in_each_run_unless_it_is_deep(tmp_path):
    first = drawn(tmp_path)
    assert first[0] == 4
    assert drawn(tmp_path) == first
    deep, again = (drawn(tmp_path, "--hypothesis-profile", "deep") for _ in range(2))
    assert deep[0] == again[0] == 4 * DEEP_FACTOR
    assert deep[1] != again[1]


def test_every_property_has_more_examples_in_the_deep_run():
    # a number that is passed to hypothesis directly is not changed
    own = {ROOT / "tests" / "properties.py", Path(__file__)}
    files = [path for path in (ROOT / "tests").rglob("*.py") if path not in own]
    assert files and not [path for path in files if re.search(r"settings\(.*max_examples", path.read_text())]
