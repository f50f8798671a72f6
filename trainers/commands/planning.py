"""Which sizes of adapters fit a budget of bytes that each client uploads in a round."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import convert_file_size_to_int
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from peft_ravan import RavanConfig, RavanModel
from peft_ravan.tuner.state import exchange_state, has_part, is_core

from ..compression import DEFAULT_UPLOAD_DTYPE
from ..exchange import ClientReply
from ..quantization import LEVELS, SENT_DTYPES, QuantizedTensor, code_dtype, code_sizes
from .run_arguments import TASKS


NUM_HEADS = (1, 2, 4, 8, 16)
# as in RavanConfig
USUAL_HEADS = 4
AUTO_CLASSES = {"classification": AutoModelForSequenceClassification, "sft": AutoModelForCausalLM}
# a reply with numbers of the usual length: its text is a small part of the upload
_REPLY = {"client": "client_0", "num_examples": 100, "train_loss": 1 / 3, "learning_rate": 1e-3}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class PlanRequest:
    """
    What to plan.

    Args:
        model (`str`): The base model, on the Hub or in a folder. Only its configuration is read.
        budget (`str`): The bytes that a client may upload in a round, such as `"1MB"` (10^6) or `"512KiB"` (2^10 each).
        task (`str`, *optional*): `"classification"` or `"sft"`, as for `peft-ravan train`. By default `"sft"` if the
            configuration says that the model is a causal language model.
        target_modules (`str`, *optional*): Names of modules, separated by commas, or `"all-linear"`. By default those of
            PEFT for the architecture.
        num_labels (`int`, *optional*): The number of labels of a classifier. By default as in the configuration.
        upload_dtype (`str`, *optional*, defaults to `"int4"`): The dtype of uploads.
        revision (`str`, *optional*): The revision of the model on the Hub.
    """

    model: str
    budget: str
    task: str | None = None
    target_modules: str | None = None
    num_labels: int | None = None
    upload_dtype: str = DEFAULT_UPLOAD_DTYPE
    revision: str | None = None


@dataclass(frozen=True)
class Choice:
    """
    One size of an adapter.

    Args:
        r (`int`): The rank of a head, or of LoRA.
        num_heads (`int`, *optional*): The number of heads. `None` stands for LoRA.
        trained (`int`): How many numbers of the adapter are trained, without the task head.
        upload_bytes (`int`): What a client uploads in a round, with the task head.
        update_rank (`int`): The highest rank of the update of a weight.
        is_limited (`bool`): Whether a larger `r` would fit the budget, but not the smallest weight.
    """

    r: int
    num_heads: int | None
    trained: int
    upload_bytes: int
    update_rank: int
    is_limited: bool


@dataclass(frozen=True)
class Uploads:
    """
    What a client uploads, for adapters of any size.

    Args:
        ravan (`Mapping[str, tuple[int, ...]]`): The shapes by name with one head of rank 1 at each target, and the task head.
        lora (`Mapping[str, tuple[int, ...]]`): The same with LoRA of rank 1.
        dtype (`str`): The dtype of uploads.
        smallest_side (`int`): The smaller side of the smallest adapted weight, which the rank of no update exceeds.
    """

    ravan: Shapes
    lora: Shapes
    dtype: str
    smallest_side: int

    @property
    def task_head_bytes(self) -> int:
        """What of each upload is the task head."""
        head = (_empty_tensor(shape, self.dtype) for name, shape in self.ravan.items() if not is_core(name))
        parts = [part for t in head for part in ((t.codes, t.scales) if isinstance(t, QuantizedTensor) else (t,))]
        return sum(part.numel() * part.element_size() for part in parts)

    def shapes(self, r: int, num_heads: int | None) -> dict[str, tuple[int, ...]]:
        """
        Args:
            r (`int`): The rank of a head, or of LoRA.
            num_heads (`int`, *optional*): The number of heads. `None` stands for LoRA.

        Returns:
            `dict[str, tuple[int, ...]]`: The shapes by name.
        """
        if num_heads is not None:
            return {name: (num_heads, r, r) if is_core(name) else shape for name, shape in self.ravan.items()}
        return {name: _with_rank(name, shape, r) for name, shape in self.lora.items()}

    def largest(self, budget: int, num_heads: int | None) -> Choice | None:
        """
        Args:
            budget (`int`): The bytes that a client may upload in a round.
            num_heads (`int`, *optional*): The number of heads. `None` stands for LoRA.

        Returns:
            [`Choice`]: The largest adapter that fits the budget and the smallest weight, if there is one.
        """
        most = self.smallest_side // (num_heads or 1)
        # one beyond what fits the smallest weight shows whether the budget would have allowed it
        ranks = range(1, most + 2)
        found = bisect.bisect_right(ranks, budget, key=lambda r: upload_bytes(self.shapes(r, num_heads), self.dtype))
        r = min(found, most)
        if r < 1:
            return None
        shapes = self.shapes(r, num_heads)
        adapter = [name for name in shapes if is_core(name) or name not in self.ravan]
        # the scalings are trained, and sent in the products with the cores
        scalings = 0 if num_heads is None else num_heads * len(adapter)
        trained = sum(math.prod(shapes[name]) for name in adapter) + scalings
        sent = upload_bytes(shapes, self.dtype)
        return Choice(r, num_heads, trained, sent, (num_heads or 1) * r, is_limited=found > most)


@dataclass(frozen=True)
class Plan:
    """
    The sizes that fit a budget.

    Args:
        model_class (`str`): The name of the class of the model.
        task (`str`): The task.
        targets (`Sequence[str]`): The names of the adapted modules.
        budget (`int`): The budget in bytes.
        uploads ([`Uploads`]): What a client uploads.
        choices (`Sequence[Choice]`): The largest Ravan adapter for several numbers of heads, and the largest LoRA.
        recommended ([`Choice`]): One of them.
        target_modules (`str`, *optional*): As in the request.
    """

    model_class: str
    task: str
    targets: Sequence[str]
    budget: int
    uploads: Uploads
    choices: Sequence[Choice]
    recommended: Choice
    target_modules: str | None = None


def parse_bytes(text: str) -> int:
    """
    Args:
        text (`str`): A number of bytes, such as `"1MB"`, `"512KiB"` or `"65536"`. Lower case means the same.

    Returns:
        `int`: The bytes.

    Raises:
        ValueError: if it is none, or not above 0.
    """
    # with a small b, accelerate counts bits
    text = text.strip().upper()
    try:
        size = int(text) if text.isdecimal() else convert_file_size_to_int(text)
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"A budget is a number of bytes, such as 500KB, 1MB or 512KiB, got {text!r}.")
    return size


def plan_uploads(request: PlanRequest) -> Plan:
    """
    Find the largest adapters that fit a budget.

    Args:
        request ([`PlanRequest`]): The model, the budget and the targets.

    Returns:
        [`Plan`]: The choices, of which one is recommended.

    Raises:
        OSError: if the configuration of the model cannot be loaded.
        ValueError: if the budget is too small, or the model has no such task or targets.
    """
    budget = parse_bytes(request.budget)
    if request.upload_dtype not in SENT_DTYPES:
        raise ValueError(f"`upload_dtype` must be one of {', '.join(SENT_DTYPES)}, got {request.upload_dtype!r}.")
    config = _load_config(request)
    task = request.task or _task_of(config)
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}.")
    fields = {"target_modules": _listed(request.target_modules), "task_type": TASKS[task]}
    ravan, lora = RavanConfig(r=1, num_heads=1, **fields), LoraConfig(r=1, **fields)
    model = _empty_model(config, task)
    sides = RavanModel.target_sizes(model, ravan)
    if not sides:
        raise ValueError(f"The model has none of the target modules {request.target_modules!r}.")
    uploads = Uploads(
        ravan=_uploaded_shapes(model, ravan),
        lora=_uploaded_shapes(_empty_model(config, task), lora),
        dtype=request.upload_dtype,
        smallest_side=min(min(size) for size in sides.values()),
    )
    choices = [found for heads in NUM_HEADS if (found := uploads.largest(budget, heads)) is not None]
    if not choices:
        least = upload_bytes(uploads.shapes(1, 1), request.upload_dtype)
        raise ValueError(
            f"A budget of {budget:,} bytes is too small: one head of rank 1 takes {least:,} bytes in "
            f"{request.upload_dtype}, of which the task head is {uploads.task_head_bytes:,}. Give a larger budget, or fewer "
            "target modules."
        )
    as_lora = uploads.largest(budget, None)
    return Plan(
        type(model).__name__,
        task,
        list(sides),
        budget,
        uploads,
        [*choices, *([] if as_lora is None else [as_lora])],
        _recommended(choices),
        request.target_modules,
    )


def upload_bytes(shapes: Shapes, upload_dtype: str) -> int:
    """
    Args:
        shapes (`Mapping[str, tuple[int, ...]]`): The names and shapes of the tensors that a client uploads.
        upload_dtype (`str`): The dtype of uploads.

    Returns:
        `int`: The bytes of the reply of a client, as a run records them. The lengths of its texts, such as the name of the
        client, are assumed, which can make a difference of some bytes.
    """
    update = {name: _empty_tensor(shape, upload_dtype) for name, shape in shapes.items()}
    # with float32, whole tensors are sent
    dtype = None if upload_dtype == "float32" else upload_dtype
    return ClientReply(round_number=1, update=update, upload_dtype=dtype, **_REPLY).num_bytes


def _with_rank(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The shape of LoRA's A, [r, ...], or B, [d_out, r, ...], or of another tensor, which stays what it is."""
    if "lora_" not in name:
        return shape
    axis = 1 if has_part(name, ("lora_B", "lora_embedding_B")) else 0
    return (*shape[:axis], rank, *shape[axis + 1 :])


def _empty_tensor(shape: tuple[int, ...], upload_dtype: str) -> torch.Tensor | QuantizedTensor:
    if upload_dtype not in LEVELS:
        return torch.empty(shape, dtype=getattr(torch, upload_dtype), device="meta")
    num_codes, num_scales = code_sizes(upload_dtype, math.prod(shape))
    codes = torch.empty(num_codes, dtype=code_dtype(upload_dtype), device="meta")
    return QuantizedTensor(codes, torch.empty(num_scales, dtype=torch.bfloat16, device="meta"), shape, upload_dtype)


def _load_config(request: PlanRequest) -> PretrainedConfig:
    options = {} if request.num_labels is None else {"num_labels": request.num_labels}
    try:
        return AutoConfig.from_pretrained(request.model, revision=request.revision or "main", **options)
    except OSError as error:
        raise OSError(f"The configuration of {request.model!r} could not be loaded: {error}") from error


def _task_of(config: PretrainedConfig) -> str:
    is_language_model = any(name.endswith("ForCausalLM") for name in config.architectures or ())
    return "sft" if is_language_model else "classification"


def _empty_model(config: PretrainedConfig, task: str) -> nn.Module:
    with torch.device("meta"):
        return AUTO_CLASSES[task].from_config(config)


def _uploaded_shapes(model: nn.Module, config: PeftConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of what a client uploads, for an adapter of rank 1."""
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    state = exchange_state(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _listed(target_modules: str | None) -> list[str] | str | None:
    if target_modules is None or target_modules == "all-linear":
        return target_modules
    return [name.strip() for name in target_modules.split(",")]


def _recommended(choices: Sequence[Choice]) -> Choice:
    """
    The usual number of heads. Where the smallest weight limits these, part of the budget is left, and fewer heads use more of
    it for the same rank of the update.
    """
    usual = [found for found in choices if found.num_heads <= USUAL_HEADS]
    return next((found for found in reversed(usual) if not found.is_limited), usual[0])


# ---- What is shown -----------------------------------------------------------------


def show_plan(plan: Plan, console: Console) -> None:
    """
    Args:
        plan ([`Plan`]): The plan.
        console (`rich.console.Console`): Where to print it.
    """
    modules = sorted({name.rpartition(".")[2] for name in plan.targets})
    console.print(f"{plan.model_class}: {len(plan.targets)} weights are adapted ({', '.join(modules)}).")
    if plan.uploads.task_head_bytes:
        console.print(f"The task head is {_size(plan.uploads.task_head_bytes)} of each upload.")
    table = Table(title=f"At most {_size(plan.budget)} per client and round, in {plan.uploads.dtype}")
    for column in ("adapter", "num_heads", "r", "trained", "upload", f"rank (of {plan.uploads.smallest_side})"):
        table.add_column(column, justify="left" if column == "adapter" else "right")
    for choice in plan.choices:
        table.add_row(
            "LoRA" if choice.num_heads is None else "Ravan",
            "" if choice.num_heads is None else str(choice.num_heads),
            str(choice.r),
            f"{choice.trained:,}",
            _size(choice.upload_bytes),
            str(choice.update_rank),
            style="bold" if choice is plan.recommended else None,
        )
    console.print(table)
    best = plan.recommended
    console.print(f"Recommended: num_heads={best.num_heads}, r={best.r}.")
    if best.is_limited:
        console.print(
            "The budget has room for more, but the smallest weight has not. Other targets are set by --target-modules."
        )
    for line in _how_to_use(plan):
        # it is copied, so it is neither wrapped nor coloured
        console.print(f"    {line}", highlight=False, markup=False, soft_wrap=True)


def _how_to_use(plan: Plan) -> tuple[str, str]:
    best, targets = plan.recommended, _listed(plan.target_modules)
    given = "" if targets is None else f", target_modules={targets!r}"
    code = f'RavanConfig(r={best.r}, num_heads={best.num_heads}{given}, task_type="{TASKS[plan.task]}")'
    options = f"--task {plan.task} --adapter.r {best.r} --adapter.num_heads {best.num_heads}"
    if targets is not None:
        named = targets if isinstance(targets, str) else f"'[{', '.join(targets)}]'"
        options += f" --adapter.target_modules {named}"
    if plan.uploads.dtype != DEFAULT_UPLOAD_DTYPE:
        options += f" --upload_dtype {plan.uploads.dtype}"
    return code, f"peft-ravan train run.yaml {options}"


def _size(size: int) -> str:
    """Bytes with three digits, in units of 1,000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 999.5 * factor else f"{size / factor:,.0f} {unit}"
    return f"{size} B"
