"""A Trainer while it trains one client: its data and its hooks. This is the only place that overrides these hooks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..records.callbacks import LocalCallbackHandler
from .objective import GradientCorrection
from .task_head import set_task_head_rate


Arguments = TypeVar("Arguments", bound=TrainingArguments)

# replaced by the local training of a client, and restored after it
_RESTORED_ATTRIBUTES = (
    "args",
    "callback_handler",
    "control",
    "is_in_train",
    "model_init",
    "optimizer_cls_and_kwargs",
    "state",
    "train_dataset",
)
_MISSING = object()


def local_arguments(args: Arguments, seed: int) -> Arguments:
    """
    Make the arguments of a client's local training, in which nothing is logged, evaluated, saved or pushed.

    Args:
        args ([`~transformers.TrainingArguments`]): The arguments of the federation.
        seed (`int`): The seed of the local training.

    Returns:
        [`~transformers.TrainingArguments`]: A changed copy.
    """
    local = copy.copy(args)
    local.seed = seed
    local.data_seed = None
    local.eval_on_start = False
    local.eval_strategy = local.logging_strategy = IntervalStrategy.NO
    local.save_strategy = SaveStrategy.NO
    local.push_to_hub = False
    return local


@dataclass
class LocalTraining:
    """
    The training of one client.

    Args:
        dataset (`Dataset`): The training data.
        seed (`int`): Its seed.
        learning_rate_factor (`float`, *optional*, defaults to 1.0): The factor of the learning rate in all steps.
        max_steps (`int`, *optional*): The number of steps. By default that of the arguments.
        callbacks (`tuple[TrainerCallback, ...]`, *optional*): The callbacks of the client.
        objective (`Callable[[nn.Module], GradientCorrection]`, *optional*): Makes the correction of the gradients of a
            model.
        attributes (`tuple[str, ...]`, *optional*): Attributes of the trainer that the client gets a copy of.
        task_head_learning_rate (`float`, *optional*): The learning rate of the task head. By default that of the adapter.
        is_shared (`bool`, *optional*, defaults to `False`): Whether several processes train the client together.

    **Attributes**:
        - **correction** ([`GradientCorrection`]) -- The correction that `objective` made, once there is an optimizer.
    """

    dataset: Dataset
    seed: int
    learning_rate_factor: float = 1.0
    max_steps: int | None = None
    callbacks: tuple[TrainerCallback, ...] = ()
    objective: Callable[[torch.nn.Module], GradientCorrection] | None = None
    attributes: tuple[str, ...] = ()
    task_head_learning_rate: float | None = None
    is_shared: bool = False
    correction: GradientCorrection | None = field(default=None, init=False)


@contextlib.contextmanager
def as_client(trainer: Trainer, training: LocalTraining) -> Iterator[None]:
    """
    Set up a trainer for one client within a context: with its data, its seed and its hooks, and without anything that
    belongs to the federation.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer. It is restored afterwards.
        training ([`LocalTraining`]): The training of the client.
    """
    own = [name for name in training.attributes if hasattr(trainer, name)]
    before = {name: getattr(trainer, name) for name in (*_RESTORED_ATTRIBUTES, *own)}
    for name in own:
        setattr(trainer, name, copy.deepcopy(before[name]))
    trainer.args = local_arguments(trainer.args, training.seed)
    if training.max_steps is not None:
        trainer.args.max_steps = training.max_steps
    trainer.callback_handler = LocalCallbackHandler.of(trainer.callback_handler, *training.callbacks)
    trainer.control = TrainerControl()
    trainer.model_init = None
    trainer.train_dataset = training.dataset
    if trainer.optimizer_cls_and_kwargs is not None:
        # Trainer removes the parameter groups from the dict, so the next client would not have them
        optimizer_cls, kwargs = trainer.optimizer_cls_and_kwargs
        trainer.optimizer_cls_and_kwargs = (optimizer_cls, dict(kwargs))
    trainer.optimizer = trainer.lr_scheduler = None
    if training.is_shared:
        # the wrapper for several processes still refers to the parameters that the last client trained
        trainer.model_wrapped = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    set_seed(training.seed)
    try:
        with replaced(trainer, _hooks(trainer, training)):
            yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)
        trainer.optimizer = trainer.lr_scheduler = None


@contextlib.contextmanager
def replaced(trainer: Trainer, hooks: Mapping[str, Any]) -> Iterator[None]:
    """
    Replace hooks of a trainer within a context.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer.
        hooks (`Mapping[str, Any]`): Names of methods or attributes to their replacements.
    """
    before = {name: vars(trainer).get(name, _MISSING) for name in hooks}
    vars(trainer).update(hooks)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _MISSING:
                del vars(trainer)[name]
            else:
                vars(trainer)[name] = value


def _hooks(trainer: Trainer, training: LocalTraining) -> dict[str, Callable]:
    make_optimizer, decayed = trainer.create_optimizer, trainer.get_decay_parameter_names

    def create_optimizer(*args, **kwargs) -> torch.optim.Optimizer:
        optimizer = make_optimizer(*args, **kwargs)
        if training.task_head_learning_rate is not None:
            set_task_head_rate(optimizer, trainer.model, training.task_head_learning_rate)
        if training.objective is not None:
            training.correction = training.objective(trainer.model)  # after the client has chosen its heads
            optimizer.register_step_pre_hook(training.correction)
        return optimizer

    def create_scheduler(num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        # the learning rate is constant within a round
        factor = training.learning_rate_factor
        trainer.lr_scheduler = LambdaLR(trainer.optimizer if optimizer is None else optimizer, lambda step: factor)
        trainer._created_lr_scheduler = True
        return trainer.lr_scheduler

    def get_decay_parameter_names(model: torch.nn.Module) -> list[str]:
        # Ravan's scalings start at 1, and weight decay would pull them to 0
        return [name for name in decayed(model) if ".ravan_s." not in name]

    return {
        "create_optimizer": create_optimizer,
        "create_scheduler": create_scheduler,
        "get_decay_parameter_names": get_decay_parameter_names,
        # the client's state is discarded, and counting the parameters of a model takes as long as a small step
        "floating_point_ops": lambda inputs: 0,
        # what is logged while a client trains stays with the client
        "log": lambda logs, start_time=None: None,
        "_finish_current_push": lambda: None,
    }
