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
from ..client_setup import client_settings
from ..data.client_data import ClientData
from ..data.partition import client_of_part
from ..exchange import ClientTask
from ..round_zero import bases_of
from .client_state import client_store, keep_bases, kept_bases
from .codec import from_record, to_record
from .introduction import BASES_ACTION, Bases, Introduction, frozen_fingerprints


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
            `functools.partial(SFTTrainer, processing_class=tokenizer)` of TRL.

    Returns:
        `flwr.clientapp.ClientApp`: The app.

    Example:

        ```py
        >>> app = make_client_app(load_model, load_data, FederatedArguments("out", max_steps=10))
        ```
    """
    app = ClientApp()

    def make_client(context: Context, store: ClientStore | None = None, bases: Bases | None = None) -> LocalClient:
        run_args = arguments_of(args, context.run_config)
        set_seed(run_args.seed)
        model, dataset = load_model(), load_data(context)
        if bases is not None:
            bases.load(bases_of(model, model.active_adapter))
        local_args = local_arguments(run_args, run_args.seed)
        local_args.output_dir = tempfile.gettempdir()  # Trainer creates this folder, and a node writes nothing into it
        trainer = make_trainer(model=model, args=local_args, train_dataset=dataset)
        # a trainer may prepare its data, and examples are counted before
        given = ClientData.of_one(dataset, run_args)
        data = ClientData(lambda client: trainer.train_dataset, given.num_examples)
        return LocalClient(trainer, store, settings=client_settings(run_args, model.active_peft_config), data=data)

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

    @app.train()
    def train(message: Message, context: Context) -> Message:
        task, name = from_record(message.content, ClientTask), client_name(context.node_config)
        if task.client != name:
            raise ValueError(f"The task is for the client {task.client!r}, and this node is {name!r}.")
        with client_store(context) as store:
            client = make_client(context, store, kept_bases(context))
            if task.purpose == "train" and client.adapter.awaits_gradient:
                raise ValueError(
                    "The node has lost the bases that were made in round 0: it was started again under the same id. What it "
                    "would train could not be averaged, so it is left out until the run is resumed."
                )
            reply = client.train(task)
        return Message(to_record(reply), reply_to=message)

    return app
