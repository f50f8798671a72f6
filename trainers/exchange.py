"""
What travels between a server and its clients: a task down, a reply up. It is all that the two know of each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from .messages import Check, Message, State, integer, number, one_of, optional, text, texts


PURPOSES = ("train", "warm_up", "sketch")
HEAD_SELECTIONS = ("random", "weight", "gradient")
HEAD_ALLOCATIONS = ("layer", "global")


class KeptFile(NamedTuple):
    """
    The file of what a client keeps.

    Args:
        round (`int`): The round that it was written in.
        digest (`str`): Its SHA-256.
    """

    round: int
    digest: str


@dataclass(frozen=True)
class HeadChoice:
    """
    Which heads a client trains.

    Args:
        share (`float`): The share of the heads that it can train, above 0 and up to 1.
        selection (`str`): How they are chosen, one of `HEAD_SELECTIONS`.
        allocation (`str`): How the share is spent over targets, one of `HEAD_ALLOCATIONS`.
        seed (`int`): The seed of the choice.
    """

    share: float
    selection: str
    allocation: str
    seed: int

    @classmethod
    def from_json(cls, value: Any) -> HeadChoice:
        checks = {"share": number, "selection": text, "allocation": text, "seed": integer(0)}
        if not isinstance(value, dict) or value.keys() != checks.keys():
            raise ValueError(f"an object with {', '.join(checks)}")
        return cls(**{name: check(value[name]) for name, check in checks.items()})


@dataclass(frozen=True)
class ClientTask(Message):
    """
    What a server asks of one client.

    Args:
        round_number (`int`): The round, from 1; 0 is the one that makes bases.
        client (`str`): The name of the client.
        state (`Mapping[str, torch.Tensor]`): The global state, or what of it the client needs, by checkpoint names.
        seed (`int`): The seed of the local training.
        purpose (`str`, *optional*, defaults to `"train"`):
            `"train"`; or in round 0 `"warm_up"`, to train the task head only, and `"sketch"`, to sketch the gradient.
        run (`str`, *optional*): The name of the run, which the reply has, too.
        attempt (`int`, *optional*, defaults to 1): How often the round is tried, this time included.
        learning_rate_factor (`float`, *optional*, defaults to 1.0): What the learning rate of the round is multiplied by.
        max_steps (`int`, *optional*): How many steps to train, or batches to sketch. By default as the client's arguments
            say.
        rank (`int`, *optional*): How many directions of its gradient a sketch is to have at each target. By default all.
        heads ([`HeadChoice`], *optional*): Which heads the client trains. By default all.
        frozen (`tuple[str, ...]`, *optional*): Parts of names of tensors that are not trained in this round.
        kept_in (`int`, *optional*): The last round whose update of this client was merged, from which it has what it keeps
            for itself. By default there was none.
        keep_from (`int`, *optional*, defaults to 0): The first round after which the run may be taken up again. Of what the
            client keeps, it can delete what only earlier ones would need.
        control (`Mapping[str, torch.Tensor]`, *optional*): SCAFFOLD's c.
    """

    TENSOR_FIELDS: ClassVar[tuple[str, ...]] = ("state", "control")
    JSON_FIELDS: ClassVar[Mapping[str, Check]] = {
        "round_number": integer(0),
        "client": text,
        "seed": integer(0, 2**32 - 1),
        "purpose": one_of(*PURPOSES),
        "run": text,
        "attempt": integer(1),
        "learning_rate_factor": number,
        "max_steps": optional(integer(1)),
        "rank": optional(integer(1)),
        "heads": optional(HeadChoice.from_json),
        "frozen": texts,
        "kept_in": optional(integer(1)),
        "keep_from": integer(0),
    }

    round_number: int
    client: str
    state: State
    seed: int
    purpose: str = "train"
    run: str = ""
    attempt: int = 1
    learning_rate_factor: float = 1.0
    max_steps: int | None = None
    rank: int | None = None
    heads: HeadChoice | None = None
    frozen: tuple[str, ...] = ()
    kept_in: int | None = None
    keep_from: int = 0
    control: State | None = None


@dataclass(frozen=True)
class ClientReply(Message):
    """
    What a client sends back.

    Args:
        round_number (`int`): The round, as the task has it.
        client (`str`): The name of the client.
        purpose (`str`, *optional*, defaults to `"train"`): As the task has it.
        run (`str`, *optional*): As the task has it.
        attempt (`int`, *optional*, defaults to 1): As the task has it.
        update (`Mapping[str, torch.Tensor]`, *optional*): What the client uploads, or `None` if it has failed.
        num_examples (`int`, *optional*, defaults to 0): The examples that it has trained on.
        trained_heads (`Mapping[str, torch.Tensor]`, *optional*): As [`~peft_ravan.merging.ClientUpdate`] has them.
        train_loss (`float`, *optional*, defaults to 0.0): Its mean local training loss.
        learning_rate (`float`, *optional*): Its learning rate, if it has trained.
        control_change (`Mapping[str, torch.Tensor]`, *optional*): By how much SCAFFOLD's c_i has changed.
        kept_digest (`str`, *optional*): The SHA-256 of the file of what the client keeps of this round, if it keeps anything.
        failure (`str`, *optional*): Why it has failed.
        error (`Exception`, *optional*): The error, where the client and the server are one process. It is never sent.
    """

    TENSOR_FIELDS: ClassVar[tuple[str, ...]] = ("update", "trained_heads", "control_change")
    JSON_FIELDS: ClassVar[Mapping[str, Check]] = {
        "round_number": integer(0),
        "client": text,
        "purpose": one_of(*PURPOSES),
        "run": text,
        "attempt": integer(1),
        "num_examples": integer(0),
        "train_loss": number,
        "learning_rate": optional(number),
        "kept_digest": optional(text),
        "failure": optional(text),
    }

    round_number: int
    client: str
    purpose: str = "train"
    run: str = ""
    attempt: int = 1
    update: State | None = None
    num_examples: int = 0
    trained_heads: State | None = None
    train_loss: float = 0.0
    learning_rate: float | None = None
    control_change: State | None = None
    kept_digest: str | None = None
    failure: str | None = None
    error: Exception | None = field(default=None, compare=False, repr=False)

    @classmethod
    def to(cls, task: ClientTask, **fields: Any) -> ClientReply:
        """
        Args:
            task ([`ClientTask`]): A task.
            **fields: What the client has to say.

        Returns:
            [`ClientReply`]: The reply to it.
        """
        return cls(task.round_number, task.client, task.purpose, task.run, task.attempt, **fields)

    def answers(self, task: ClientTask) -> bool:
        """
        Args:
            task ([`ClientTask`]): A task.

        Returns:
            `bool`: Whether this is a reply to it, and not to one of another round, attempt or run.
        """
        names = ("round_number", "client", "purpose", "run", "attempt")
        return all(getattr(self, name) == getattr(task, name) for name in names)
