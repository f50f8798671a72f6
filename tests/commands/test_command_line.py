"""The command line: help, exit codes, one-line errors, and the commands that inspect adapters."""

import json
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

import peft_ravan
from peft_ravan_cli import main
from peft_ravan_cli.errors import in_one_line, quiet

from .conftest import SITES, assert_refused, ravan_config, run, save_adapter
from .helpers import COMMANDS


def process(*words, **kwargs):
    command = [sys.executable, "-m", "peft_ravan_cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


def test_there_are_these_commands():
    assert COMMANDS == ["demo", "train", "plan", "merge", "to-lora", "inspect", "card", "push", "new-app"]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_an_example(command):
    ended = run(command, "--help")
    assert ended.code == 0 and f"Example: peft-ravan {command}" in ended.out


def test_help_does_not_load_torch():
    code = "import sys, peft_ravan_cli; peft_ravan_cli.app(['merge', '--help'], standalone_mode=False); "
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'peft_ravan')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_version():
    assert run("--version").out == f"peft-ravan {peft_ravan.__version__}\n"


@pytest.mark.parametrize(
    "words",
    [["mrge"], ["merge"], ["merge", "north"], ["inspect", "--pngg"], ["to-lora", "x", "--rank", "x", "-o", "y"]],
)
def test_what_is_typed_wrongly_exits_with_2(words):
    ended = run(*words)
    assert ended.code == 2 and "Error" in ended.err and "Traceback" not in ended.err


def test_a_real_process_shows_nothing_of_other_packages(folder):
    ended = process("train", "run.yaml", "--eval_strategy", "no")
    assert (ended.returncode, ended.stderr) == (0, "")
    shown = ended.stdout.splitlines()
    assert shown[0].split()[0] == "clients" and len(shown) == 5


@pytest.fixture
def restored(monkeypatch):
    """What `main` changes for its process."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def test_a_process_ends_with_1_and_the_error_in_one_line(place, restored, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "nowhere"])
    expected = "Error: There is no folder 'nowhere', and it is no name on the Hub, such as owner/name.\n"
    assert ended.value.code == 1 and capsys.readouterr() == ("", expected)


def test_debug_shows_the_traceback(place, restored, capsys):
    with pytest.raises(FileNotFoundError) as raised:
        main(["inspect", "nowhere", "--debug"])
    sys.excepthook(raised.type, raised.value, raised.tb)  # what the process ends with
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert "FileNotFoundError: There is no folder 'nowhere'" in shown


def test_a_full_disk_is_reported_and_nothing_is_left_behind(place):
    # files above this size are refused, which simulates a full disk
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        ended = run("merge", *SITES, "--out", "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_refused(ended, "The folder could not be written")
    assert "Make room, and try again" in ended.err
    assert not list(place.glob("*merged*")) and not list(place.glob(".merged*"))


def test_a_folder_that_cannot_be_made_is_reported(place):
    (place / "file").write_text("")
    assert_refused(run("merge", *SITES, "-o", "file/merged"), "Not a directory: ")


def test_unexpected_errors_name_their_type():
    assert in_one_line(KeyError("x")) == "KeyError: 'x' (with --debug there is more)"
    assert in_one_line(ValueError("one\n  two")) == "one two"
    assert in_one_line(PermissionError(13, "Permission denied", "/x")) == "Permission denied: /x"


def test_only_warnings_of_this_package_are_shown(capsys):
    with quiet():
        warnings.warn_explicit("of another", UserWarning, "x.py", 1, module="transformers.x")
        warnings.warn_explicit("of\nours", UserWarning, "x.py", 1, module="peft_ravan.merging.methods.fedrpca")
    assert capsys.readouterr().err == "Warning: of ours\n"


def logits(model):
    with torch.no_grad():
        return model(torch.arange(6)[None]).logits


def load(folder):
    return PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained("base"), folder).eval()


def test_to_lora_saves_the_same_output(place):
    ended = run("to-lora", "north", "--out", "twin")
    assert (ended.code, ended.out, ended.err) == (0, "A LoRA adapter of rank 8 and its card are in twin.\n", "")
    torch.testing.assert_close(logits(load("twin")), logits(load("north")))
    assert "This is a LORA adapter" in (place / "twin" / "README.md").read_text()
    assert_refused(run("to-lora", "north", "-o", "twin"), "'twin' exists already")
    assert run("to-lora", "north", "-o", "twin", "--rank", "3", "--no-modules-to-save", "--overwrite").code == 0
    config = json.loads((place / "twin" / "adapter_config.json").read_text())
    assert (config["r"], config["modules_to_save"]) == (3, None)
    assert "of rank 8 " not in run("to-lora", "north", "-o", "less", "--rank", "0.5").out
    assert_refused(run("to-lora", "lora-north", "-o", "other"), "this one is of LORA")
    assert not (place / "other").exists()


def test_inspect_shows_a_table_a_picture_and_json(place):
    ended = run("inspect", "north", "--png", "heads.png")
    assert ended.code == 0 and ended.out.startswith("RAVAN: 4 targets") and "fingerprint" in ended.out
    assert (place / "heads.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(run("inspect", "north", "--json").out)
    [target, *_] = report["targets"].values()
    assert (report["peft_type"], report["base_model"], target["rank"]) == ("RAVAN", "base", 8)
    norm = sum(value**2 for value in target["singular_values"]) ** 0.5
    assert norm == pytest.approx(target["norm"]) and len(target["head_norms"]) == len(target["fingerprint"]) == 4


def test_inspect_tells_what_it_cannot_read(place):
    save_adapter(place / "svd", ravan_config(init_bases="weight_svd", save_projection=False), seed=1)
    assert_refused(run("inspect", "svd"), "cannot be made again from it")
    assert_refused(run("inspect", "north", "--png", "nowhere/heads.png"), "No such file or directory: ")


def test_card_is_written_but_not_over_another(place):
    save_adapter(place / "mine", ravan_config(), seed=1)
    (place / "mine" / "README.md").write_text("my own words")
    assert_refused(run("card", "mine"), "'mine/README.md' exists already")
    assert (place / "mine" / "README.md").read_text() == "my own words"
    assert run("card", "mine", "--overwrite").code == 0
    assert "# Ravan adapter" in (place / "mine" / "README.md").read_text()
    assert_refused(run("card", "base"), "has no adapter_config.json")


def test_the_card_that_is_there_gives_its_license(place):
    save_adapter(place / "mine", ravan_config(), seed=1)
    assert run("card", "mine", "--overwrite", "--license", "mit", "--dataset", "clinc/clinc_oos").code == 0
    assert run("card", "mine", "--overwrite").code == 0
    card = (place / "mine" / "README.md").read_text()
    assert "license: mit" in card and "- clinc/clinc_oos" in card
    assert_refused(
        run("card", "mine", "--overwrite", "--dataset", "../data"), "must be a name on the Hub, got '../data'"
    )


def test_from_the_hub_and_back(place, hub):
    for site in SITES[:2]:
        ended = run("push", site, f"clinic/{site}", "--private", "--license", "mit")
        assert (ended.code, ended.err) == (0, "") and f"/clinic/{site}." in ended.out
    assert hub.private["clinic/north"] and "ravan/adapter_model.safetensors" in hub.files("clinic/north")
    assert b"license: mit" in hub.files("clinic/north")["README.md"]
    # the path of the base model was left out, since it is a folder
    assert run("merge", "clinic/north", "clinic/south", "--base-model", "base", "-o", "from-the-hub").code == 0
    assert run("merge", "north", "south", "-o", "from-here").code == 0
    torch.testing.assert_close(logits(load("from-the-hub")), logits(load("from-here")))
    assert run("push", "from-here", "clinic/both", "--no-lora-twin").code == 0
    files = hub.files("clinic/both")
    assert b"merged from 2 adapters" in files["README.md"] and "ravan/adapter_model.safetensors" not in files


def test_the_twin_of_an_adapter_on_the_hub_carries_its_record_and_a_link(place, hub):
    shutil.copytree("north", "ours")
    rounds = [{"round": 1, "clients": ["a"], "upload_bytes": 10, "train_loss": 1.0, "eval_accuracy": 0.75}]
    Path("ours", "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rounds))
    Path("ours", "federation.json").write_text(json.dumps({"num_clients": 7, "facts": {"Seed": 5}}))
    names = {"0": "calm", "1": "busy", "2": "late", "3": "quiet"}
    Path("ours", "id2label.json").write_text(json.dumps(names))
    assert run("push", "ours", "clinic/ours", "--license", "mit", "--dataset", "a/b", "--split", "test").code == 0
    assert run("to-lora", "clinic/ours", "-o", "twin").code == 0
    card = Path("twin", "README.md").read_text()
    assert (
        "by 7 clients" in card
        and "| Seed | 5 |" in card
        and "| accuracy | 0.7500 |" in card
        and "license: mit" in card
    )
    assert "[clinic/ours](https://huggingface.co/clinic/ours)" in card and 'id2label = {0: "calm"' in card
    assert run("to-lora", "clinic/ours", "-o", "small", "--rank", "2").code == 0
    card = Path("small", "README.md").read_text()
    assert "| Seed | 5 |" in card and "accuracy" not in card  # which is that of the full rank
    assert run("push", "twin", "clinic/twin").code == 0
    assert b"[clinic/ours](https://huggingface.co/clinic/ours)" in hub.files("clinic/twin")["README.md"]
    assert run("merge", "ours", "clinic/ours", "--base-model", "base", "-o", "merged").code == 0
    assert json.loads(Path("merged", "id2label.json").read_text()) == names


def test_the_base_model_is_named_or_pushed(place, hub):
    save_adapter(place / "mine", ravan_config(), seed=1)
    assert run("card", "mine", "--overwrite", "--base-model", "google/bert-tiny").code == 0
    assert "base_model: google/bert-tiny" in (place / "mine" / "README.md").read_text()
    assert_refused(run("push", "mine", "clinic/mine", "--license", "mitt"), "Did you mean `mit`?")
    assert_refused(run("push", "mine", "clinic/mine", "--base-model", "../base"), "must be a name on the Hub")
    assert hub.requests == []
    assert run("push", "mine", "clinic/named", "--base-model", "google/bert-tiny", "--ravan-at-root").code == 0
    config = json.loads(hub.files("clinic/named")["adapter_config.json"])
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("RAVAN", "google/bert-tiny")
    ended = run("push", "mine", "clinic/mine", "--with-base-model")
    assert ended.code == 0 and ended.out.splitlines()[1].endswith("/clinic/mine-base."), ended
    assert {"model.safetensors", "tokenizer.json"} <= hub.files("clinic/mine-base").keys()
    model = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained("clinic/mine-base"), "clinic/mine"
    )
    torch.testing.assert_close(logits(model.eval()), logits(load("mine")))


def test_a_picture_of_the_rounds_is_uploaded(place, hub):
    shutil.copytree("north", "ours")
    record = {"round": 1, "clients": ["ward 7"], "upload_bytes": 10, "download_bytes": 10, "train_loss": 1.0}
    Path("ours", "rounds.jsonl").write_text(json.dumps({**record, "failed_clients": []}) + "\n")
    assert run("push", "ours", "clinic/ours").code == 0
    files = hub.files("clinic/ours")
    assert files["rounds.png"].startswith(b"\x89PNG") and b"rounds.png" in files["README.md"]
    assert b"ward 7" not in files["rounds.jsonl"]


def test_an_upload_that_is_interrupted_is_reported(place, hub):
    hub.breaks += ["POST /api/models/clinic/north/commit"] * 10
    ended = run("push", "north", "clinic/north")
    assert ended.code == 1 and ended.err.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in ended.err


def test_demo_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    # imported before by another test, they are attributes of their package, too
    for name in ("digits", "comparison"):
        monkeypatch.delitem(sys.modules, f"peft_ravan.trainers.demo.{name}", raising=False)
        monkeypatch.delattr(f"peft_ravan.trainers.demo.{name}", raising=False)
    assert_refused(
        run("demo"), "needs sklearn.datasets, which comes with an optional extra: pip install 'peft-ravan[demo]'"
    )


def test_demo_takes_a_folder_and_a_seed(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr("peft_ravan.trainers.demo.comparison.compare", lambda *values: given.append(values))
    assert run("demo", "--output-dir", tmp_path, "--seed", 3).code == 0
    assert given == [(tmp_path, 3)]
