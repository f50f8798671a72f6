"""
What an experiment on accuracy trains: real data, a model, and how an answer is judged.

Models that are adapted in their upper layers only get the hidden states below them, which are computed once for all runs,
see `cached_layers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
import torch
from cached_layers import CachedTexts, keep_upper_layers
from real_data import label_column, load_splits, text_column
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    ViTForImageClassification,
    default_data_collator,
)
from vision_base import image_batch, pretrained_vit

from peft_ravan.trainers import FederatedTrainer


IGNORED = -100  # the label of tokens that are not predicted
# In bfloat16 on a CPU, the backward pass of torch's fused attention takes longer than all else in a step.
ATTENTION = None if torch.cuda.is_available() else "eager"


@dataclass(frozen=True)
class Split:
    """
    What a run trains on and is evaluated on. Both have the column `labels` if there are classes, and `client` if clients come
    with the data.
    """

    train: datasets.Dataset
    test: datasets.Dataset


class Job:
    """
    Args:
        data (`str`): A folder with train.parquet and test.parquet, or a Hub id.
        model (`str`): The path or Hub id of the model.
        folder (`Path`): Where the job keeps what it makes for itself: a model, or hidden states.
        max_test_examples (`int`, *optional*): How many examples of the test split are used, drawn with seed 0.
        subset (`str`, *optional*): The subset of data on the Hub, see [`load_splits`].
        test_split (`str`, *optional*, defaults to `"test"`): The split of data on the Hub that is evaluated.
    """

    # whether labels are classes, from which clients with different shares of them can be made
    has_classes: ClassVar[bool] = True
    trainer_class: type[Trainer] = FederatedTrainer
    collator: Callable[[list[dict]], dict[str, torch.Tensor]] = staticmethod(default_data_collator)

    def __init__(
        self,
        *,
        data: str,
        model: str,
        folder: Path,
        max_test_examples: int | None = None,
        subset: str | None = None,
        test_split: str = "test",
    ):
        self.model_name, self.folder, self.max_test_examples = model, folder, max_test_examples
        self.train, self.test = self._load(load_splits(data, subset, test_split))

    def _load(self, splits: datasets.DatasetDict) -> tuple[datasets.Dataset, datasets.Dataset]:
        raise NotImplementedError

    def make_model(self) -> PreTrainedModel:
        """The model, with a new task head from the seed of torch."""
        raise NotImplementedError

    def predicted(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What is kept of the logits of a batch of test examples: the most likely classes or tokens."""
        return logits.argmax(-1)

    def hits(self, predictions: np.ndarray, labels: np.ndarray, rows: datasets.Dataset) -> np.ndarray:
        """
        Args:
            predictions (`np.ndarray`): What was predicted of all test examples, see [`Job.predicted`].
            labels (`np.ndarray`): The labels that the collator made.
            rows (`datasets.Dataset`): The test examples.

        Returns:
            `np.ndarray`: How right the answer to each example is, from 0 to 1, `[N]`.
        """
        return hits(predictions, labels)

    def split(self, validation_share: float | None, seed: int) -> Split:
        """
        Args:
            validation_share (`float`, *optional*): The share of the training data that is held back and takes the place of
                the test data. By default the test data are used.
            seed (`int`): The seed of this draw.

        Returns:
            [`Split`]: The data of a run.
        """
        if validation_share is None:
            return Split(self.train, self.test)
        order = np.random.default_rng(seed).permutation(len(self.train))
        held_back = round(validation_share * len(self.train))
        return Split(
            self.train.select(order[held_back:]), self.train.select(order[:held_back][: self.max_test_examples])
        )

    def _shortened(self, test: datasets.Dataset) -> datasets.Dataset:
        if self.max_test_examples is None or len(test) <= self.max_test_examples:
            return test
        return test.shuffle(seed=0).select(range(self.max_test_examples))


class Texts(Job):
    """
    Classes of texts, by a BERT encoder whose upper layers are adapted.

    Args:
        max_length (`int`): The length at which texts are cut, in tokens.
        upper_layers (`int`): How many layers are adapted. Those below are computed once.
        label (`str`, *optional*): The column with the classes. By default the first one with classes.
        client_column (`str`, *optional*): The column with the author, if authors are the clients.
        min_examples (`int`): Authors with fewer texts to train on are left out.
        **kwargs: As for [`Job`].
    """

    def __init__(
        self,
        *,
        max_length: int,
        upper_layers: int,
        label: str | None = None,
        client_column: str | None = None,
        min_examples: int = 1,
        **kwargs,
    ):
        self.max_length, self.upper_layers, self.label = max_length, upper_layers, label
        self.client_column, self.min_examples = client_column, min_examples
        super().__init__(**kwargs)

    def _load(self, splits: datasets.DatasetDict) -> tuple[datasets.Dataset, datasets.Dataset]:
        text, label = text_column(splits["train"]), self.label or label_column(splits["train"])
        found = {split: splits[split].filter(lambda row: bool(row[text].strip())) for split in ("train", "test")}
        if self.client_column is not None:
            found = _of_clients(found, self.client_column, self.min_examples)
        found["test"] = self._shortened(found["test"])
        # batches of texts of about the same length are evaluated faster
        found["test"] = found["test"].select(np.argsort([len(row) for row in found["test"][text]], kind="stable"))
        # one after the other, since one collator looks up the hidden states of both
        both = datasets.concatenate_datasets([found["train"], found["test"]])
        self.num_labels = both.features[label].num_classes
        encoder = AutoModelForSequenceClassification.from_pretrained(self.model_name)
        self.first = encoder.config.num_hidden_layers - self.upper_layers
        tokenizer = AutoTokenizer.from_pretrained(self.model_name)
        self.collator = CachedTexts(
            encoder,
            tokenizer,
            both[text],
            both[label],
            both.features[label],
            self.first,
            self.max_length,
            self.folder,
        )
        rows = self.collator.dataset
        if self.client_column is not None:
            rows = rows.add_column("client", both[self.client_column])
        number = len(found["train"])
        return rows.select(range(number)), rows.select(range(number, len(rows)))

    def make_model(self) -> PreTrainedModel:
        model = AutoModelForSequenceClassification.from_pretrained(
            self.model_name, num_labels=self.num_labels, attn_implementation=ATTENTION
        )
        keep_upper_layers(model, self.first)
        return model


class Roles(Job):
    """
    The next token of speeches, by a causal language model. Each role of a play is a client.

    Args:
        block_length (`int`): How many tokens an example has.
        min_characters (`int`): Roles with fewer characters to train on are left out.
        **kwargs: As for [`Job`].
    """

    has_classes = False

    def __init__(self, *, block_length: int, min_characters: int, **kwargs):
        self.block_length, self.min_characters = block_length, min_characters
        super().__init__(**kwargs)

    def _load(self, splits: datasets.DatasetDict) -> tuple[datasets.Dataset, datasets.Dataset]:
        tokenizer = AutoTokenizer.from_pretrained(self.model_name)
        speeches = {split: _by_client(splits[split], "client_id") for split in ("train", "test")}
        roles = [
            role
            for role, texts in speeches["train"].items()
            if sum(map(len, texts)) >= self.min_characters and role in speeches["test"]
        ]
        train, test = (self._blocks(tokenizer, {role: speeches[split][role] for role in roles}) for split in speeches)
        return train, self._shortened(test)

    def _blocks(self, tokenizer, texts_of: Mapping[str, list[str]]) -> datasets.Dataset:
        rows: dict[str, list] = {"input_ids": [], "labels": [], "client": []}
        for role, texts in texts_of.items():
            tokens = tokenizer("\n\n".join(texts))["input_ids"]
            for start in range(0, len(tokens), self.block_length):
                block = tokens[start : start + self.block_length]
                missing = self.block_length - len(block)
                rows["input_ids"].append(block + [0] * missing)
                rows["labels"].append(block + [IGNORED] * missing)
                rows["client"].append(role)
        return datasets.Dataset.from_dict(rows)

    def make_model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.model_name)


class Images(Job):
    """
    Classes of images, by a small vision transformer that is pretrained on the first images of the training split. The
    clients hold the others.

    Args:
        pretraining_examples (`int`): How many images it is pretrained on.
        rotation (`int`): By how many quarters of a turn the images of the clients and of the test data are rotated.
        **kwargs: As for [`Job`]. `model` is not used.
    """

    def __init__(self, *, pretraining_examples: int, rotation: int = 0, **kwargs):
        self.pretraining_examples = pretraining_examples
        self.collator = partial(image_batch, rotation=rotation)
        super().__init__(**kwargs)

    def _load(self, splits: datasets.DatasetDict) -> tuple[datasets.Dataset, datasets.Dataset]:
        train, test = images_and_labels(splits)
        self.num_labels = train.features["labels"].num_classes
        public = train.select(range(self.pretraining_examples))
        self.base = pretrained_vit(public, self.folder)
        return train.select(range(self.pretraining_examples, len(train))), self._shortened(test)

    def make_model(self) -> PreTrainedModel:
        model = ViTForImageClassification.from_pretrained(self.base, attn_implementation=ATTENTION)
        model.classifier.reset_parameters()  # the clients' head is a new one
        return model


def hits(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """
    Args:
        predictions (`np.ndarray`): The predicted classes, `[N]`, or tokens, `[N, T]`.
        labels (`np.ndarray`): The right ones, of the same shape. Tokens are predicted from those before them.

    Returns:
        `np.ndarray`: The share of right answers for each example, `[N]`.
    """
    if labels.ndim == 1:
        return (predictions == labels).astype(float)
    predictions, labels = predictions[:, :-1], labels[:, 1:]
    counts = labels != IGNORED
    return ((predictions == labels) & counts).sum(1) / np.maximum(counts.sum(1), 1)


def client_weights(clients: Mapping[str, datasets.Dataset], test: datasets.Dataset) -> np.ndarray:
    """
    How much each test example counts for each client: those of the client itself if the test data have a column `client`,
    and otherwise as often as the client has their label in training. Without labels all count alike.

    Args:
        clients (`Mapping[str, datasets.Dataset]`): The training data of the clients.
        test (`datasets.Dataset`): The test data.

    Returns:
        `np.ndarray`: The weights, `[C, N]`, with rows that sum to 1. Clients without test examples are left out.
    """
    if "client" in test.column_names:
        found = np.asarray(test["client"])
        weights = np.stack([found == name for name in clients]).astype(float)
    elif "labels" not in test.column_names:
        weights = np.ones((len(clients), len(test)))
    else:
        labels = np.asarray(test["labels"])
        size = labels.max() + 1
        per_example = 1 / np.maximum(np.bincount(labels, minlength=size), 1)
        counts = [np.bincount(np.asarray(data["labels"]), minlength=size)[:size] for data in clients.values()]
        weights = np.stack([(count * per_example)[labels] for count in counts])
    sums = weights.sum(1)
    return weights[sums > 0] / sums[sums > 0, None]


def _by_client(rows: datasets.Dataset, column: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, text in zip(rows[column], rows["text"], strict=True):
        found.setdefault(name, []).append(text)
    return found


def _of_clients(splits: Mapping[str, datasets.Dataset], column: str, least: int) -> dict[str, datasets.Dataset]:
    names, counts = np.unique(np.asarray(splits["train"][column]), return_counts=True)
    kept = set(names[counts >= least].tolist())
    return {split: rows.filter(lambda row: row[column] in kept) for split, rows in splits.items()}


def images_and_labels(splits: datasets.DatasetDict) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The columns `image` and `labels` of the training and the test data."""
    train = splits["train"]
    image = next(name for name, feature in train.features.items() if isinstance(feature, datasets.Image))
    names = {image: "image", label_column(train): "labels"}
    train, test = (splits[split].select_columns(list(names)).rename_columns(names) for split in ("train", "test"))
    return train, test
