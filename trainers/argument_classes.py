"""Makes the arguments class of a federated trainer from that of the trainer below it."""

from __future__ import annotations

import functools
from dataclasses import make_dataclass
from typing import Any

from transformers import TrainingArguments

from .arguments import FederatedArguments, FederatedArgumentsMixin


@functools.cache
def federated_arguments(arguments_class: type[TrainingArguments]) -> type[TrainingArguments]:
    """
    Create the arguments class for a trainer created by [`federated`].

    Args:
        arguments_class (`type[TrainingArguments]`): The arguments class of the original trainer.

    Returns:
        `type[TrainingArguments]`: A subclass with the additional fields of [`FederatedArgumentsMixin`]. Repeated calls
        return the same class. `save_strategy` and `lr_scheduler_type` have the defaults of [`FederatedArguments`], all
        other fields those of the given class.

    Raises:
        TypeError: if it is not a subclass of [`~transformers.TrainingArguments`].
    """
    if not (isinstance(arguments_class, type) and issubclass(arguments_class, TrainingArguments)):
        raise TypeError(
            f"`federated_arguments` needs `TrainingArguments` or a subclass, got {arguments_class!r}. Pass the class that "
            "the arguments of your trainer have."
        )
    if issubclass(arguments_class, FederatedArgumentsMixin):
        return arguments_class
    if arguments_class is TrainingArguments:
        return FederatedArguments
    doc = f"[`{arguments_class.__name__}`] with what is federated, see [`FederatedArgumentsMixin`]."
    return make_dataclass(
        f"Federated{arguments_class.__name__}",
        [],
        bases=(FederatedArgumentsMixin, arguments_class),
        namespace={"__doc__": doc, "__reduce__": _reduce, "__module__": arguments_class.__module__},
        repr=False,
    )


def _reduce(args: TrainingArguments) -> tuple:
    # Trainer pickles its arguments, and pickle cannot find a class that is created at run time
    [_, arguments_class] = type(args).__bases__
    return _restored, (arguments_class, args.__getstate__())


def _restored(arguments_class: type[TrainingArguments], state: dict[str, Any]) -> TrainingArguments:
    args = object.__new__(federated_arguments(arguments_class))
    args.__dict__.update(state)
    return args
