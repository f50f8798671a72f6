"""Tiny models built from configs, and small data sets that can be learned. Nothing is downloaded."""

from __future__ import annotations

import functools
import gc
import os
import random
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The suite runs in two processes on two cores. Also, tests fork processes, in which threads of OpenMP would be missing.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import numpy as np
import pytest
import torch
from accelerate.utils import imports
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from peft_ravan.trainers.heap import frozen_heap

from .hub_server import hub  # noqa: F401, a fixture
from .properties import register_profiles


register_profiles()


NUM_LABELS = 4
# `gradient_checkpointing` in earlier releases of transformers
CHECKPOINTING = "activation_checkpointing"
if not hasattr(TrainingArguments, CHECKPOINTING):
    CHECKPOINTING = "gradient_checkpointing"
VOCAB_SIZE = 64
_BEGUN = set()  # the modules of which a test has ended


# they take longest, or wait for processes of Flower, so nothing else should wait for them at the end
START_FIRST = ("test_peft_suite.py", "test_loopback.py", "test_trust.py", "test_many_processes.py")


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: START_FIRST.index(item.path.name) if item.path.name in START_FIRST else len(START_FIRST)
    )


@pytest.fixture(autouse=True, scope="session")
def _frozen_heap():
    """To walk the imported modules and the collected tests takes longer than a tiny round, which collects garbage."""
    with frozen_heap():
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_search_for_missing_devices():
    """
    A device that is not there keeps each seed for later, with the whole stack, and is searched for after each training.
    Together that takes as long as a step.
    """
    with pytest.MonkeyPatch.context() as patch:
        for device in (torch.cuda, torch.xpu, torch.mtia):
            if not device.is_available():
                patch.setattr(device, "manual_seed_all", lambda seed: None)
        patch.setattr(imports, "_is_package_available", functools.cache(imports._is_package_available))
        yield


@pytest.fixture(autouse=True, scope="module")
def _frozen_imports(_frozen_heap):
    """The modules that tests have imported since."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown(item, nextitem):
    # the first test of a module imports what the others need, and what their fixtures have made stays anyway
    if item.module not in _BEGUN:
        _BEGUN.add(item.module)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    # `set_seed` also prepares the seeds of devices that may come later, which takes longer than most tests
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    torch.set_num_threads(1)  # the suite runs in two processes on two cores


def tiny_bert(num_layers: int = 1) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=16,
            num_labels=NUM_LABELS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
        )
    )


@pytest.fixture
def bert():
    return tiny_bert()


@pytest.fixture(params=[tiny_llama, tiny_gpt2], ids=["llama-Linear", "gpt2-Conv1D"])
def make_causal_lm(request):
    """A function that builds a causal language model, always with the same weights."""
    return request.param


@pytest.fixture
def input_ids():
    return torch.randint(0, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(1))


# most tests take the same, which nobody changes: `datasets` makes a new one of each change
@functools.cache
def classification_dataset(num_examples: int = 240, seed: int = 0) -> datasets.Dataset:
    """Sequences whose tokens come mostly from a range that depends on the label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, NUM_LABELS, num_examples)
    width = VOCAB_SIZE // NUM_LABELS
    tokens = labels[:, None] * width + rng.integers(0, width, (num_examples, 8))
    return datasets.Dataset.from_dict(
        {
            "input_ids": tokens.tolist(),
            "attention_mask": np.ones_like(tokens).tolist(),
            "labels": labels.tolist(),
        }
    )


@pytest.fixture
def train_dataset():
    return classification_dataset()


@pytest.fixture
def eval_dataset():
    return classification_dataset(num_examples=80, seed=1)


def randomize_adapter(model: torch.nn.Module, seed: int = 0, scale: float = 1.0) -> None:
    """Give every trained parameter of a model a value that visibly changes the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            if ".ravan_H." in name:
                layer, _, adapter = name.partition(".ravan_H.")
                noise /= model.get_submodule(layer).bases_scale[adapter]
            parameter.data.add_(scale * noise.to(parameter))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, for the words of [`sentence`]."""
    words = {f"w{index}": index for index in range(60)} | {"[PAD]": 60, "[EOS]": 61, "[UNK]": 62}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def sentence(start: int) -> str:
    return " ".join(f"w{(start + step) % 60}" for step in range(6))


def save_data(folder: Path, columns: dict, **features) -> Path:
    """A folder of parquet files for `load_dataset`."""
    folder.mkdir()
    for split, rows in (("train", slice(None)), ("test", slice(0, None, 3))):
        dataset = datasets.Dataset.from_dict({name: values[rows] for name, values in columns.items()})
        dataset = dataset.cast(datasets.Features({**dataset.features, **features}))
        dataset.to_parquet(folder / f"{split}.parquet")
    return folder


def make_model() -> BertForSequenceClassification:
    """A model that the default configuration fits: r * num_heads = 64."""
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
