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
        size = len(dataset) if has_length(dataset) else examples_of_a_stream(args)
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
            dataset = given[client]
            return len(dataset) if has_length(dataset) else examples_of_a_stream(args) * num_processes

        return cls(clients.__getitem__, num_examples)


def examples_of_a_stream(args: TrainingArguments) -> int:
    """
    Args:
        args ([`~transformers.TrainingArguments`]): The training arguments of a client.

    Returns:
        `int`: The number of examples it trains on in a round if its data set has no length.
    """
    return args.max_steps * args.gradient_accumulation_steps * args.train_batch_size
