"""Checks that find mistakes in the data before the first round, rather than as failures of clients."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import numpy as np
import pyarrow.compute as pc
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from .columns import LABEL_COLUMNS


# name suffixes of models whose label is one number for each example
_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification")
# the label that the loss ignores
_IGNORED = -100
_SPLITS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}


def check_train_dataset(train_dataset: object) -> None:
    """
    Args:
        train_dataset (`object`): The `train_dataset` passed to a trainer.

    Raises:
        ValueError: if it consists of several data sets without saying which client has which.
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
        clients (`Mapping`): The values passed by client.
        argument (`str`, *optional*, defaults to `"train_dataset"`): The name of the argument, for the message.

    Raises:
        ValueError: if a name is empty or not a string.
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
    Compare the labels of a classifier's training data with the model's number of labels. This is done only where the
    meaning of the labels is certain: a transformers model with its own loss, and data with a column of integers.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer.
        train_dataset (`Dataset` or `Mapping[str, Dataset]`): Its training data.

    Raises:
        ValueError: if an example has no label, or a label that the model does not have.
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
        largest (`int`): The number of examples of the client that has the most.
        batch_size (`int`): The number of examples in a full batch.
        args ([`~transformers.TrainingArguments`]): The arguments.

    Raises:
        ValueError: if incomplete batches are dropped and no client has enough examples for a full one.
    """
    if args.dataloader_drop_last and largest < batch_size:
        raise ValueError(
            f"Clients would train nothing: none has more than {largest} examples, and `dataloader_drop_last=True` leaves out "
            f"batches of fewer than {batch_size}. Use smaller batches, fewer clients, or `dataloader_drop_last=False`."
        )


def _num_labels(trainer: Trainer) -> int | None:
    """The number of labels, if the loss is the model's own cross entropy."""
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    config = getattr(model, "config", None)
    own_loss = trainer.compute_loss_func is None and type(trainer).compute_loss is Trainer.compute_loss
    known = type(model).__module__.startswith("transformers.") and type(model).__name__.endswith(_CLASSIFIERS)
    # a label smoother or a collator may change the labels
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
