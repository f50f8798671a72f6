"""
The overhead of a federation over the training of its clients: time, memory and bytes.

- A round compared with the bare training loops of its clients: the same model, batches, clipping and a fresh AdamW for
  each client, in plain PyTorch. The bare loops run alternately after and before the clients, so that other load on the
  machine affects both alike. Their training losses must agree to 1 %, which shows that both did the same work.
- Memory with few and with many clients, with the same number of clients per round, and over many rounds.
- Thousands of clients, and the bytes that a client uploads compared with the parameters that it trains.

Each measurement of memory runs in its own process and reads /proc/self/status on Linux: VmHWM is the peak of the
resident memory, VmRSS its current value. The training data is on disk and memory-mapped, as with `load_dataset`.

    python benchmarks/federation.py --threads 1 --plot federation.png
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from own_process import in_own_process, memory_bytes
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader, RandomSampler
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    default_data_collator,
    set_seed,
)

from peft_ravan import RavanConfig
from peft_ravan.trainers import FederatedArguments, FederatedTrainer, messages
from peft_ravan.trainers.client import trainer_hooks
from peft_ravan.trainers.client.live_adapter import LiveAdapter
from peft_ravan.trainers.records.callbacks import FederatedCallback
from peft_ravan.trainers.seeds import derive_seed
from peft_ravan.trainers.server import merging


VOCAB_SIZE, NUM_LABELS = 1000, 4
TARGETS = ["query", "key", "value", "dense"]
SETUP = "the Trainer of a client, its steps left out"
STEPS, MORE = "steps of the clients", "its steps, more than the bare loop"
CLOCKS = ("wall", "processor")


def bert(hidden_size: int, num_layers: int, tokens: int) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=max(1, hidden_size // 32),
            intermediate_size=4 * hidden_size,
            max_position_embeddings=tokens,
            num_labels=NUM_LABELS,
        )
    )


def realistic_model(args: argparse.Namespace) -> torch.nn.Module:
    """A model with the shape of MiniLM-L6 by default."""
    if args.model is None:
        return bert(384, 6, args.tokens)
    return AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=NUM_LABELS)


def with_ravan(model: torch.nn.Module, **kwargs) -> PeftModel:
    return get_peft_model(model, RavanConfig(task_type="SEQ_CLS", target_modules=TARGETS, **kwargs))


def write_dataset(folder: str, num_examples: int, tokens: int) -> datasets.Dataset:
    """Write random tokens, which cost as much as any others, to disk."""
    rng = np.random.default_rng(0)
    columns = {
        "input_ids": rng.integers(0, VOCAB_SIZE, (num_examples, tokens)),
        "attention_mask": np.ones((num_examples, tokens), dtype=np.int64),
        "labels": rng.integers(0, NUM_LABELS, num_examples),
    }
    datasets.Dataset.from_dict(columns).save_to_disk(folder)
    return datasets.load_from_disk(folder)


def federated_arguments(folder: str, **kwargs) -> FederatedArguments:
    return FederatedArguments(
        folder, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True, learning_rate=1e-3, **kwargs
    )


def quiet_trainer(
    model: PeftModel, args: FederatedArguments, *callbacks: FederatedCallback, **kwargs
) -> FederatedTrainer:
    trainer = FederatedTrainer(model, args, callbacks=list(callbacks), **kwargs)
    trainer.remove_callback(PrinterCallback)
    return trainer


# ---- The time of a round ---------------------------------------------------------------


def now() -> np.ndarray:
    """Seconds of wall-clock time, and of processor time, which does not include other programs on the machine."""
    return np.array([time.perf_counter(), time.process_time()])


class Stopwatch:
    """The seconds spent in watched functions, without the time in other watched functions that they call."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()
        self._open: list[np.ndarray] = []  # for each running function, the seconds in the functions that it called

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        self._open.append(np.zeros(2))
        start = now()
        try:
            yield
        finally:
            elapsed = now() - start
            self.seconds[name] += elapsed - self._open.pop()
            if self._open:
                self._open[-1] += elapsed

    def watch(self, owner: Any, function_name: str, name: str) -> None:
        function = getattr(owner, function_name)

        @functools.wraps(function)
        def measured(*args, **kwargs):
            with self.measure(name):
                return function(*args, **kwargs)

        setattr(owner, function_name, measured)


class BareLoops(FederatedCallback):
    """Trains each client a second time, without a Trainer, and records the seconds of both by round."""

    def __init__(self, watch: Stopwatch):
        self.watch = watch
        self.trainer: FederatedTrainer | None = None
        self.rounds: list[dict[str, np.ndarray]] = []
        self._steps = contextlib.ExitStack()

    def on_train_begin(self, args, state, control, **kwargs):
        self.adapter = LiveAdapter(self.trainer.model)
        # the first batches of a process take longer, since memory is allocated for them
        first = next(iter(self.trainer.clients.values()))
        few = first.select(range(min(len(first), 2 * args.train_batch_size)))
        train_bare(self.trainer.model, few, args, seed=0)

    def on_round_begin(self, args, state, control, clients, **kwargs):
        self.start = now()
        with self.watch.measure("pause"):
            self.global_state = self.adapter.read()
            self.losses, self.bare_seconds = [], np.zeros(2)
            if state.global_step % 2:
                for client in clients:
                    self._train(client, args, state)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._steps.enter_context(self.watch.measure(STEPS))

    def on_epoch_end(self, args, state, control, **kwargs):
        self._steps.close()

    def on_client_end(self, args, state, control, client, **kwargs):
        with self.watch.measure("pause"):
            if state.global_step % 2 == 0:
                self._train(client, args, state)

    def _train(self, client, args, state):
        self.adapter.load(self.global_state)
        seed = derive_seed(args.federated_seed, "client", state.global_step + 1, client)
        loss, seconds = train_bare(self.trainer.model, self.trainer.clients[client], args, seed)
        self.losses.append(loss)
        self.bare_seconds += seconds

    def on_round_end(self, args, state, control, record, **kwargs):
        total = now() - self.start - self.watch.seconds.pop("pause")
        parts = dict(self.watch.seconds)
        rest = {"merge": parts.pop("merge"), "rest of the round": total - sum(self.watch.seconds.values())}
        self.rounds.append({"round": total, "bare": self.bare_seconds, **parts, **rest})
        self.watch.seconds.clear()
        loss = statistics.fmean(self.losses)  # clients have the same number of examples
        # no tighter tolerance: after 10 steps, relative differences of more than 1e-4 have been observed
        assert abs(loss - record["train_loss"]) < 1e-2 * loss, (
            f"bare loops have a loss of {loss}, not that of {record}"
        )


@torch.enable_grad()  # the merge, during which clients train, needs no gradients
def train_bare(
    model: torch.nn.Module, dataset: datasets.Dataset, args: FederatedArguments, seed: int
) -> tuple[float, np.ndarray]:
    """Train a client with a hand-written loop. Returns the mean loss and the seconds."""
    start = now()
    set_seed(seed)
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))  # the order that Accelerate draws
    loader = DataLoader(dataset, args.train_batch_size, sampler=sampler, collate_fn=default_data_collator)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0, fused=True)
    model.train()
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return statistics.fmean(losses), now() - start


def measure_round(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    measure_clients(args, f"{folder}/imports", 1, 1, 1)  # the first federation of a process imports much
    examples = args.batch_size * args.steps * args.clients_per_round
    dataset = write_dataset(f"{folder}/data", examples, args.tokens)
    watch = Stopwatch()
    watch.watch(Trainer, "train", SETUP)
    watch.watch(LiveAdapter, "load", "loading the adapter")
    watch.watch(LiveAdapter, "read", "reading the adapter")
    watch.watch(messages, "serialized_bytes", "counting what is sent")
    watch.watch(trainer_hooks, "set_seed", "seeding")
    watch.watch(merging, "merge", "merge")
    callback = BareLoops(watch)
    arguments = federated_arguments(
        folder,
        num_clients=args.clients_per_round,
        num_rounds=args.rounds,
        num_train_epochs=1,
        per_device_train_batch_size=args.batch_size,
    )
    callback.trainer = quiet_trainer(with_ravan(realistic_model(args)), arguments, callback, train_dataset=dataset)
    callback.trainer.train()
    figures = {}
    for index, clock in enumerate(CLOCKS):
        rounds = [{name: float(value[index]) for name, value in record.items()} for record in callback.rounds]
        seconds = {name: statistics.fmean(record[name] for record in rounds) for name in rounds[0]}
        ratios = [record["round"] / record["bare"] for record in rounds]
        figures[clock] = {"ratio": seconds["round"] / seconds["bare"], "ratios": ratios, "seconds": seconds}
    return figures


# ---- Memory ----------------------------------------------------------------------------


def megabytes(name: str) -> float:
    return memory_bytes(name) / 2**20


class MemoryWatch(FederatedCallback):
    """Records the resident memory after each round."""

    def __init__(self):
        self.resident: list[float] = []

    def on_round_end(self, args, state, control, **kwargs):
        self.resident.append(megabytes("VmRSS"))


def measure_clients(
    args: argparse.Namespace, folder: str, num_clients: int, clients_per_round: int, num_rounds: int
) -> dict[str, Any]:
    """Run a federation with a tiny model, so that the clients dominate the memory, and the overhead the time."""
    dataset = write_dataset(f"{folder}/data", num_clients * args.examples, 16)
    before = megabytes("VmRSS")
    arguments = federated_arguments(
        folder,
        num_clients=num_clients,
        clients_per_round=clients_per_round,
        num_rounds=num_rounds,
        max_steps=1,
        per_device_train_batch_size=args.examples,
    )
    watch, start = MemoryWatch(), time.perf_counter()
    trainer = quiet_trainer(with_ravan(bert(32, 2, 16), r=4), arguments, watch, train_dataset=dataset)
    setup_seconds = time.perf_counter() - start
    trainer.train()
    seconds = [record["round_seconds"] for record in trainer.state.log_history if record.get("round")]
    return {
        "clients": num_clients,
        "clients_per_round": clients_per_round,
        "rounds": num_rounds,
        "megabytes_before": before,
        "peak_megabytes": megabytes("VmHWM"),
        "resident_megabytes": watch.resident,
        "setup_seconds": setup_seconds,
        "round_seconds": statistics.median(seconds),
    }


# ---- Bytes -----------------------------------------------------------------------------


def measure_upload(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    dataset = write_dataset(f"{folder}/data", 2, args.tokens)
    arguments = federated_arguments(folder, num_clients=1, num_rounds=1, max_steps=1)
    figures = {}
    configs = {
        "Ravan, 4 heads of rank 16": RavanConfig(task_type="SEQ_CLS", target_modules=TARGETS),
        "Ravan, 4 heads of rank 32": RavanConfig(task_type="SEQ_CLS", target_modules=TARGETS, r=32),
        "LoRA of rank 8": LoraConfig(task_type="SEQ_CLS", target_modules=TARGETS),
    }
    for name, config in configs.items():
        model = get_peft_model(realistic_model(args), config)
        counted = sum(
            parameter.numel()
            for parameter_name, parameter in model.named_parameters()
            if parameter.requires_grad and ".ravan_s." not in parameter_name  # it is sent as part of the product s*H
        )
        trainer = quiet_trainer(model, arguments, train_dataset=dataset)
        trainer.train()
        sent = trainer.state.log_history[0]["upload_bytes"]
        figures[name] = {"parameters": counted, "bytes": sent, "ratio": sent / (4 * counted)}
    return figures


# ---- Table and plot --------------------------------------------------------------------


def in_own_folder(args: argparse.Namespace, function: Callable, *more) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return in_own_process(args.threads, function, args, folder, *more)


def flatness(figures: dict[str, Any]) -> float:
    resident = figures["resident_megabytes"]
    return resident[-1] / resident[len(resident) // 10 - 1]


def summary(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for clock in CLOCKS:
        of_round = figures["round"][clock]
        rows += [
            (f"A round, {clock} time", f"{of_round['seconds']['round']:.2f} s", ""),
            (f"Its bare loops, {clock} time", f"{of_round['seconds']['bare']:.2f} s", ""),
            (f"A round against its bare loops, {clock} time", f"{of_round['ratio']:.3f}", "≤ 1.02"),
        ]
    few, many, crowd = figures["few"], figures["many"], figures["crowd"]
    for run in (few, many):
        rounds = f"round {run['rounds']} against round {run['rounds'] // 10}"
        rows += [
            (f"{run['clients']:,} clients: peak memory", f"{run['peak_megabytes']:.0f} MB", ""),
            (f"{run['clients']:,} clients: memory, {rounds}", f"{flatness(run):.3f}", "≤ 1.02"),
        ]
    ratio = many["peak_megabytes"] / few["peak_megabytes"]
    rows += [
        (f"Peak memory, {many['clients']:,} clients against {few['clients']:,}", f"{ratio:.3f}", "≤ 1.1"),
        (f"{crowd['clients']:,} clients: setting up", f"{crowd['setup_seconds']:.1f} s", "runs"),
        (f"A round of {crowd['clients_per_round']} of them", f"{crowd['round_seconds']:.1f} s", "runs"),
        ("Peak memory with them", f"{crowd['peak_megabytes']:.0f} MB", ""),
    ]
    for name, upload in figures["upload"].items():
        rows.append((f"Upload against its parameters: {name}", f"{upload['ratio']:.4f}", "≤ 1.01"))
    return rows


def overhead(figures: dict[str, Any], args: argparse.Namespace, clock: str = "processor") -> dict[str, float]:
    """Milliseconds per client for each part of a round, and the additional time of its steps over the bare loop."""
    seconds = dict(figures["round"][clock]["seconds"])
    del seconds["round"]
    seconds[MORE] = seconds.pop(STEPS) - seconds.pop("bare")
    return {name: 1e3 * value / args.clients_per_round for name, value in seconds.items()}


def print_table(*rows: tuple[str, ...]) -> None:
    header, *body = rows
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *body]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n", flush=True)


def plot(figures: dict[str, Any], args: argparse.Namespace) -> None:
    from peft_ravan.sharing.plotting import (
        BLUE,
        COLOURS,
        legend_above,
        make_figure,
        save_figure,
        style_curves,
    )

    seconds, parts = figures["round"]["processor"]["seconds"], overhead(figures, args)
    del parts[MORE]  # a small difference of large numbers
    training = seconds["bare"] / args.clients_per_round
    figure = make_figure(11, 3.8, f"{sum(parts.values()):.0f} ms around {training:.1f} s of training, and memory")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    bars = left.barh(list(parts), list(parts.values()), color=BLUE)
    left.bar_label(bars, fmt="%.1f", padding=3)
    left.margins(x=0.15)
    left.invert_yaxis()
    left.set_xlabel("ms of the processor for each client")
    for run, colour in zip((figures["few"], figures["many"]), COLOURS, strict=False):
        resident = run["resident_megabytes"]
        right.plot(range(1, len(resident) + 1), resident, label=f"{run['clients']:,} clients", color=colour)
    most = 1.2 * max(figures["many"]["resident_megabytes"])
    right.set(xlabel="round", xlim=0, ylim=(0, most), ylabel="resident memory, MB")
    style_curves(left)
    left.grid(visible=False, axis="y")  # it would cross out the figures
    style_curves(right)
    legend_above(right)
    save_figure(figure, args.plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="path or name on the Hub; by default one of MiniLM's shape")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an example")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="steps of a client")
    parser.add_argument("--clients-per-round", type=int, default=5, help="clients of the round that is timed")
    parser.add_argument("--rounds", type=int, default=4, help="rounds that are timed")
    parser.add_argument("--clients", type=int, nargs=3, default=[10, 1000, 10000], help="few, many, and a crowd")
    parser.add_argument("--memory-rounds", type=int, default=200)
    parser.add_argument("--examples", type=int, default=20, help="examples of a client in memory measurements")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plot", default=None, help="file for the plot")
    parser.add_argument("--output", default=None, help="file for the results as JSON")
    args = parser.parse_args()

    few, many, crowd = args.clients
    per_round = min(10, few)
    figures = {
        "round": in_own_folder(args, measure_round),
        "few": in_own_folder(args, measure_clients, few, per_round, args.memory_rounds),
        "many": in_own_folder(args, measure_clients, many, per_round, args.memory_rounds),
        "crowd": in_own_folder(args, measure_clients, crowd, min(100, crowd), 2),
        "upload": in_own_folder(args, measure_upload),
    }
    print_table(("What", "Measured", "Reach"), *summary(figures))
    parts = overhead(figures, args)
    print_table(("Part", "ms of the processor for each client"), *((name, f"{ms:.1f}") for name, ms in parts.items()))
    if args.plot:
        plot(figures, args)
    if args.output:
        Path(args.output).write_text(json.dumps({"arguments": vars(args), **figures}, indent=2))


if __name__ == "__main__":
    main()
