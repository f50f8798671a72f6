"""What a federation is made with, as one value: for checkpoints, which compare it, and for cards, which tell of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedModel

from .arguments import FederatedArguments
from .privacy import PrivateRounds


@dataclass(frozen=True)
class Federation:
    """
    What a federation is made with.

    Args:
        args ([`FederatedArguments`]): The arguments.
        model ([`~peft.PeftModel`]): The model with the adapter.
        clients (`Mapping[str, Dataset]`): Client names to data sets.
        client_sizes (`Mapping[str, int]`): Client names to numbers of examples.
        merge_method (`str`): The name of the merge method.
        client_budgets (`Mapping[str, float]`, *optional*): Client names to the shares of the heads that they train.
        privacy ([`PrivateRounds`], *optional*): The noise and the accounting.
        optimizer (`tuple[type, dict]`, *optional*): The class and the arguments of the clients' optimizer, if given.
        is_given_by_client (`bool`, *optional*, defaults to `True`): Whether the data came by client, and was not split.
        num_processes_sharing (`int`, *optional*, defaults to 1): How many processes train a client together.
    """

    args: FederatedArguments
    model: PreTrainedModel
    clients: Mapping[str, Dataset]
    client_sizes: Mapping[str, int]
    merge_method: str
    client_budgets: Mapping[str, float] | None = None
    privacy: PrivateRounds | None = None
    optimizer: tuple[type, dict[str, Any]] | None = None
    is_given_by_client: bool = True
    num_processes_sharing: int = 1
