"""How a server merges updates: the merge method, the server optimizer and the limits on updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from peft import PeftConfig, PeftType

from peft_ravan.merging import (
    ClientUpdate,
    GaussianMechanism,
    MergeResult,
    ServerStep,
    UpdateError,
    UpdateLimits,
    get_merge_method,
    get_server_optimizer,
    merge,
)
from peft_ravan.merging.method import MergeMethod

from .rounds import Round
from .state import ServerState


@dataclass(frozen=True)
class MergeSettings:
    """
    How a server merges updates.

    Args:
        method (`str`, *optional*): The name of the merge method. By default one that suits the adapter.
        options (`Mapping[str, Any]`, *optional*): The options of the merge method.
        server_optimizer (`str`, *optional*): The name of the server optimizer. By default none.
        server_optimizer_options (`Mapping[str, Any]`, *optional*): The options of the server optimizer.
        limits ([`~peft_ravan.merging.UpdateLimits`], *optional*): Limits on the influence of one client.
        config ([`~peft.PeftConfig`], *optional*): The configuration of the adapter.

    Raises:
        TypeError: if the method or the optimizer does not take one of the options.
        ValueError: if there is no such method or optimizer, or if the method changes the base model or the rank.
    """

    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    server_optimizer: str | None = None
    server_optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    limits: UpdateLimits = UpdateLimits()
    config: PeftConfig | None = None

    def __post_init__(self):
        if self.server_optimizer is not None:
            get_server_optimizer(self.server_optimizer).check_options(dict(self.server_optimizer_options))
        if self.method is None:
            return
        method = get_merge_method(self.method)
        method.check_options(dict(self.options))
        if method.changes_model:
            raise ValueError(
                f"`merge_method={self.method!r}` changes the base model or the rank, which the rounds of the "
                "FederatedTrainer do not support yet. Choose another method, or call `peft_ravan.merging.merge` on what the "
                "clients trained."
            )

    def of(self, config: PeftConfig) -> MergeSettings:
        """
        Args:
            config ([`~peft.PeftConfig`]): The configuration of an adapter.

        Returns:
            [`MergeSettings`]: The same settings for this adapter, with a suitable method if none was given.
        """
        suitable = "ravan" if config.peft_type == PeftType.RAVAN else "fedavg"
        return replace(self, method=self.method or suitable, config=config)

    @property
    def merge_method(self) -> MergeMethod:
        """The merge method."""
        return get_merge_method(self.method)

    def merge(
        self,
        state: ServerState,
        updates: Iterable[ClientUpdate],
        round_number: int,
        mechanism: GaussianMechanism | None = None,
        on_merged: Callable[[str], None] | None = None,
    ) -> MergeResult:
        """
        Args:
            state ([`ServerState`]): The state of the server before the round.
            updates (`Iterable[ClientUpdate]`): The updates of the clients.
            round_number (`int`): The round.
            mechanism ([`~peft_ravan.merging.GaussianMechanism`], *optional*): The clipping and the noise.
            on_merged (`Callable[[str], None]`, *optional*): As for [`~peft_ravan.merging.ServerStep`].

        Returns:
            [`~peft_ravan.merging.MergeResult`]: The result. Invalid updates are dropped.

        Raises:
            UpdateError: if no update is left.
        """
        step = ServerStep(
            self.server_optimizer, self.server_optimizer_options, state.merge_memory, round_number, on_merged
        )
        return merge(
            state.global_state,
            updates,
            self.method,
            config=self.config,
            on_bad_update="drop",
            limits=self.limits if self.limits.is_set else None,
            server_step=step,
            mechanism=mechanism,
            **self.options,
        )


def merge_of(this_round: Round, merge_updates: Callable[[], MergeResult]) -> MergeResult | None:
    """
    Merge the updates of a round, and record the clients whose updates were invalid.

    Args:
        this_round ([`Round`]): The round.
        merge_updates (`Callable[[], MergeResult]`): The merge, with `on_bad_update="drop"`.

    Returns:
        [`~peft_ravan.merging.MergeResult`]: The result, or `None` if no update was left.
    """
    try:
        result = merge_updates()
    except UpdateError as error:
        # those of this attempt; clients that failed in an earlier one may be among them
        for client in list(this_round.num_examples):
            this_round.fail(client, str(error), error)
        return None
    for dropped in result.diagnostics["dropped"]:
        this_round.fail(dropped["client"], dropped["reason"])
    this_round.clipped = [clipped["client"] for clipped in result.diagnostics.get("clipped", ())]
    return result


def without_comparisons(result: MergeResult) -> MergeResult:
    """
    Args:
        result ([`~peft_ravan.merging.MergeResult`]): A merge of updates that are all their mean, see [`SummedReply`].

    Returns:
        [`~peft_ravan.merging.MergeResult`]: The same without the diagnostics that compare or count single updates.
    """
    left_out = ("update_cosine", "clients_per_head")
    return replace(result, diagnostics={name: v for name, v in result.diagnostics.items() if name not in left_out})
