"""
Partitions that are objects: anything with the interface of flwr-datasets' `Partitioner`.

The interface is recognized by its attributes, so flwr-datasets need not be installed.
"""

from __future__ import annotations

import copy
import inspect
import multiprocessing.context
from typing import Any, Protocol

from torch.utils.data import Dataset
from transformers.trainer_utils import has_length


_TOKENS = ("hub_token", "push_to_hub_token")


class Partitioner(Protocol):
    """The interface of an object that splits a data set."""

    dataset: Dataset

    @property
    def num_partitions(self) -> int:
        """The number of partitions. It may be read only after `dataset` has been set."""

    def load_partition(self, partition_id: int) -> Dataset:
        """Return one partition, counted from 0."""


def is_partitioner(value: Any) -> bool:
    """
    Args:
        value (`Any`): Any value.

    Returns:
        `bool`: Whether it is an object with the interface of flwr-datasets' `Partitioner`.
    """
    # a static lookup, since properties of flwr-datasets raise until there is a data set
    return not isinstance(value, type) and all(
        inspect.getattr_static(value, name, None) is not None for name in ("load_partition", "num_partitions")
    )


def load_partitions(partitioner: Partitioner, dataset: Dataset) -> list[Dataset]:
    """
    Split a data set.

    Args:
        partitioner ([`Partitioner`]): The partitioner. It keeps the data set, as those of flwr-datasets do.
        dataset (`Dataset`): The data set.

    Returns:
        `list[Dataset]`: Its partitions.

    Raises:
        ValueError: if the partitioner already has another data set, or returns a partition without examples.
    """
    name = type(partitioner).__name__
    assigned = getattr(partitioner, "dataset", None)
    if assigned is not None and assigned is not dataset:
        raise ValueError(
            f"The {name} in `partition` has another data set than `train_dataset` already. Make a new {name} for each data "
            "set, and leave its data set to the trainer."
        )
    if assigned is None:
        partitioner.dataset = dataset
    partitions = [partitioner.load_partition(index) for index in range(partitioner.num_partitions)]
    for index, partition in enumerate(partitions):
        if has_length(partition) and len(partition) == 0:
            raise ValueError(
                f"The {name} in `partition` gives partition {index} of {len(partitions)} no examples, but every client needs "
                "at least one. Use fewer partitions."
            )
    return partitions


class PartitionerArgumentMixin:
    """
    Arguments whose `partition` can be an object. Since it holds the training data, arguments that are saved or printed
    (as a dict, as JSON, as `training_args.bin`, or as text) contain the name of its class instead. They also contain
    no secrets: neither the noise seed of `privacy` nor tokens of the Hub. Copies keep the object itself and the
    secrets, and so do arguments that are passed to a process that Python spawns.
    """

    def to_dict(self) -> dict[str, Any]:
        """
        Returns:
            `dict[str, Any]`: As for [`~transformers.TrainingArguments`], with the class name of a `partition` object.
        """
        return super(PartitionerArgumentMixin, self._named()).to_dict()

    def __str__(self) -> str:
        return super(PartitionerArgumentMixin, self._named()).__str__()

    __repr__ = __str__

    def __getstate__(self) -> dict[str, Any]:
        is_for_a_process = multiprocessing.context.get_spawning_popen() is not None
        return vars(self if is_for_a_process else self._named())

    def __copy__(self):
        copied = object.__new__(type(self))
        copied.__dict__.update(vars(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]):
        copied = copy.copy(self)
        memo[id(self)] = copied
        memo[id(self.partition)] = self.partition
        copied.__dict__ = copy.deepcopy(vars(self), memo)
        return copied

    def _named(self):
        named = copy.copy(self)
        if not isinstance(self.partition, str):
            named.partition = type(self.partition).__name__
        if isinstance(self.privacy, dict):
            named.privacy = {**self.privacy, "noise_seed": None}
        for name in _TOKENS:
            if getattr(self, name, None) is not None:
                setattr(named, name, None)
        return named
