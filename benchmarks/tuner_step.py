"""
The cost of a training step of Ravan, compared with LoRA with the same number of trained parameters, full fine-tuning
of the same layers, one chain of products per head, and training half of the heads.

The model is a stack of square linear layers with activations in between, all of them adapted. This is the worst case
for an adapter. A step is a forward and a backward pass. The models of a cell take turns, and a figure is the median of
the ratios of neighbouring steps, so that other load on the machine meets all of them. With one thread the time is that
of the processor. Finished cells are lines in a file and are not repeated.

    python benchmarks/tuner_step.py --widths 384 768 --tokens 128 512 2048 8192 --heads 1 4 8
    python benchmarks/tuner_step.py --table
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from cells import finished_cells, run_cells
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_ravan import RavanConfig
from peft_ravan.tuner.dense import dense_is_cheaper, is_kept
from peft_ravan.tuner.linear import Linear


FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "benchmarks.md"
SECTION = re.compile(r"<!-- tuner_step -->\n.*?<!-- /tuner_step -->", flags=re.DOTALL)
RESULTS = FOLDER / "results" / "speed" / "tuner_step.jsonl"


@dataclass(frozen=True)
class Cell:
    """
    One comparison.

    Args:
        width (`int`): d_in = d_out of every layer.
        tokens (`int`): Tokens in a batch.
        heads (`int`): h.
        lora_rank (`int`): The rank of LoRA. Ravan trains as many numbers or slightly fewer.
        depth (`int`): The number of layers.
        bf16 (`bool`): Whether the forward pass is under autocast to bfloat16.
        threads (`int`): The number of threads of torch.
        device (`str`): `"cpu"` or `"cuda"`.
        compiled (`bool`): Whether the models are compiled with Inductor.
    """

    width: int
    tokens: int
    heads: int
    lora_rank: int = 8
    depth: int = 4
    bf16: bool = False
    threads: int = 1
    device: str = "cpu"
    compiled: bool = False

    @property
    def r(self) -> int:
        # LoRA trains rank * (d_in + d_out) numbers a layer, Ravan heads * (r * r + 1)
        return int((self.lora_rank * 2 * self.width / self.heads) ** 0.5)


class HeadByHead(Linear):
    """The same layer with one chain of products per head, as it is usually written."""

    def forward(self, x):
        result = self.base_layer(x)
        name, r = "default", self.r["default"]
        for head in range(self.num_heads[name]):
            rows = slice(head * r, (head + 1) * r)
            inner = x @ self.ravan_A[name][rows].T @ self.ravan_H[name][head].T
            result = result + self.ravan_s[name][head] * (inner @ self.ravan_B[name][:, rows].T)
        return result


def make_stack(cell: Cell) -> nn.Sequential:
    return nn.Sequential(
        *(layer for _ in range(cell.depth) for layer in (nn.Linear(cell.width, cell.width), nn.GELU()))
    )


def make_ravan(cell: Cell, keep_until: str | None = "backward", some_heads: bool = False) -> nn.Module:
    targets = [str(2 * index) for index in range(cell.depth)]
    config = RavanConfig(r=cell.r, num_heads=cell.heads, target_modules=targets, init_bases="normal")
    model = get_peft_model(make_stack(cell), config)
    model.keep_formed_weights(keep_until)
    if some_heads:
        model.set_trained_heads(
            {name: torch.arange(len(mask)) < max(1, len(mask) // 2) for name, mask in model.trained_heads().items()}
        )
    return model


def make_lora(cell: Cell) -> nn.Module:
    targets = [str(2 * index) for index in range(cell.depth)]
    return get_peft_model(make_stack(cell), LoraConfig(r=cell.lora_rank, target_modules=targets))


def make_head_by_head(cell: Cell) -> nn.Module:
    model = make_ravan(cell)
    for module in model.modules():
        if isinstance(module, Linear):
            module.__class__ = HeadByHead
    return model


MODELS: dict[str, Callable[[Cell], nn.Module]] = {
    "frozen base": lambda cell: make_stack(cell).requires_grad_(False),
    "full fine-tuning": make_stack,
    "LoRA": make_lora,
    "Ravan": make_ravan,
    "Ravan, nothing kept": lambda cell: make_ravan(cell, None),
    "Ravan, weight held": lambda cell: make_ravan(cell, "changed"),
    "Ravan, half the heads": lambda cell: make_ravan(cell, some_heads=True),
    "Ravan, head by head": make_head_by_head,
}


def multiplications(cell: Cell) -> dict[str, float]:
    """
    Args:
        cell ([`Cell`]): A comparison.

    Returns:
        `dict[str, float]`: The multiplications of a step for each token and layer, in thousands. Products with the
            cores, and everything that grows with d and not with d², are left out.
    """
    d, T, R = cell.width, cell.tokens, cell.heads * cell.r
    base = 2 * d * d
    can_form = not cell.bf16
    kept = is_kept(T, d, d)
    dense = can_form and dense_is_cheaper(T, d, d, R, training=True, keep=kept)
    core_gradient = min(2 * R * d, (T + R) * d * d / T)
    counts = {
        "frozen base": base,
        "full fine-tuning": 3 * d * d,
        "LoRA": base + 6 * cell.lora_rank * d,
        "Ravan": base + (R * d * d / T + core_gradient if dense else 4 * R * d),
        "Ravan, weight held": base + (core_gradient if can_form and dense else 4 * R * d),
    }
    return {name: count / 1000 for name, count in counts.items()}


def step(model: nn.Module, x: torch.Tensor, bf16: bool) -> None:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        loss = model(x).square().mean()
    loss.backward()
    model.zero_grad(set_to_none=True)
    x.grad = None
    if x.device.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], None], device: str) -> int:
    """
    Args:
        run (`Callable`): A step.
        device (`str`): Where it runs.

    Returns:
        `int`: The most memory that tensors have taken at once in addition to what was there before. On a CPU, this is
            the running sum of what torch's allocator reports to the profiler.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


def measure(cell: Cell, names: list[str], repetitions: int) -> dict:
    """
    Args:
        cell ([`Cell`]): A comparison.
        names (`list[str]`): The models, with LoRA among them.
        repetitions (`int`): How often they take turns.

    Returns:
        `dict`: For each model, `milliseconds` and `peak_mb` of a step, and `against`: the median of the ratios to each
            other model.
    """
    torch.manual_seed(0)
    torch.set_num_threads(cell.threads)
    models = {name: MODELS[name](cell).to(cell.device) for name in names}
    if cell.compiled:
        models = {name: torch.compile(model) for name, model in models.items()}
    x = torch.randn(cell.tokens, cell.width, device=cell.device, requires_grad=True)
    clock = time.process_time if cell.device == "cpu" and cell.threads == 1 else time.perf_counter
    seconds = {name: [] for name in names}
    for model in models.values():
        step(model, x, cell.bf16)
    for _ in range(repetitions):
        for name, model in models.items():
            start = clock()
            step(model, x, cell.bf16)
            seconds[name].append(clock() - start)
    return {
        name: {
            "milliseconds": round(1000 * statistics.median(seconds[name]), 3),
            "peak_mb": round(peak_bytes(lambda model=model: step(model, x, cell.bf16), cell.device) / 1e6, 2),
            "against": {
                other: round(statistics.median(a / b for a, b in zip(seconds[name], times, strict=True)), 3)
                for other, times in seconds.items()
            },
        }
        for name, model in models.items()
    }


def table(records: list[dict]) -> str:
    """
    Args:
        records (`list[dict]`): Finished cells.

    Returns:
        `str`: A table in markdown.
    """
    lines = [
        "| d | h | tokens | | against LoRA | limit | against full fine-tuning | limit | weight held, against LoRA | limit "
        "| peak MB: LoRA | Ravan | nothing kept |",
        "|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    names = Cell.__dataclass_fields__
    cells = [(Cell(**{name: record[name] for name in names}), record["step"]) for record in records]
    for cell, found in sorted(cells, key=lambda pair: (pair[0].bf16, pair[0].compiled, *vars(pair[0]).values())):
        count = multiplications(cell)
        ravan, held = found["Ravan"], found["Ravan, weight held"]
        precision = "bf16 autocast" if cell.bf16 else "float32"
        if cell.threads > 1:
            precision += f", {cell.threads} threads"
        if cell.compiled:
            precision += ", compiled"
        lines.append(
            f"| {cell.width:,} | {cell.heads} | {cell.tokens:,} | {precision} "
            f"| {ravan['against']['LoRA']:.2f} | {count['Ravan'] / count['LoRA']:.2f} "
            f"| {ravan['against']['full fine-tuning']:.2f} | {count['Ravan'] / count['full fine-tuning']:.2f} "
            f"| {held['against']['LoRA']:.2f} | {count['Ravan, weight held'] / count['LoRA']:.2f} "
            f"| {found['LoRA']['peak_mb']:.1f} | {ravan['peak_mb']:.1f} | {found['Ravan, nothing kept']['peak_mb']:.1f} |"
        )
    return "\n".join(lines)


def with_table(page: str) -> str:
    """
    Args:
        page (`str`): The text of docs/benchmarks.md.

    Returns:
        `str`: The same text with the table of the finished cells in `results`.
    """
    return SECTION.sub(f"<!-- tuner_step -->\n\n{table(finished_cells(RESULTS))}\n\n<!-- /tuner_step -->", page)


def summary(record: dict) -> str:
    found = record["step"]["Ravan"]
    ratios = ", ".join(f"{ratio:.2f} x {name}" for name, ratio in found["against"].items() if name != "Ravan")
    return (
        f"d {record['width']}, {record['tokens']} tokens, h {record['heads']}, bf16 {record['bf16']}: Ravan {ratios}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[768], help="of 384, 768, 2048, 4096, or others")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048, 8192])
    parser.add_argument("--heads", type=int, nargs="+", default=[4])
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--depth", type=int, default=4, help="number of layers")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile and Inductor")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS)[:6], help="which are compared")
    parser.add_argument("--repetitions", type=int, default=15, help="how often the models take turns")
    parser.add_argument("--output", type=Path, default=RESULTS, help="finished cells")
    parser.add_argument("--table", action="store_true", help="write the table of the finished cells, and run nothing")
    options = parser.parse_args()
    if options.table:
        if options.output == RESULTS:
            PAGE.write_text(with_table(PAGE.read_text()))
        print(table(finished_cells(options.output)))
        return
    more = (options.lora_rank, options.depth, options.bf16, options.threads, options.device, options.compiled)
    cells = [Cell(*grid, *more) for grid in itertools.product(options.widths, options.tokens, options.heads)]
    run_cells(
        cells,
        lambda cell: measure(cell, options.models, options.repetitions),
        options.output,
        measured="step",
        show=summary,
    )


if __name__ == "__main__":
    main()
