"""A grid of Flower that runs the real client apps in this process, and takes messages apart as its transport does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import context_from_proto, context_to_proto
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents


RUN_ID, SERVER_NODE = 5, 1  # as in conftest.py


def over_the_wire(message: Message) -> Message:
    """What arrives at the other side: Flower takes a message apart into objects, and puts it together again."""
    message.metadata.__dict__["_message_id"] = message_id = message.object_id
    objects = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
    arrived = inflate_object_from_contents(message_id, objects)
    arrived.metadata.__dict__["_message_id"] = message_id
    return arrived


class InProcessGrid(Grid):
    """
    Nodes that run one client app in this process. Replies come back in the opposite order. Like Flower, it knows
    nothing of what it carries.

    Args:
        app (`ClientApp`): The client app.
        nodes (`Mapping[int, Mapping]`): The configuration of each node, by its id.
        run_config (`Mapping`, *optional*): The configuration of the run.
    """

    def __init__(self, app: ClientApp, nodes: Mapping[int, Mapping], run_config: Mapping | None = None):
        self.app, self.run_config = app, dict(run_config or {})
        self.other_apps: dict[int, ClientApp] = {}  # of nodes that run another one
        self.contexts: dict[int, Context] = {}
        for node_id, node_config in nodes.items():
            self.connect(node_id, node_config)

    def connect(self, node_id: int, node_config: Mapping) -> None:
        self.contexts[node_id] = Context(RUN_ID, node_id, dict(node_config), RecordDict(), self.run_config)

    def server_context(self) -> Context:
        return Context(RUN_ID, SERVER_NODE, {}, RecordDict(), self.run_config)

    def handle(self, message: Message, context: Context) -> Message:
        """What a node does with a message. A test of faults can replace it."""
        return self.other_apps.get(context.node_id, self.app)(message, context)

    def reply(self, message: Message) -> Message | None:
        context = self.contexts.get(message.metadata.dst_node_id)
        if context is None:
            return None
        # what a node keeps is written and read again, and an app that raises leaves it as it was
        context = context_from_proto(context_to_proto(context))
        try:
            reply = self.handle(message, context)
        except Exception as error:
            return Message(Error(code=5, reason=f"{type(error)}:<'{error}'>"), reply_to=message)
        self.contexts[context.node_id] = context
        return reply

    # ---- What an app sees of Flower ----------------------------------------------

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = [self.reply(over_the_wire(message)) for message in list(messages)]
        return [over_the_wire(reply) for reply in replies[::-1] if reply is not None]

    def set_run(self, run) -> None:
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs) -> Message:
        raise NotImplementedError

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError


class CountingGrid(InProcessGrid):
    """Counts the messages of each kind."""

    def __init__(self, *args):
        super().__init__(*args)
        self.handled: list[tuple[str, int]] = []

    def handle(self, message: Message, context: Context) -> Message:
        self.handled.append((message.metadata.message_type, context.node_id))
        return super().handle(message, context)

    def kinds_at(self, node_id: int) -> list[str]:
        return [kind for kind, node in self.handled if node == node_id]
