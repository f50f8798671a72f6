"""What a node of a federation makes for each message of the server: a client with its model, its data and its trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Context
from peft import PeftModel
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from peft_ravan.sharing.federation_record import current_versions

from ..client.local_client import LocalClient
from ..client.store import ClientStore
from ..client.trainer_hooks import local_arguments
from ..client_evaluation import aside, evaluate_one
from ..client_setup import client_settings
from ..data.client_data import ClientData
from ..data.partition import client_of_part
from ..exchange import ClientReply, ClientTask
from ..runners import Runner
from .client_state import client_store
from .evaluation_reply import EvaluationReply
from .introduction import Bases, Introduction, frozen_fingerprints, frozen_parts


Arguments = TrainingArguments | Callable[[Mapping[str, Any]], TrainingArguments]


def arguments_of(args: Arguments, run_config: Mapping[str, Any]) -> TrainingArguments:
    """
    Args:
        args ([`FederatedArguments`] or `Callable`): The arguments, or a function that makes them.
        run_config (`Mapping[str, Any]`): The configuration of the run.

    Returns:
        [`FederatedArguments`]: The arguments of the run.
    """
    return args if isinstance(args, TrainingArguments) else args(run_config)


def client_name(node_config: Mapping[str, Any]) -> str:
    """
    Args:
        node_config (`Mapping[str, Any]`): The configuration of a node.

    Returns:
        `str`: The name of its client: `client-name`, or a name from `partition-id`, which is the one that a
        [`FederatedTrainer`] gives to that part of its data.

    Raises:
        ValueError: if it has neither.
    """
    if "client-name" in node_config:
        return str(node_config["client-name"])
    if "partition-id" in node_config:
        return client_of_part(int(node_config["partition-id"]), int(node_config.get("num-partitions", 1)))
    raise ValueError(
        "The node has no name, by which the federation would know it again. Start it with one, such as `--node-config "
        "'client-name=\"north\"'`, or with a `partition-id`."
    )


@dataclass(frozen=True)
class Node:
    """
    What a node needs to know of its app. Nothing is kept from message to message but what is in the context.

    Args:
        load_model (`Callable[[], PeftModel]`): Returns the model with the adapter.
        load_data (`Callable[[flwr.app.Context], Dataset]`): Returns the training set of the client.
        args ([`FederatedArguments`] or `Callable[[Mapping], FederatedArguments]`): The arguments, or what makes them.
        make_trainer (`Callable[..., Trainer]`): Makes the trainer of the client.
        load_eval_data (`Callable[[flwr.app.Context], Dataset]`, *optional*): Returns the data to evaluate the client on.
        compute_metrics (`Callable`, *optional*): As for [`~transformers.Trainer`].
    """

    load_model: Callable[[], PeftModel]
    load_data: Callable[[Context], Dataset]
    args: Arguments
    make_trainer: Callable[..., Trainer] = Trainer
    load_eval_data: Callable[[Context], Dataset] | None = None
    compute_metrics: Callable | None = None

    def arguments(self, context: Context) -> TrainingArguments:
        """
        Args:
            context (`flwr.app.Context`): The context of the node.

        Returns:
            [`FederatedArguments`]: The arguments of the run.
        """
        return arguments_of(self.args, context.run_config)

    def introduction(self, context: Context, bases: Bases | None = None) -> Introduction:
        """
        Args:
            context (`flwr.app.Context`): The context of the node.
            bases ([`Bases`], *optional*): The bases that it was sent.

        Returns:
            [`Introduction`]: What the node says of itself.
        """
        client, name = self._client(context, bases=bases), client_name(context.node_config)
        frozen, budget = frozen_fingerprints(client.trainer.model), context.node_config.get("budget")
        return Introduction(name, client.data.num_examples(name), current_versions(), frozen, budget)

    def train(self, task: ClientTask, context: Context, bases: Bases | None = None) -> ClientReply:
        """
        Args:
            task ([`ClientTask`]): A task of the server.
            context (`flwr.app.Context`): The context of the node.
            bases ([`Bases`], *optional*): The bases that it was sent.

        Returns:
            [`ClientReply`]: What the client has trained.

        Raises:
            ValueError: if the task is that of another client.
        """
        _check_own(task, context)
        with client_store(context) as store:
            return self._client(context, store, bases).train(task)

    def evaluate(self, task: ClientTask, context: Context, bases: Bases | None = None) -> EvaluationReply:
        """
        Args:
            task ([`ClientTask`]): What to evaluate.
            context (`flwr.app.Context`): The context of the node.
            bases ([`Bases`], *optional*): The bases that it was sent.

        Returns:
            [`EvaluationReply`]: The metrics of the client.

        Raises:
            ValueError: if the task is that of another client, or if there are no data to evaluate the client on.
        """
        _check_own(task, context)
        if self.load_eval_data is None:
            raise ValueError(
                "There is nothing to evaluate the client on. Give `make_client_app` a function `load_eval_data`, or leave out "
                "`eval_clients`."
            )
        evaluation = {"eval_dataset": self.load_eval_data(context), "compute_metrics": self.compute_metrics}
        with client_store(context) as store:
            client = self._client(context, store, bases, **evaluation)
            trainer = client.trainer
            with aside(trainer, client, Runner()):
                metrics = evaluate_one(client, task, trainer.eval_dataset, lambda dataset: trainer.evaluate(dataset))
        return EvaluationReply.to(task, metrics)

    def _client(
        self, context: Context, store: ClientStore | None = None, bases: Bases | None = None, **evaluation: Any
    ) -> LocalClient:
        args = self.arguments(context)
        set_seed(args.seed)
        model, dataset = self.load_model(), self.load_data(context)
        local_args = local_arguments(args, args.seed)
        local_args.output_dir = tempfile.gettempdir()  # Trainer creates this folder, and a node writes nothing into it
        trainer = self.make_trainer(model=model, args=local_args, train_dataset=dataset, **evaluation)
        # a trainer may prepare its data, and examples are counted before
        given = ClientData.of_one(dataset, args)
        data = ClientData(lambda client: trainer.train_dataset, given.num_examples)
        client = LocalClient(trainer, store, settings=client_settings(args, model.active_peft_config), data=data)
        if bases is not None:
            bases.load(frozen_parts(trainer.model))  # the client has frozen what it does not train
        return client


def _check_own(task: ClientTask, context: Context) -> None:
    name = client_name(context.node_config)
    if task.client != name:
        raise ValueError(f"The task is for the client {task.client!r}, and this node is {name!r}.")
