"""The code on the README's first screen runs as it is printed."""

import re
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from .conftest import NUM_LABELS, VOCAB_SIZE, classification_dataset


README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def make_model() -> BertForSequenceClassification:
    """A model on which the default configuration fits: r * num_heads = 64."""
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=NUM_LABELS,
    )
    return BertForSequenceClassification(config)


def run(code: str, **given) -> dict:
    namespace = {
        "train_dataset": classification_dataset(400),
        "eval_dataset": classification_dataset(40, seed=1),
        **given,
    }
    exec(compile(code, str(README), "exec"), namespace)
    return namespace


def test_the_first_screen_has_both_uses():
    first_screen = "\n".join(README.read_text().splitlines()[:50])
    assert [snippet in first_screen for snippet in SNIPPETS[:2]] == [True, True]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tmp_path


def test_tuner_and_trainer(folder):
    namespace = run(SNIPPETS[0], model=make_model())
    assert namespace["trainer"].state.global_step > 0
    assert (folder / "ravan-adapter" / "adapter_model.safetensors").exists()


def test_federated_trainer(folder):
    tuned = run(SNIPPETS[0].split("trainer =")[0], model=make_model())
    namespace = run(SNIPPETS[1], model=tuned["model"])
    history = namespace["trainer"].state.log_history
    assert len([record for record in history if "round" in record]) == namespace["args"].num_rounds
    assert (folder / "federated-adapter" / "adapter_model.safetensors").exists()
    assert torch.isfinite(torch.tensor(history[-1]["train_loss"]))


def test_merging_without_a_trainer():
    namespace = run(SNIPPETS[2])
    assert namespace["result"].diagnostics["method"] == "fedrpca"
