"""A client that replies something else than it should."""

from collections.abc import Callable, Collection
from dataclasses import replace

from flwr.app import Message, RecordDict

from peft_ravan.trainers.exchange import ClientReply
from peft_ravan.trainers.flower.codec import from_record, to_record

from .grid import InProcessGrid


BAD_NODE, BAD_CLIENT = 107, "client_1"


def faulty(
    change: Callable, rounds: Collection[int] | None = (1,), kind: str = "train", reply_class: type = ClientReply
) -> type[InProcessGrid]:
    """
    A grid on which one node goes wrong in some rounds.

    Args:
        change (`Callable`): Makes the content of the node's answer from its reply, or `None` for no answer at all.
        rounds (`Collection[int]`, *optional*, defaults to `(1,)`): The rounds. `None`: all.
        kind (`str`, *optional*, defaults to `"train"`): The messages to which it answers so, as Flower names them.
        reply_class (`type`, *optional*, defaults to [`ClientReply`]): What it should reply.
    """

    class Faulty(InProcessGrid):
        def handle(self, message, context):
            answer = super().handle(message, context)
            if context.node_id != BAD_NODE or message.metadata.message_type != kind:
                return answer
            if rounds is not None and int(message.metadata.group_id) not in rounds:
                return answer
            content = change(from_record(answer.content, reply_class))
            return None if content is None else Message(content, reply_to=message)

    return Faulty


def changed(**fields) -> Callable[..., RecordDict]:
    return lambda reply: to_record(replace(reply, **fields))


def raising(reply: object) -> None:
    raise RuntimeError("out of paper")
