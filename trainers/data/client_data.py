"""The training data of clients, and its size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from .partition import ClientParts
from .preparation import given_clients


@dataclass(frozen=True)
class ClientData:
    """
    The data that a process holds, for one client or several.

    Args:
        dataset (`Callable[[str], Dataset]`): Returns the training set of a client, by its name.
        num_examples (`Callable[[str], int]`): Returns the number of its examples, without creating the data set.
    """

    dataset: Callable[[str], Dataset]
    num_examples: Callable[[str], int]

    @classmethod
    def of_one(cls, dataset: Dataset, args: TrainingArguments) -> ClientData:
        """
        Args:
            dataset (`Dataset`): The data of one client.
            args ([`~transformers.TrainingArguments`]): Its training arguments, which define the size of a stream.

        Returns:
            [`ClientData`]: The same data for every client name.
        """
        size = _size(dataset, args)
        return cls(lambda client: dataset, lambda client: size)

    @classmethod
    def of_clients(cls, clients: Mapping[str, Dataset], args: TrainingArguments, num_processes: int = 1) -> ClientData:
        """
        Args:
            clients (`Mapping[str, Dataset]`): Client names to data sets.
            args ([`~transformers.TrainingArguments`]): Their training arguments, which define the size of a stream.
            num_processes (`int`, *optional*, defaults to 1): The number of processes that train a client together.

        Returns:
            [`ClientData`]: Their data.
        """
        given = given_clients(clients)

        def num_examples(client: str) -> int:
            if isinstance(given, ClientParts):
                return given.num_examples(client)
            return _size(given[client], args, num_processes)

        return cls(clients.__getitem__, num_examples)


def _size(dataset: Dataset, args: TrainingArguments, num_processes: int = 1) -> int:
    if has_length(dataset):
        return len(dataset)
    # of a stream, what a client trains on in a round
    return args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * num_processes
