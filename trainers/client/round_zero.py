"""The clients' part of round 0, which makes the common bases of an adapter with `init_bases="gradient_svd"`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from peft_ravan.tuner.gradient_bases import sketch_gradients, sketch_state

from ..processes import one_process
from .faults import TimeoutCallback


def sketch_gradient(
    trainer: Trainer, num_batches: int | None, rank: int | None, timeout: TimeoutCallback
) -> tuple[dict[str, torch.Tensor], float]:
    """
    Sketch the mean gradient over some batches.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer, set up for the client.
        num_batches (`int`, *optional*): Over how many batches. By default all.
        rank (`int`, *optional*): How many directions to keep at each target. By default as many as the bases have.
        timeout ([`TimeoutCallback`]): Stops it if it takes too long.

    Returns:
        `tuple[dict[str, torch.Tensor], float]`: The sketch, and the mean loss.
    """
    model, losses = trainer.model, []

    def batches() -> Iterator[Mapping[str, Any]]:
        for inputs in islice(trainer.get_train_dataloader(), num_batches):
            timeout.check()
            yield trainer._prepare_inputs(inputs)

    def compute_loss(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
        # accelerate adds autocast to the model's forward only when the first client trains
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            loss = trainer.compute_loss(model, inputs)
        losses.append(loss.item())
        return loss

    with one_process():  # also if several processes train a client together
        sketches = sketch_gradients(model, batches(), model.active_adapter, compute_loss, rank)
    return sketch_state(sketches), sum(losses) / len(losses)
