"""Trainers that run the rounds of a federation on one machine."""

from __future__ import annotations

import functools

from transformers import Trainer

from .federated_mixin import FederatedMixin


class FederatedTrainer(FederatedMixin, Trainer):
    """
    A [`~transformers.Trainer`] that trains an adapter over simulated clients.

    It takes what `Trainer` takes. In each round some clients train, one after the other, each from the global adapter and
    with a fresh optimizer; what they train is uploaded (the products s*H of a Ravan adapter, or the matrices of another,
    and the task head, never bases or the base model) and merged into the next global adapter. A client's local steps are
    those of `Trainer.train`, so gradient accumulation, mixed precision, clipping and callbacks work as they do there.

    Args:
        model ([`~peft.PeftModel`]):
            The model with the adapter to train.
        args ([`FederatedArguments`], *optional*):
            The arguments.
        train_dataset (`Dataset` or `dict[str, Dataset]`, *optional*):
            One training set, which is split among clients as `args.partition` says, or the data set of each client by
            its name.
        client_fault (`Callable`, *optional*):
            Is called with the name of a client, the number of the round and the client's update before the upload, so
            that tests can inject faults: it may raise, take its time, or return another update.
        availability (`Callable[[str, int], bool]`, *optional*):
            Whether a client, by its name, is available in a round, from 1. It is asked anew in every round, and again in
            a run that is repeated or resumed, so its answer must depend on nothing else. By default all clients always
            are. A keyword, not one of `args`, since a function cannot be saved with them.
        client_eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*):
            What each client is evaluated on by [`FederatedTrainer.evaluate_clients`]: a data set for each client by its
            name, or one that is split as the training data is. By default `eval_dataset`.
        **kwargs:
            As for [`~transformers.Trainer`]. Each client needs an optimizer of its own, so choose it by `args.optim` or
            `optimizer_cls_and_kwargs`, not by `optimizers`.

    **Attributes**:
        - **clients** (`Mapping[str, Dataset]`) -- The data set of each client.
        - **client_budgets** (`dict[str, float]`) -- The share of the heads that each client can train, or `None`.
        - **state.log_history** (`list[dict]`) -- One record a round: `round` (from 1), `clients` (whose updates were
          merged), `failed_clients` (with the reason), `attempts`, `num_examples`, `train_loss`, the metrics of the
          evaluation, `upload_bytes` and `download_bytes` (of the tasks and the replies of all clients, as bytes),
          `round_seconds` (without the evaluation), `learning_rate` and, with `client_budgets`, `heads_trained` (the number
          of heads of each client) or, with `privacy`, `noise_multiplier`, `sampling_rate` and `epsilon` (up to this
          round). A record of round 0 comes before with `eval_on_start`, and where common bases are made
          from the clients' gradients (`init_bases="gradient_svd"`).
        - **privacy** ([`PrivateRounds`]) -- The noise and the accounting of the rounds, or `None`.
        - **last_server_state** ([`ServerState`]) -- What the server has after the last round, as one value.
        - **last_global_state** (`dict[str, torch.Tensor]`) -- The merged state that the last run has ended with.
        - **last_client_metrics** (`pandas.DataFrame`) -- The metrics of each client in its last evaluation.
        - **last_merge** ([`~peft_ravan.merging.MergeResult`]) -- The last merge, with its diagnostics.

    Raises:
        TypeError: if `args` are not [`FederatedArguments`], or the model has no adapter.
        ValueError: if the data cannot be split, `client_budgets` do not suit the adapter, the clients or the merge
            method, `privacy` cannot be kept, or `optimizers` are given.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_ravan import RavanConfig
        >>> from peft_ravan.trainers import FederatedArguments, FederatedTrainer

        >>> model = get_peft_model(model, RavanConfig(task_type="SEQ_CLS"))
        >>> args = FederatedArguments("out", num_clients=20, clients_per_round=5, num_rounds=30, max_steps=10)
        >>> trainer = FederatedTrainer(model, args, train_dataset=dataset)
        >>> trainer.train()
        ```
    """


@functools.cache
def federated(trainer_class: type[Trainer]) -> type[Trainer]:
    """
    Make a federated trainer of any other. Each client trains as that trainer does, with its losses, data loaders and
    preparation of the data; [`FederatedTrainer`] is what this makes of [`~transformers.Trainer`].

    Args:
        trainer_class (`type[Trainer]`): The trainer, such as your own subclass of [`~transformers.Trainer`].

    Returns:
        `type[Trainer]`: A subclass with the rounds of [`FederatedMixin`] before; the same for the same class. It takes what
        the trainer takes, and what [`FederatedTrainer`] takes besides. Its `args` are made by [`federated_arguments`] from
        those of the trainer.

    Raises:
        TypeError: if it is not a subclass of [`~transformers.Trainer`].

    Example:

        ```py
        >>> from peft_ravan.trainers import federated, federated_arguments

        >>> trainer = federated(MyTrainer)(model, federated_arguments(MyArguments)("out"), train_dataset=dataset)
        ```
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise TypeError(
            f"`federated` needs `Trainer` or a subclass, got {trainer_class!r}. Pass the class, not a trainer."
        )
    if issubclass(trainer_class, FederatedMixin):
        return trainer_class
    if trainer_class is Trainer:
        return FederatedTrainer
    doc = f"[`{trainer_class.__name__}`] over the rounds of a federation, see [`FederatedTrainer`]."
    return type(
        f"Federated{trainer_class.__name__}",
        (FederatedMixin, trainer_class),
        {"__doc__": doc, "__module__": trainer_class.__module__},
    )
