"""The real commands, run on saved adapters of a tiny model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from peft_ravan import RavanConfig
from peft_ravan_cli import app

from ..conftest import make_tokenizer, randomize_adapter, sentence, tiny_bert
from .helpers import write


SITES = ("north", "south", "west")


@dataclass(frozen=True)
class Ended:
    """The exit code and output of a command."""

    code: int
    out: str
    err: str


def run(*words: object) -> Ended:
    """Run a command in this process."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    return Ended(result.exit_code, result.stdout, result.stderr)


def assert_refused(ended: Ended, reason: str) -> None:
    """Check that a command has failed with an error message of one line."""
    assert ended.code == 1, ended
    [line] = ended.err.splitlines()
    assert line.startswith("Error: ") and reason in line


def ravan_config(**kwargs) -> RavanConfig:
    return RavanConfig(**{"r": 2, "num_heads": 4, "task_type": "SEQ_CLS", **kwargs})


def lora_config(**kwargs) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "task_type": "SEQ_CLS", **kwargs})


def save_adapter(folder: Path, config: PeftConfig, seed: int | None, base: str = "base") -> None:
    """Save an adapter with random weights as if it had been trained, or an untrained one with `seed=None`."""
    torch.manual_seed(7)  # LoRA's A and the task head start from the same values everywhere
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), config)
    if seed is not None:
        randomize_adapter(model, seed=seed, scale=0.1)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """A folder with a base model, and Ravan and LoRA adapters of three sites. Tests must not write into it."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # so that the base model has the name "base"
        tiny_bert(num_layers=2).save_pretrained("base")
        make_tokenizer().save_pretrained("base")
        for seed, site in enumerate(SITES):
            save_adapter(Path(site), ravan_config(), seed)
            save_adapter(Path(f"lora-{site}"), lora_config(), seed)
        save_adapter(Path("lora-start"), lora_config(), None)
    return folder


@pytest.fixture
def place(saved, tmp_path, monkeypatch) -> Path:
    """A working folder that contains only links to the saved adapters."""
    for path in saved.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def folder(place):
    rows = [
        {"text": sentence(start), "label": "high" if start >= 30 else "low", "site": f"s{number % 2}"}
        for number, start in enumerate(number * 7 % 60 for number in range(60))
    ]
    datasets.Dataset.from_list(rows[:40]).to_csv("train.csv")
    datasets.Dataset.from_list(rows[40:]).to_csv("test.csv")
    write()
    return place
