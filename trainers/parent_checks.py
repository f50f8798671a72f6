"""What the trainer below a federation must not have done when it is created."""

from __future__ import annotations

from torch.utils.data import Dataset
from transformers import Trainer

from .client.batching import check_batching


def check_parent(trainer: Trainer, handed_dataset: Dataset | None) -> None:
    """
    Args:
        trainer ([`~transformers.Trainer`]): The trainer.
        handed_dataset (`Dataset`, *optional*): The training data that it was given.

    Raises:
        ValueError: if it has an optimizer, which clients could not share, or other training data, whose preparation cannot
            be repeated for each client. With `client_batching`, also if clients cannot be trained at once.
    """
    name = type(trainer).__name__
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise ValueError(
            f"`optimizers` cannot be given to the {name}: every client starts with a fresh optimizer. Use `args.optim` or "
            "`optimizer_cls_and_kwargs`."
        )
    if trainer.train_dataset is not handed_dataset:
        raise ValueError(
            f"The {name} prepares its training set in a way that cannot be repeated for each client. Prepare the data before, "
            "or in a method `_prepare_dataset(dataset, ...)`, as the trainers of TRL do."
        )
    check_batching(trainer, trainer.args.client_batching)
