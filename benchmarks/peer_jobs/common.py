"""
What the jobs of benchmarks/peers.py have in common: a model, the data of each client, and what they write down.

    python common.py small FOLDER    # save the base model
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, set_seed


FOLDER = "PEER_JOBS_FOLDER"  # the environment variable with the folder of the base model and of the draws
CHECK = "PEER_JOBS_CHECK"  # and the one that is set where the loss is evaluated after each round
CLIENTS, CLIENTS_PER_ROUND = 20, 5
STEPS, BATCH_SIZE = 10, 8
LEARNING_RATE = 5e-3
MAX_GRAD_NORM = 1.0
SEED = 0
NUM_LABELS, LENGTH = 4, 32
USED_TOKENS = 1000
TOPIC_TOKENS, TOPIC_SHARE = 20, 0.5

SIZES = {
    "small": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256},
    "MiniLM": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
VOCAB_SIZES = {"small": USED_TOKENS, "MiniLM": 30522}
INITIALIZER_RANGES = {"small": 0.1, "MiniLM": 0.05}  # with which a frozen random model can be trained


def save_base_model(size: str, folder: Path) -> None:
    """Random weights cost as much as any others."""
    torch.manual_seed(SEED)
    more = {"initializer_range": INITIALIZER_RANGES[size], "num_labels": NUM_LABELS}
    config = BertConfig(vocab_size=VOCAB_SIZES[size], **more, **SIZES[size])
    BertForSequenceClassification(config).save_pretrained(folder)


def load_model() -> PeftModel:
    """LoRA of rank 8 at the queries and values, and a task head, the same ones whenever it is called."""
    set_seed(SEED)
    base = AutoModelForSequenceClassification.from_pretrained(os.environ[FOLDER])
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, task_type="SEQ_CLS", target_modules=["query", "value"]))


@functools.cache
def kept_model() -> PeftModel:
    """The same model, which a process that calls it again has kept."""
    return load_model()


def load_examples(client: int) -> dict[str, np.ndarray]:
    """
    Args:
        client (`int`): A client, from 0. Client -1 has the examples of the check.

    Returns:
        `dict[str, np.ndarray]`: Texts of 16 to 32 tokens, padded. Some tokens say which label a text has. Each client
        has another number of examples, and enough for all steps: pfl-research stops at the end of an epoch.
    """
    rng = np.random.default_rng([SEED, client + 1])
    examples = (STEPS + client % 5) * BATCH_SIZE
    labels = rng.integers(0, NUM_LABELS, examples)
    topic = 1 + TOPIC_TOKENS * labels[:, None] + rng.integers(0, TOPIC_TOKENS, (examples, LENGTH))
    other = rng.integers(1, USED_TOKENS, (examples, LENGTH))
    mask = (np.arange(LENGTH) < rng.integers(LENGTH // 2, LENGTH + 1, (examples, 1))).astype("int64")
    tokens = np.where(rng.random((examples, LENGTH)) < TOPIC_SHARE, topic, other) * mask
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def drawn_clients() -> list[list[int]]:
    """Who trains in each round, for frameworks that can be told."""
    return json.loads(Path(os.environ[FOLDER], "draws.json").read_text())


def is_checked() -> bool:
    return bool(os.environ.get(CHECK))


def note_round(folder: str, number: int, adapter: Callable[[], dict[str, torch.Tensor]]) -> None:
    """
    Write a line for a round, as a `FederatedTrainer` does, with the loss of the merged adapter in a check, and otherwise
    with a number that changes if something was trained: Flower goes on if all clients have failed.

    Args:
        folder (`str`): Where rounds.jsonl is written.
        number (`int`): The round, from 1.
        adapter (`Callable[[], dict[str, torch.Tensor]]`): Returns the merged adapter with the names of PEFT.
    """
    state = {name: torch.as_tensor(value) for name, value in adapter().items()}
    record = {"round": number, "sum": sum(tensor.abs().sum().item() for tensor in state.values())}
    if is_checked():
        model = load_model()
        set_peft_model_state_dict(model, state)
        batch = {name: torch.from_numpy(values) for name, values in load_examples(-1).items()}
        with torch.no_grad():
            record["eval_loss"] = model.eval()(**batch).loss.item()
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder, "rounds.jsonl"), "a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    save_base_model(sys.argv[1], Path(sys.argv[2]))
