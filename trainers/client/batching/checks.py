"""What several clients cannot be trained at once with."""

from __future__ import annotations

from peft import PeftModel
from torch import nn
from transformers import Trainer

from .parts import common_parts


def check_batching(trainer: Trainer, size: int) -> None:
    """
    Args:
        trainer ([`~transformers.Trainer`]): The trainer of the clients.
        size (`int`): How many clients are trained at once, as of `client_batching`.

    Raises:
        ValueError: if there is more than one, and the trainer or the model does not allow it.
    """
    if size == 1 or not isinstance(trainer.model, PeftModel):
        return
    problem = _problem_of_trainer(trainer) or _problem_of_model(trainer.model)
    if problem is not None:
        raise ValueError(
            f"`client_batching={size}` trains several clients at once, but {problem}. Set `client_batching=1`."
        )


def _problem_of_trainer(trainer: Trainer) -> str | None:
    if type(trainer).training_step is not Trainer.training_step or "training_step" in vars(trainer):
        return f"the {type(trainer).__name__} has its own `training_step`, and may compute gradients in it"
    if trainer.args.n_gpu > 1:
        return f"Trainer spreads each batch over {trainer.args.n_gpu} GPUs in one process"
    return None


def _problem_of_model(model: nn.Module) -> str | None:
    base = model.get_base_model()
    if getattr(base, "is_gradient_checkpointing", False):
        return "the model repeats its forward pass for gradients (activation checkpointing)"
    if len(set((getattr(base, "hf_device_map", None) or {}).values())) > 1:
        return "the model is spread over several devices"
    parts = common_parts(model)
    if not parts:
        return "the model has no part with adapted layers that they could share"
    for part in parts:
        for name, module in model.get_submodule(part).named_modules():
            # batch norms of all kinds derive from it
            if isinstance(module, nn.modules.batchnorm._NormBase) and not isinstance(
                module, nn.modules.instancenorm._InstanceNorm
            ):
                return (
                    f"{part}.{name} ({type(module).__name__}) takes its statistics over a batch, which would have rows of "
                    "all of them"
                )
    return None
