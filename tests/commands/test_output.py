"""What commands replace with --overwrite, and what they never do."""

import shutil
from pathlib import Path

import pytest

from peft_ravan import to_lora
from peft_ravan.sharing.adapter_files import other_files

from .conftest import SITES, assert_refused, run


def files(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*")}


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(params=["to-lora", "merge"])
def command(request):
    """The words of a command that writes an adapter, without the output folder."""
    return {"to-lora": ("to-lora", "north"), "merge": ("merge", "north", "south")}[request.param]


def test_a_folder_with_other_things_is_never_replaced(place, command):
    assert run(*command, "--out", "precious").code == 0
    Path("precious/notes.txt").write_text("years of work")
    Path("precious/photos/2024").mkdir(parents=True)
    before = files(place)
    ended = run(*command, "--out", "precious", "--overwrite")
    assert_refused(
        ended, "'precious' has more than an adapter in it: 'notes.txt', 'photos/2024'. --overwrite replaces"
    )
    assert files(place) == before and Path("precious/notes.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "path", ["README.md/mine.txt", "lora/notes.md", "a.safetensors", "checkpoint-1/adapter_config.json", ".hidden", "x/README.md"]
)  # fmt: skip
def test_only_files_in_their_own_places_are_known(tmp_path, path):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).touch()
    assert other_files(tmp_path) == [path]


def test_links_are_not_followed(tmp_path, place, command):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "adapter_config.json").write_text("{}")
    Path("out").mkdir()
    Path("out/lora").symlink_to(tmp_path / "elsewhere")
    assert_refused(run(*command, "--out", "out", "--overwrite"), "more than an adapter in it: 'lora'")
    Path("link").symlink_to(tmp_path / "elsewhere")
    assert_refused(run(*command, "--out", "link", "--overwrite"), "'link' is a link to")
    assert (tmp_path / "elsewhere" / "adapter_config.json").read_text() == "{}"


def test_an_adapter_is_replaced_and_its_tokenizer_stays(place, command):
    assert run(*command, "--out", "out").code == 0
    for name in (
        "tokenizer.json",
        "federation.json",
        "rounds.png",
        "additional_chat_templates/x.jinja",
        "lora/README.md",
    ):
        Path("out", name).parent.mkdir(exist_ok=True)
        Path("out", name).write_text("old")
    assert_refused(run(*command, "--out", "out", "--overwrite"), "'lora/README.md'")
    shutil.rmtree("out/lora")
    assert_refused(run(*command, "--out", "out"), "'out' exists already. Choose another place, or give --overwrite")
    assert run(*command, "--out", "out", "--overwrite").code == 0
    assert Path("out/tokenizer.json").read_text() == Path("out/additional_chat_templates/x.jinja").read_text() == "old"
    assert not Path("out/rounds.png").exists()
    assert not other_files("out") and not list(place.glob(".*"))


@pytest.mark.parametrize("out", ["north", "./north/", "../{}/north", "same"])
def test_what_is_read_is_never_replaced(place, command, out):
    real = Path("north").resolve()
    Path("north").unlink()
    shutil.copytree(real, "north")
    Path("same").symlink_to("north")
    before = contents(place)
    for options in ((), ("--overwrite",)):
        ended = run(*command, "--out", out.format(place.name), *options)
        assert_refused(ended, "is the folder of 'north', which is read")
    assert contents(place) == before


def test_the_start_of_a_merge_is_never_replaced(place):
    shutil.copytree(Path("lora-start").resolve(), "start")
    words = (
        "merge",
        "lora-north",
        "lora-south",
        "--method",
        "ties",
        "--start",
        "start",
        "--out",
        "start",
        "--overwrite",
    )
    assert_refused(run(*words), "is the folder of 'start', which is read")


def test_the_folder_of_the_adapter_is_refused_in_python_too(place):
    for folder in ("north", Path("north"), "./north"):
        with pytest.raises(ValueError, match="is the folder of the adapter itself"):
            to_lora("north", folder)


@pytest.mark.parametrize("out", [".", "", "..", "../{}", "{}"])
def test_the_folder_people_are_in_is_refused(place, command, monkeypatch, out):
    home = place / "home"
    (home / "work").mkdir(parents=True)
    for site in SITES:
        (home / "work" / site).symlink_to((place / site).resolve())
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "work")
    out = out.format("work") if ".." in out else out.format(home)
    ended = run(*command, "--out", out, "--overwrite")
    assert ended.code == 1 and ("is the folder you are in" in ended.err or "is your home folder" in ended.err)


def test_a_file_is_no_folder(place, command):
    Path("file").write_text("mine")
    for options in ((), ("--overwrite",)):
        assert_refused(run(*command, "--out", "file", *options), "'file' is a file, and an adapter is a folder")
    assert Path("file").read_text() == "mine"


def test_a_picture_is_not_drawn_over_another_file(place):
    Path("photo.png").write_text("mine")
    assert_refused(run("inspect", "north", "--png", "photo.png"), "'photo.png' exists already")
    assert Path("photo.png").read_text() == "mine"
    assert run("inspect", "north", "--png", "photo.png", "--overwrite").code == 0
    assert_refused(run("inspect", "north", "--png", ".", "--overwrite"), "'.' is a folder")


def test_what_a_link_leads_to_is_not_written(place, hub):
    shutil.copytree("north", "mine")
    Path("other.md").write_text("other")
    Path("mine/README.md").unlink(missing_ok=True)
    Path("mine/README.md").symlink_to("../other.md")
    assert run("card", "mine", "--overwrite").code == 0
    assert Path("other.md").read_text() == "other" and "# Ravan adapter" in Path("mine/README.md").read_text()
    Path("mine/rounds.png").symlink_to("../made.png")
    record = '{"round": 1, "clients": ["a"], "failed_clients": [], "upload_bytes": 1, "download_bytes": 1}\n'
    Path("mine/rounds.jsonl").write_text(record)
    assert run("push", "mine", "clinic/mine").code == 0
    assert not Path("made.png").exists()
