"""The changes of docs/upstream.md do what the page says, applied to copies of the installed packages."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft import get_peft_model

from peft_ravan import RavanConfig

from .conftest import tiny_bert
from .markdown import code_blocks


PAGE = Path(__file__).parent.parent / "docs" / "upstream.md"
PYPROJECT = PAGE.parent.parent / "pyproject.toml"


def changed(text: str, diff: str) -> str:
    """Apply the hunks of a unified diff of one file, each where its old lines are, wherever that is."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = [(line[:1] or " ", line[1:]) for line in hunk.splitlines()]
        old, new = ("".join(f"{line}\n" for sign, line in lines if sign != other) for other in "+-")
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def patched_copy(folder: Path, diff: str) -> None:
    """A copy of a package with one changed file. All other files are links."""
    package, *parents, name = re.search(r"^\+\+\+ b/(.*)$", diff, flags=re.MULTILINE)[1].split("/")
    original = Path(importlib.util.find_spec(package).origin).parent
    copy = folder / package
    for part in [None, *parents]:
        original, copy = (original / part, copy / part) if part else (original, copy)
        copy.unlink(missing_ok=True)
        copy.mkdir()
        for path in original.iterdir():
            if path.name != "__pycache__":
                (copy / path.name).symlink_to(path)
    (copy / name).unlink()
    (copy / name).write_text(changed((original / name).read_text(encoding="utf-8"), diff), encoding="utf-8")


WITHOUT_AN_IMPORT = """
import sys
import peft, transformers
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

assert "peft_ravan" not in sys.modules
base_folder, adapter_folder, unknown_folder = sys.argv[1:]
base_model = AutoModelForSequenceClassification.from_pretrained(base_folder)
try:
    PeftModel.from_pretrained(base_model, unknown_folder)
except KeyError as error:
    print(error)
model = PeftModel.from_pretrained(base_model, adapter_folder)
print(type(model.base_model).__name__)
model.push_to_hub("tester/reflex", tags=["medical"])
print(peft.__file__, transformers.__file__)
"""


@pytest.mark.parametrize("diff", code_blocks(PAGE.read_text(encoding="utf-8"), "diff"), ids=["peft", "transformers"])
def test_the_changes_fit_the_installed_packages(diff, tmp_path):
    patched_copy(tmp_path, diff)
    [path] = [path for path in tmp_path.rglob("*.py") if not path.is_symlink()]
    compile(path.read_text(encoding="utf-8"), str(path), "exec")


@pytest.mark.deep  # the packages are imported anew, which takes longer than a hundred other tests
def test_the_changes_work_on_copies_of_the_packages(hub, tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    adapter = RavanConfig(r=2, num_heads=2, task_type="SEQ_CLS")
    get_peft_model(tiny_bert(), adapter).save_pretrained(tmp_path / "adapter")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "adapter_config.json").write_text('{"peft_type": "NOBODYS"}')
    packages = tmp_path / "packages"
    packages.mkdir()
    for diff in code_blocks(PAGE.read_text(encoding="utf-8"), "diff"):
        patched_copy(packages, diff)
    [toml] = code_blocks(PAGE.read_text(encoding="utf-8"), "toml")
    [(name, module)] = re.findall(r'^(\w+) = "(\w+)"$', toml, flags=re.MULTILINE)
    installed = packages / "method_of_others-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: method-of-others\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(f"[peft.methods]\n{name} = {module}\n")
    environment = {**os.environ, "PYTHONPATH": str(packages), "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    folders = [str(tmp_path / part) for part in ("base", "adapter", "unknown")]
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_AN_IMPORT, *folders], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    error, tuner, places = run.stdout.splitlines()
    assert "PEFT does not know the method 'NOBODYS'" in error and tuner == "RavanModel"
    assert places.count(str(packages)) == 2
    card = hub.files("tester/reflex")["README.md"].decode()
    assert "library_name: peft" in card and "`KeyError: 'RAVAN'`" in card and "- medical" in card
    assert str(tmp_path) not in card


def test_this_package_has_the_entry_point():
    [toml] = code_blocks(PAGE.read_text(encoding="utf-8"), "toml")
    assert toml in PYPROJECT.read_text(encoding="utf-8")
    [(name, module)] = re.findall(r'^(\w+) = "(\w+)"$', toml, flags=re.MULTILINE)
    assert importlib.metadata.EntryPoint(name, module, "peft.methods").load().RavanConfig


@pytest.mark.parametrize("diff", code_blocks(PAGE.read_text(encoding="utf-8"), "diff"), ids=["peft", "transformers"])
def test_the_changes_are_small(diff):
    assert len(re.findall(r"^[+-](?![+-])", diff, flags=re.MULTILINE)) <= 30
