"""Round 0 of a run, which makes the common bases of the adapter from the clients' gradients."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from peft_ravan.tuner.gradient_bases import (
    make_sketches,
    set_bases_from_sketches,
    sketch_state,
    sketches_from_state,
)
from peft_ravan.tuner.saved_bases import PEFT_PREFIX, adapter_layers
from peft_ravan.tuner.state import BASES_NAMES, is_core

from .exchange import ClientReply
from .run import Run
from .runners import Runner
from .server.round_zero import BasesSettings, RoundZero
from .server.rounds import Round


State = Mapping[str, torch.Tensor]


def make_common_bases(run: Run, runner: Runner, model: nn.Module, bases: BasesSettings) -> dict[str, Any]:
    """
    Run round 0. If it fails, neither the bases nor the global state change.

    Args:
        run ([`Run`]): The run, before its first round.
        runner ([`Runner`]): The runner of the clients.
        model ([`~peft.PeftModel`]): The model, with an adapter that awaits gradients.
        bases ([`BasesSettings`]): How the bases are made.

    Returns:
        `dict[str, Any]`: The record of the round.

    Raises:
        RoundFailedError: if too few clients succeeded.
        ValueError: if the adapter was trained before.
    """
    start_time = time.perf_counter()
    server, adapter_name = run.server, run.client.adapter.adapter_name
    no_gradient = sketch_state(make_sketches(model, adapter_name, bases.rank))
    round_zero = RoundZero(server.settings, bases)

    def mean(purpose: str, like: State, sent: State) -> dict[str, torch.Tensor]:
        def close(replies: Iterable[ClientReply]) -> tuple[dict[str, torch.Tensor], Round]:
            return round_zero.close(like, replies), replace(round_zero.this_round, first_error=None)

        replies = runner.run(round_zero.open(purpose, sent), run.client.train)
        state, round_zero.this_round = runner.at_server(replies, close)
        return state

    head = {name: tensor for name, tensor in server.state.global_state.items() if not is_core(name)}
    if head and bases.warmup_steps:
        head = mean("warm_up", head, head)
    sketches = sketches_from_state(model, mean("sketch", no_gradient, head), adapter_name, bases.rank)
    server.state = replace(server.state, global_state={**server.state.global_state, **head}, has_succeeded=True)
    run.load_global()
    set_bases_from_sketches(model, sketches, adapter_name)
    runner.share(tensor for name, tensor in model.named_buffers() if ".ravan_" in name)
    round_zero.sent_to_all(bases_of(model, adapter_name))
    return {**round_zero.record(), "round_seconds": time.perf_counter() - start_time}


def bases_of(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """
    Args:
        model ([`~peft.PeftModel`]): The model.
        adapter_name (`str`): The name of the adapter.

    Returns:
        `dict[str, torch.Tensor]`: The bases of its Ravan layers, by their checkpoint names. They share the memory of the
        model. Empty for other adapters.
    """
    return {
        f"{PEFT_PREFIX}{name}.{basis}": getattr(layer, basis)[adapter_name]
        for name, layer in adapter_layers(model, adapter_name).items()
        for basis in BASES_NAMES
    }
