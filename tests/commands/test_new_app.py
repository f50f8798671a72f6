"""`peft-ravan new-app`: the app that it writes is the template, and Flower accepts it."""

import os
import sys
from pathlib import Path

import pytest

from .conftest import assert_refused, run


TEMPLATE = Path(__file__).parents[2] / "trainers" / "flower" / "template"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["hospitals", "deep/er/hospitals", "empty"])
def test_the_app_is_the_template(folder, name):
    (folder / "empty").mkdir()
    ended = run("new-app", name)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == f"The app is in {name}. Your model, data and arguments go into {name}/federation.py.\n"
    assert contents(folder / name) == {
        file: (TEMPLATE / file).read_bytes() for file in ("federation.py", "pyproject.toml")
    }
    assert not list(folder.rglob(".*"))


def test_flower_accepts_the_app(folder, monkeypatch):
    build = pytest.importorskip("flwr.cli.build").build
    monkeypatch.delitem(sys.modules, "federation", raising=False)  # that of the benchmarks
    assert run("new-app", "a" * 32).code == 0
    build(folder / ("a" * 32))
    assert len(list(folder.glob("example.digits-federation.*.fab"))) == 1


@pytest.mark.parametrize(
    "name, reason",
    [
        ("full", "'full' has files already, such as 'notes.txt'. Give a new folder for the app."),
        ("full/notes.txt", "'full/notes.txt' is a file or a link, and an app is a folder."),
        ("link", "'link' is a file or a link"),
        ("nowhere", "'nowhere' is a file or a link"),
        (".", "'.' is the folder you are in"),
        ("", "is the folder you are in"),
        ("full/notes.txt/app", "Not a directory"),
        ("my_app", "Flower does not accept 'my_app' as the folder of an app: it must begin with a letter"),
        ("2026", "Flower does not accept '2026'"),
        ("a" * 33, "up to 32 letters, digits and hyphens"),
    ],
)
def test_what_is_there_stays_as_it_is(folder, name, reason):
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    (folder / "elsewhere").mkdir()
    os.symlink("elsewhere", "link")
    os.symlink("no-such-folder", "nowhere")
    before = sorted(folder.rglob("*"))
    assert_refused(run("new-app", name), reason)
    assert sorted(folder.rglob("*")) == before and contents(folder) == {"full/notes.txt": b"mine"}


@pytest.mark.parametrize("name", ["a", "My-App2", "a-", "-a", "a.b", "a b", "é", "a" * 32, "a" * 33, "a\n"])
def test_the_rule_for_names_is_that_of_flower(folder, name):
    is_valid_name = pytest.importorskip("flwr.supercore.utils").is_valid_name
    assert (run("new-app", "--", name).code == 0) == is_valid_name(name)[0]
