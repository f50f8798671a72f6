"""The setup of a federation as one value, for checkpoints, which compare it, and model cards, which describe it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments

from .data.partition import PartitionSettings
from .server.settings import ServerSettings


@dataclass(frozen=True)
class Federation:
    """
    The setup of a federation.

    Args:
        args ([`~transformers.TrainingArguments`]): The arguments, from which those of local training are read.
        model ([`~peft.PeftModel`]): The model with the adapter.
        clients (`Mapping[str, Dataset]`): Client names to data sets.
        server ([`ServerSettings`]): How rounds are run.
        partition ([`PartitionSettings`]): How the data was split.
        optimizer (`tuple[type, dict]`, *optional*): The class and the arguments of the clients' optimizer, if given.
        is_given_by_client (`bool`, *optional*, defaults to `True`): Whether the data were given by client rather than
            split.
        num_processes_sharing (`int`, *optional*, defaults to 1): How many processes train a client together.
    """

    args: TrainingArguments
    model: PreTrainedModel
    clients: Mapping[str, Dataset]
    server: ServerSettings
    partition: PartitionSettings = PartitionSettings()
    optimizer: tuple[type, dict[str, Any]] | None = None
    is_given_by_client: bool = True
    num_processes_sharing: int = 1
