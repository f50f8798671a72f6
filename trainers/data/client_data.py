"""What clients train on, and how much it is."""

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
    The data that a process has, of one client or of several.

    Args:
        dataset (`Callable[[str], Dataset]`): The training set of a client, by its name.
        num_examples (`Callable[[str], int]`): How many examples it has. No data set is made for this.
    """

    dataset: Callable[[str], Dataset]
    num_examples: Callable[[str], int]

    @classmethod
    def of_one(cls, dataset: Dataset, args: TrainingArguments) -> ClientData:
        """
        Args:
            dataset (`Dataset`): The data of one client.
            args ([`~transformers.TrainingArguments`]): How it trains, which says how much there is of a stream.

        Returns:
            [`ClientData`]: That data, whatever the client is called.
        """
        size = len(dataset) if has_length(dataset) else examples_of_a_stream(args)
        return cls(lambda client: dataset, lambda client: size)

    @classmethod
    def of_clients(cls, clients: Mapping[str, Dataset], args: TrainingArguments, num_processes: int = 1) -> ClientData:
        """
        Args:
            clients (`Mapping[str, Dataset]`): Client names to data sets.
            args ([`~transformers.TrainingArguments`]): How they train, which says how much there is of a stream.
            num_processes (`int`, *optional*, defaults to 1): How many processes train a client together.

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
        args ([`~transformers.TrainingArguments`]): How a client trains.

    Returns:
        `int`: How many examples it trains on in a round, of a data set without a length.
    """
    return args.max_steps * args.gradient_accumulation_steps * args.train_batch_size
