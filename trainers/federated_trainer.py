"""Trainers that run the rounds of a federation on one machine."""

from __future__ import annotations

import functools

from transformers import Trainer

from .federated_mixin import FederatedMixin


class FederatedTrainer(FederatedMixin, Trainer):
    """
    A [`~transformers.Trainer`] that trains an adapter over simulated clients.

    It takes the same arguments as `Trainer`. In each round some clients train, one after the other by default, each
    starting from the global adapter with a fresh optimizer. They upload what they have trained: the products s*H of a
    Ravan adapter or the matrices of another adapter, and the task head, but never bases or the base model. The uploads
    are merged into the next global adapter. The local steps of a client are those of `Trainer.train`, so gradient
    accumulation, mixed precision, clipping and callbacks work as usual.

    Args:
        model ([`~peft.PeftModel`]):
            The model with the adapter to train.
        args ([`FederatedArguments`], *optional*):
            The arguments.
        train_dataset (`Dataset` or `dict[str, Dataset]`, *optional*):
            One training set, which is split among clients according to `args.partition`, or client names to data sets.
        client_fault (`Callable`, *optional*):
            Called with the name of a client, the number of the round and the client's update before the upload. Tests
            can use it to inject faults: it may raise, wait, or return another update.
        availability (`Callable[[str, int], bool]`, *optional*):
            Returns whether a client is available in a round, from the client's name and the round number (from 1). It
            is called in every round, and again when a run is repeated or resumed, so its result must depend on nothing
            else. By default all clients are always available. It is a keyword and not part of `args`, since functions
            cannot be saved with them.
        client_eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*):
            The data that [`FederatedTrainer.evaluate_clients`] evaluates each client on: client names to data sets, or
            one data set that is split like the training data. By default `eval_dataset`.
        **kwargs:
            As for [`~transformers.Trainer`]. Since each client needs its own optimizer, choose it with `args.optim` or
            `optimizer_cls_and_kwargs` instead of `optimizers`.

    **Attributes**:
        - **clients** (`Mapping[str, Dataset]`) -- The data set of each client.
        - **client_budgets** (`dict[str, float]`) -- The share of the heads, or of LoRA's rank, that each client can
          train, or `None`.
        - **state.log_history** (`list[dict]`) -- One record per round: `round` (from 1), `clients` (whose updates were
          merged), `failed_clients` (with the reason), `attempts`, `num_examples`, `train_loss`, the metrics of the
          evaluation, `upload_bytes` and `download_bytes` (the serialized sizes of the replies and the tasks of all
          clients), `round_seconds` (without the evaluation) and `learning_rate`. With `client_budgets` it also has
          `heads_trained` (the number of heads of each client) or `ranks_trained` (the ranks of LoRA, over all targets),
          with at least two updates and without `privacy` `update_cosine` (the mean cosine similarity of the clients'
          changes), and with `privacy` it has `noise_multiplier`, `sampling_rate` and `epsilon` (up to this round). There
          is a record of round 0 with `eval_on_start`, and if common bases are computed from the clients' gradients
          (`init_bases="gradient_svd"`).
        - **privacy** ([`PrivateRounds`]) -- The noise and the accounting of the rounds, or `None`.
        - **last_server_state** ([`ServerState`]) -- The complete state of the server after the last round.
        - **last_global_state** (`dict[str, torch.Tensor]`) -- The merged state at the end of the last run. It
          includes base weights if the merge method changes them.
        - **last_client_metrics** (`pandas.DataFrame`) -- The metrics of each client in its last evaluation.
        - **last_merge** ([`~peft_ravan.merging.MergeResult`]) -- The last merge, with its diagnostics.

    Raises:
        TypeError: if `args` are not [`FederatedArguments`], or the model has no adapter.
        ValueError: if the data cannot be split, `client_budgets` do not fit the adapter, the clients or the merge
            method, `privacy` cannot be guaranteed, or `optimizers` are given.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_ravan import RavanConfig
        >>> from peft_ravan.trainers import FederatedArguments, FederatedTrainer

        >>> model = get_peft_model(model, RavanConfig(task_type="SEQ_CLS"))
        >>> args = FederatedArguments(
        ...     "out", num_clients=20, clients_per_round=5, num_rounds=30, max_steps=10, learning_rate=3e-3
        ... )
        >>> trainer = FederatedTrainer(model, args, train_dataset=dataset)
        >>> trainer.train()
        ```
    """


@functools.cache
def federated(trainer_class: type[Trainer]) -> type[Trainer]:
    """
    Create a federated version of any trainer. Each client trains as that trainer does, with its loss, its data loaders
    and its data preparation. For [`~transformers.Trainer`] the result is [`FederatedTrainer`].

    Args:
        trainer_class (`type[Trainer]`): The trainer, such as your own subclass of [`~transformers.Trainer`].

    Returns:
        `type[Trainer]`: A subclass of [`FederatedMixin`] and the trainer. Repeated calls return the same class. It
        takes the arguments of the trainer and the additional ones of [`FederatedTrainer`]. The class of its `args` is
        created by [`federated_arguments`] from that of the trainer.

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
