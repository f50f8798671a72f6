"""Mistakes in the data that would show as failures of clients only, and are found before the first round."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import numpy as np
import pyarrow.compute as pc
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from .columns import LABEL_COLUMNS


# the ends of the names of models whose label is one number for each example
_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification")
# what the loss leaves out
_IGNORED = -100
_SPLITS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}


def check_train_dataset(train_dataset: object) -> None:
    """
    Args:
        train_dataset (`object`): What a trainer was given.

    Raises:
        ValueError: if it is several data sets in a form that does not say which client has which.
    """
    if isinstance(train_dataset, (list, tuple)) and any(_is_dataset(entry) for entry in train_dataset):
        raise ValueError(
            f"`train_dataset` is a {type(train_dataset).__name__} of {len(train_dataset)} data sets. Pass a dict of client "
            "name -> data set, or one data set made by `datasets.concatenate_datasets`, which is split among clients."
        )
    if isinstance(train_dataset, datasets.DatasetDict) and len(train_dataset) > 1 and train_dataset.keys() <= _SPLITS:
        raise ValueError(
            f"`train_dataset` is a DatasetDict with the splits {', '.join(map(repr, train_dataset))}, which would become "
            "clients. Pass one of them, such as `dataset['train']`; for clients of these names, pass a plain dict."
        )


def _is_dataset(entry: object) -> bool:
    return isinstance(entry, (Dataset, datasets.Dataset, datasets.IterableDataset))


def check_client_names(clients: Mapping[object, object], argument: str = "train_dataset") -> None:
    """
    Args:
        clients (`Mapping`): What was given by client.
        argument (`str`, *optional*, defaults to `"train_dataset"`): The argument, for the message.

    Raises:
        ValueError: if a name is no string, or empty.
    """
    for name in clients:
        if not isinstance(name, str):
            raise ValueError(
                f"The names of clients in `{argument}` must be strings, got {name!r} ({type(name).__name__}). Names that are "
                "alike as text would be one client; use `str(name)` if they are not."
            )
        if not name.strip():
            raise ValueError(
                f"A client in `{argument}` has the name {name!r}, which nobody could read. Give it another."
            )


def check_labels(trainer: Trainer, train_dataset: Dataset | Mapping[str, Dataset]) -> None:
    """
    Compare the labels of a classifier's training data with the number of labels of the model, where it is certain what the
    labels mean: a model of transformers with its own loss, and data with a column of integers.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer.
        train_dataset (`Dataset` or `Mapping[str, Dataset]`): Its training data.

    Raises:
        ValueError: if an example has no label, or one that the model does not have.
    """
    num_labels = _num_labels(trainer)
    if num_labels is None:
        return
    parts = train_dataset.items() if isinstance(train_dataset, Mapping) else [(None, train_dataset)]
    for client, dataset in parts:
        column = _label_column(dataset)
        if column is None:
            continue
        where = "" if client is None else f" of client {client!r}"
        labels = dataset.with_format("arrow", columns=[column])[:][column]
        missing = labels.null_count
        if missing:
            raise ValueError(
                f"{missing} of {len(labels)} examples{where} have no label in {column!r}. Leave them out, or give them one."
            )
        values = np.asarray(pc.unique(labels))
        others = sorted(values[(values != _IGNORED) & ((values < 0) | (values >= num_labels))].tolist())
        if others:
            raise ValueError(
                f"The examples{where} have the label {others[0]} in {column!r}, but `num_labels` of the model is {num_labels}, "
                f"so labels are 0 to {num_labels - 1}. Load the model with as many labels as the data has, or number them "
                "from 0."
            )


def check_batches(largest: int, batch_size: int, args: TrainingArguments) -> None:
    """
    Args:
        largest (`int`): How many examples the client with the most has.
        batch_size (`int`): The examples of a batch that is full.
        args ([`~transformers.TrainingArguments`]): The arguments.

    Raises:
        ValueError: if no client has enough examples for one batch, where smaller ones are left out.
    """
    if args.dataloader_drop_last and largest < batch_size:
        raise ValueError(
            f"Clients would train nothing: none has more than {largest} examples, and `dataloader_drop_last=True` leaves out "
            f"batches of fewer than {batch_size}. Use smaller batches, fewer clients, or `dataloader_drop_last=False`."
        )


def _num_labels(trainer: Trainer) -> int | None:
    """The number of labels, if the loss is the cross entropy of the model's own."""
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    config = getattr(model, "config", None)
    own_loss = trainer.compute_loss_func is None and type(trainer).compute_loss is Trainer.compute_loss
    known = type(model).__module__.startswith("transformers.") and type(model).__name__.endswith(_CLASSIFIERS)
    # a label smoother or a collator may make other labels of those in the data
    collated = getattr(trainer.data_collator, "__module__", "").startswith("transformers.")
    if not (own_loss and known and collated) or trainer.label_smoother is not None:
        return None
    if config.problem_type not in (None, "single_label_classification") or config.num_labels == 1:
        return None
    return config.num_labels


def _label_column(dataset: Dataset) -> str | None:
    if not isinstance(dataset, datasets.Dataset):
        return None
    for column in LABEL_COLUMNS:
        feature = dataset.features.get(column)
        if getattr(feature, "dtype", "").startswith(("int", "uint")):
            return column
    return None
