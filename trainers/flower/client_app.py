"""A client of a federation as an app of Flower."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
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
from ..secure_aggregation import SecureAggregation
from .client_state import client_store, keep_bases, kept_bases
from .codec import from_record, to_record
from .evaluation_reply import EvaluationReply
from .introduction import (
    BASES_ACTION,
    LOST_BASES,
    ON_SENT_BASES_ACTION,
    Bases,
    Introduction,
    frozen_fingerprints,
    frozen_parts,
)
from .secure_client import MaskingClient


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


def make_client_app(
    load_model: Callable[[], PeftModel],
    load_data: Callable[[Context], Dataset],
    args: Arguments,
    *,
    make_trainer: Callable[..., Trainer] = Trainer,
    load_eval_data: Callable[[Context], Dataset] | None = None,
    compute_metrics: Callable | None = None,
) -> ClientApp:
    """
    Make the app that the nodes of a federation run. A client trains as with a [`FederatedTrainer`]: with the same seeds
    and data, the result is the same.

    The configuration of a node has the name of its client (`client-name`, or `partition-id` and `num-partitions`), and
    optionally the share of the heads that it can train (`budget`) and a folder for what the client keeps between its
    rounds (`state-dir`, which can also be in the configuration of the run; by default Flower keeps it until the run ends).

    Args:
        load_model (`Callable[[], PeftModel]`):
            Returns the model with the adapter, as for a [`FederatedTrainer`]. It is called after the seed of `args` was
            set, and must return the same model at all nodes and at the server.
        load_data (`Callable[[flwr.app.Context], Dataset]`):
            Returns the training set of the client from the context of its node.
        args ([`FederatedArguments`] or `Callable[[Mapping], FederatedArguments]`):
            The arguments, or a function that makes them from the configuration of the run. All nodes and the server
            need the same.
        make_trainer (`Callable[..., Trainer]`, *optional*, defaults to [`~transformers.Trainer`]):
            Makes the trainer of the client from `model`, `args` and `train_dataset`, such as
            `functools.partial(SFTTrainer, processing_class=tokenizer)` of TRL. To evaluate the client, it also gets
            `eval_dataset` and `compute_metrics`.
        load_eval_data (`Callable[[flwr.app.Context], Dataset]`, *optional*):
            Returns the data that the client is evaluated on, from the context of its node. It is needed for `eval_clients`
            of `args`.
        compute_metrics (`Callable`, *optional*):
            As for [`~transformers.Trainer`].

    Returns:
        `flwr.clientapp.ClientApp`: The app.

    Example:

        ```py
        >>> app = make_client_app(load_model, load_data, FederatedArguments("out", max_steps=10))
        ```
    """
    app = ClientApp()

    def make_client(
        context: Context, store: ClientStore | None = None, bases: Bases | None = None, **evaluation: Any
    ) -> LocalClient:
        run_args = arguments_of(args, context.run_config)
        set_seed(run_args.seed)
        model, dataset = load_model(), load_data(context)
        local_args = local_arguments(run_args, run_args.seed)
        local_args.output_dir = tempfile.gettempdir()  # Trainer creates this folder, and a node writes nothing into it
        trainer = make_trainer(model=model, args=local_args, train_dataset=dataset, **evaluation)
        # a trainer may prepare its data, and examples are counted before
        given = ClientData.of_one(dataset, run_args)
        data = ClientData(lambda client: trainer.train_dataset, given.num_examples)
        client = LocalClient(trainer, store, settings=client_settings(run_args, model.active_peft_config), data=data)
        if bases is not None:
            bases.load(frozen_parts(trainer.model))  # the client has frozen what it does not train
        return client

    def introduction(client: LocalClient, context: Context) -> RecordDict:
        name = client_name(context.node_config)
        frozen, budget = frozen_fingerprints(client.trainer.model), context.node_config.get("budget")
        return to_record(Introduction(name, client.data.num_examples(name), current_versions(), frozen, budget))

    @app.query()
    def introduce(message: Message, context: Context) -> Message:
        return Message(introduction(make_client(context), context), reply_to=message)

    @app.train(BASES_ACTION)
    def take_bases(message: Message, context: Context) -> Message:
        bases = from_record(message.content, Bases)
        content = introduction(make_client(context, bases=bases), context)
        keep_bases(context, bases)
        return Message(content, reply_to=message)

    def own(task: ClientTask, context: Context) -> ClientTask:
        name = client_name(context.node_config)
        if task.client != name:
            raise ValueError(f"The task is for the client {task.client!r}, and this node is {name!r}.")
        return task

    def trained(task: ClientTask, context: Context, bases: Bases | None) -> ClientReply:
        with client_store(context) as store:
            return make_client(context, store, bases).train(own(task, context))

    @app.train()
    def train(message: Message, context: Context, bases: Bases | None = None) -> Message:
        run_args = arguments_of(args, context.run_config)
        secure = SecureAggregation.parse(run_args.secure_aggregation)
        if secure is None:
            reply = trained(from_record(message.content, ClientTask), context, bases)
            return Message(to_record(reply), reply_to=message)
        counted = run_args.merging.limits.counted
        return MaskingClient(secure, counted, lambda task: trained(task, context, bases)).answer(message, context)

    @app.train(ON_SENT_BASES_ACTION)
    def train_on_sent_bases(message: Message, context: Context) -> Message:
        bases = kept_bases(context)
        if bases is None:
            task = own(from_record(message.content, ClientTask), context)
            return Message(to_record(ClientReply.to(task, failure=LOST_BASES)), reply_to=message)
        return train(message, context, bases)

    @app.evaluate()
    def evaluate(message: Message, context: Context, bases: Bases | None = None) -> Message:
        task = own(from_record(message.content, ClientTask), context)
        if load_eval_data is None:
            raise ValueError(
                "There is nothing to evaluate the client on. Give `make_client_app` a function `load_eval_data`, or leave out "
                "`eval_clients`."
            )
        with client_store(context) as store:
            data = load_eval_data(context)
            client = make_client(context, store, bases, eval_dataset=data, compute_metrics=compute_metrics)
            trainer = client.trainer
            with aside(trainer, client, Runner()):
                metrics = evaluate_one(client, task, trainer.eval_dataset, lambda dataset: trainer.evaluate(dataset))
        return Message(to_record(EvaluationReply.to(task, metrics)), reply_to=message)

    @app.evaluate(ON_SENT_BASES_ACTION)
    def evaluate_on_sent_bases(message: Message, context: Context) -> Message:
        bases = kept_bases(context)
        if bases is None:
            task = own(from_record(message.content, ClientTask), context)
            lost = EvaluationReply(task.round_number, task.client, failure=LOST_BASES)
            return Message(to_record(lost), reply_to=message)
        return evaluate(message, context, bases)

    return app
