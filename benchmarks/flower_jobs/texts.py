"""What the jobs of benchmarks/flower.py have in common: a model, the data of each client, and what they write down."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification


BASE_MODEL = "FLOWER_JOBS_BASE"  # the environment variable with the folder of the base model
CLIENTS, CLIENTS_PER_ROUND = 20, 5
STEPS, BATCH_SIZE = 10, 16
LEARNING_RATE = 1e-3
SEED = 0
NUM_LABELS = 4
MIN_TOKENS, MAX_TOKENS = 32, 64

SIZES = {
    "small": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256},
    "MiniLM": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
VOCAB_SIZES = {"small": 1000, "MiniLM": 30522}


def save_base_model(size: str, folder: Path) -> None:
    """Random weights cost as much as any others."""
    torch.manual_seed(SEED)
    config = BertConfig(vocab_size=VOCAB_SIZES[size], num_labels=NUM_LABELS, **SIZES[size])
    BertForSequenceClassification(config).save_pretrained(folder)


def load_model() -> PeftModel:
    base = AutoModelForSequenceClassification.from_pretrained(os.environ[BASE_MODEL])
    return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))


def load_part(index: int) -> Dataset:
    """The texts of one client: 32 to 64 random tokens, padded, as a tokenizer does with `padding="max_length"`."""
    rng = np.random.default_rng(index)
    examples = STEPS * BATCH_SIZE
    lengths = rng.integers(MIN_TOKENS, MAX_TOKENS + 1, (examples, 1))
    mask = (np.arange(MAX_TOKENS) < lengths).astype("int64")
    columns = {
        "input_ids": rng.integers(1, VOCAB_SIZES["small"], mask.shape) * mask,
        "attention_mask": mask,
        "labels": rng.integers(0, NUM_LABELS, examples),
    }
    return Dataset.from_dict(columns).with_format("torch")


def note_round(folder: str, server_round: int) -> None:
    """Write a line for a round, where a `FederatedTrainer` writes one."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder, "rounds.jsonl"), "a") as file:
        file.write(json.dumps({"round": server_round}) + "\n")
