"""The examples run as printed, on tiny models and local data."""

import runpy
import sys
from pathlib import Path

import datasets
import pytest
from peft import PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from peft_ravan import RavanConfig, to_lora
from peft_ravan.trainers import read_history
from peft_ravan.trainers.demo import digits
from peft_ravan.trainers.demo.comparison import show_table

from .conftest import make_tokenizer, randomize_adapter, save_data, sentence, tiny_bert, tiny_llama
from .digits import save_base_model


EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.fixture
def classifier(tmp_path) -> Path:
    config = tiny_bert().config
    config.hidden_size = 64  # the examples have 4 heads of rank 16
    BertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    make_tokenizer().save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


@pytest.fixture
def language_model(tmp_path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "llama")
    make_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def labelled(tmp_path) -> Path:
    texts = [sentence(index) for index in range(160)]
    labels = [index % 4 for index in range(160)]
    names = datasets.ClassLabel(names=["a", "b", "c", "d"])
    return save_data(tmp_path / "labelled", {"text": texts, "label": labels}, label=names)


def test_text_classification(classifier, labelled, tmp_path):
    run(
        "text_classification",
        "--model",
        classifier,
        "--data",
        labelled,
        "--output-dir",
        tmp_path / "out",
        "--steps",
        3,
    )
    base_model = AutoModelForSequenceClassification.from_pretrained(classifier, num_labels=4)
    assert PeftModel.from_pretrained(base_model, tmp_path / "out").active_peft_config.peft_type == "RAVAN"


def test_federated_text_classification(classifier, labelled, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--output-dir", out, "--rounds", 2, "--local-steps", 1)
    run("federated_text_classification", "--model", classifier, "--data", labelled, *options)
    history = read_history(out)
    assert [record["round"] for record in history] == [1, 2] and all(len(record["clients"]) == 5 for record in history)
    assert "client_19" in capsys.readouterr().out  # the table of the clients' data


def test_sft_and_the_twin_of_what_it_trains(language_model, tmp_path, capsys):
    pytest.importorskip("trl")
    data = save_data(tmp_path / "texts", {"text": [sentence(index) for index in range(64)]})
    out = tmp_path / "out"
    run("sft", "--model", language_model, "--data", data, "--output-dir", out, "--steps", 2)
    to_lora(out, out / "lora")
    capsys.readouterr()
    run("load_lora_twin", "--adapter", out, "--subfolder", "lora", "--prompt", "w1 w2 w3")
    assert capsys.readouterr().out.startswith("w1 w2 w3")


def test_federated_sft_goes_on_where_it_stopped(language_model, tmp_path, capsys):
    pytest.importorskip("trl")
    texts = [sentence(index) for index in range(60)]
    roles = [f"play/ROLE {index % 4}" for index in range(60)]
    data = save_data(tmp_path / "lines", {"client_id": roles, "text": texts})
    common = ("--model", language_model, "--data", data, "--min-characters", 1, "--clients-per-round", 2)
    steps = ("--local-steps", 1)
    run("federated_sft", *common, *steps, "--output-dir", tmp_path / "whole", "--rounds", 3)
    run("federated_sft", *common, *steps, "--output-dir", tmp_path / "out", "--rounds", 2)
    run("federated_sft", *common, *steps, "--output-dir", tmp_path / "out", "--rounds", 3, "--resume")
    whole, resumed = (read_history(tmp_path / name) for name in ("whole", "out"))
    assert [record["round"] for record in resumed] == [0, 1, 2, 3]
    assert [r.get("train_loss") for r in whole] == [r.get("train_loss") for r in resumed]
    assert "play/ROLE 3" in capsys.readouterr().out  # the table of the roles
    assert (tmp_path / "out" / "history.png").stat().st_size > 10_000


def test_merge_adapters(classifier, tmp_path, capsys):
    for seed, site in enumerate(("north", "south", "west")):
        base_model = AutoModelForSequenceClassification.from_pretrained(classifier)
        model = get_peft_model(base_model, RavanConfig(r=2, num_heads=2, task_type="SEQ_CLS"))
        randomize_adapter(model, seed=seed, scale=0.1)
        model.save_pretrained(tmp_path / site)
    sites = [tmp_path / site for site in ("north", "south", "west")]
    run("merge_adapters", *sites, "--examples", 1, 1, 2, "--output-dir", tmp_path / "merged")
    assert "encoder.layer.0.attention.self.value" in capsys.readouterr().out
    base_model = AutoModelForSequenceClassification.from_pretrained(classifier)
    assert PeftModel.from_pretrained(base_model, tmp_path / "merged").active_peft_config.num_heads == 2


def test_the_demo_runs_to_its_end(tmp_path, monkeypatch, capsys):
    plan = digits.Plan(num_clients=4, clients_per_round=2, num_rounds=1, max_steps=1)
    monkeypatch.setattr(digits, "pretrain", save_base_model)
    monkeypatch.setattr(digits, "Plan", lambda: plan)
    monkeypatch.setattr(digits, "silence_libraries", lambda: None)
    monkeypatch.setenv("COLUMNS", "150")
    with pytest.raises(SystemExit) as ended:
        run("federated_digits", "--output-dir", tmp_path)
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert [row[0] for row in table] == ["LoRA, FedAvg", "Ravan", "Ravan, FedRPCA"]
    # of one round, the mean is the result
    assert "last 1" in shown and all(row[2] == row[3] for row in table)
    assert "4 clients hold 1165 other images" in shown and "as before" in shown
    assert {"accuracy.png", "history.png", "adapter"} <= {path.name for path in tmp_path.iterdir()}


def test_the_table_of_the_demo_fits_80_columns(capsys):
    names = [*(method.name for method in digits.methods()), "Ravan, FedRPCA, over Flower"]
    history = [{"round": number, "eval_accuracy": number / 25, "upload_bytes": 39_600} for number in range(21)]
    results = [digits.Result(name, None, history, 0.381, 132.4) for name in names]
    show_table(results, digits.Plan(), Console(width=80))
    shown = capsys.readouterr().out
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    words = set(shown.replace("│", " ").replace("┃", " ").split())
    assert {"before", "uploaded", "decile", "seconds", "FedRPCA,", "Flower", "80.0%", "38.1%", "0.83", "132"} <= words
