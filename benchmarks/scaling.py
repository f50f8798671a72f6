"""
What a round costs a server, for adapters of models with 1B and 8B parameters, and how it grows with the clients.

    python benchmarks/scaling.py bytes         # the messages of a round, computed from shapes
    python benchmarks/scaling.py server        # the time and the memory of the server for the replies of a round
    python benchmarks/scaling.py methods       # the time of a merge at one target, by method
    python benchmarks/scaling.py registered    # what grows with all clients, and not with those of a round

No model is loaded: only the shapes of its layers matter. Times are those of the processor, on one thread by default, and
the least of several runs. Each measurement of memory runs in its own process and reads /proc/self/status on Linux: VmHWM
is the peak of the resident memory, VmRSS its current value.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from own_process import in_own_process, memory_bytes
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_ravan import ravan_config_for_budget
from peft_ravan.merging import MERGE_METHODS, ClientUpdate, merge
from peft_ravan.trainers.compression import ExchangeSettings, compress
from peft_ravan.trainers.exchange import ClientReply, ClientTask, KeptFile
from peft_ravan.trainers.messages import State
from peft_ravan.trainers.quantization import QuantizedTensor, code_dtype, code_sizes
from peft_ravan.trainers.server import MergeSettings, Server, ServerSettings, ServerState
from peft_ravan.trainers.server.checkpoints import STATE_FILE, write_server_state
from peft_ravan.trainers.server.participation import Participation
from peft_ravan.tuner.model import RavanModel


# the sizes in the config.json of each model
MODELS = {
    "Llama-3.2-1B": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "Llama-3.1-8B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
    ),
}
TARGETS = {"q, v": ["q_proj", "v_proj"], "all linear": "all-linear"}
ADAPTERS = {"LoRA": "fedavg", "Ravan": "ravan"}  # with their merge methods
LORA_RANK, NUM_HEADS = 8, 4
NUM_EDGES = 32
UPLOAD_DTYPE, DOWNLOAD_DTYPE = "int4", "float32"
DIGEST = "0123456789abcdef" * 4


# ---- Adapters --------------------------------------------------------------------------


class Adapter(NamedTuple):
    """An adapter of a model."""

    model: str
    targets: str
    kind: str

    def label(self) -> str:
        return f"| {self.model} | {self.targets} | {self.kind} |"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what clients upload, by checkpoint names."""
        sizes, heads = _targets(self.model, self.targets)
        if self.kind == "Ravan":
            return {f"base_model.model.{name}.ravan_H": (NUM_HEADS, r, r) for name, r in heads.items()}
        return {
            f"base_model.model.{name}.lora_{part}.weight": shape
            for name, (d_in, d_out) in sizes.items()
            for part, shape in (("A", (LORA_RANK, d_in)), ("B", (d_out, LORA_RANK)))
        }

    def state(self, device: str = "meta") -> dict[str, torch.Tensor]:
        return {name: torch.ones(shape, device=device) for name, shape in self.shapes().items()}

    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.state().values())


@cache
def _targets(model: str, targets: str) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """The inputs and outputs of each target, and the rank of a head that trains as many parameters as LoRA."""
    with torch.device("meta"):
        base: nn.Module = LlamaForCausalLM(MODELS[model])
    config = ravan_config_for_budget(base, LORA_RANK, NUM_HEADS, target_modules=TARGETS[targets])
    sizes = RavanModel.target_sizes(base, config)
    return sizes, {name: config.size_of(name)[0] for name in sizes}


def all_adapters() -> list[Adapter]:
    return [Adapter(model, targets, kind) for model in MODELS for targets in TARGETS for kind in ADAPTERS]


# ---- Bytes -----------------------------------------------------------------------------


def quantized_shapes(state: State, dtype: str) -> dict[str, QuantizedTensor]:
    """Quantized tensors without values, which are enough for the size of a message."""
    quantized = {}
    for name, tensor in state.items():
        num_codes, num_scales = code_sizes(dtype, tensor.numel())
        codes = torch.empty(num_codes, dtype=code_dtype(dtype), device="meta")
        scales = torch.empty(num_scales, dtype=torch.bfloat16, device="meta")
        quantized[name] = QuantizedTensor(codes, scales, tuple(tensor.shape), dtype)
    return quantized


def message_bytes(adapter: Adapter) -> tuple[int, int]:
    """The bytes of a task and of a reply, as they are on their way."""
    state = adapter.state()
    task = ClientTask(1, "client_1234567", state, seed=2**31, run="2f9c0a7e41d3", upload_dtype=UPLOAD_DTYPE)
    reply = ClientReply.to(
        task,
        update=quantized_shapes(state, UPLOAD_DTYPE),
        num_examples=100,
        train_loss=1.0123456789012345,
        learning_rate=0.001,
        upload_dtype=UPLOAD_DTYPE,
    )
    return task.num_bytes, reply.num_bytes


def bases_bytes(adapter: Adapter) -> int:
    """The bytes of bases that are sent: those made from gradients, in float32."""
    sizes, heads = _targets(adapter.model, adapter.targets)
    return sum(4 * (d_in + d_out) * NUM_HEADS * heads[name] for name, (d_in, d_out) in sizes.items())


def readable(num_bytes: float) -> str:
    """Three digits, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 999.5 or unit == "TB":
            break
        num_bytes /= 1000
    digits = 0 if unit == "B" else max(0, 2 - len(str(int(num_bytes))) + 1)
    return f"{num_bytes:,.{digits}f} {unit}"


def bytes_rows() -> Iterator[list[str]]:
    """What is sent down and up in rounds of 10, 100 and 1,000 clients."""
    for adapter in all_adapters():
        down, up = message_bytes(adapter)
        per_round = [f"{readable(n * down)}, {readable(n * up)}" for n in (10, 100, 1000)]
        yield [*adapter, f"{adapter.num_parameters():,}", readable(down), readable(up), *per_round]


def bases_rows() -> Iterator[list[str]]:
    """Bases made from gradients, which all registered clients download."""
    for adapter in all_adapters():
        if adapter.kind == "Ravan":
            size = bases_bytes(adapter)
            yield [adapter.model, adapter.targets, *(readable(n * size) for n in (1, 1000, 10_000_000))]


def kept_rows() -> Iterator[list[str]]:
    """The updates of a round as whole tensors, which methods that do not stream keep."""
    for adapter in all_adapters():
        yield [*adapter, *(readable(n * 4 * adapter.num_parameters()) for n in (10, 100, 1000))]


def personal_rows() -> Iterator[list[str]]:
    """LoRA's B, which is personal in FedSA-LoRA, and SCAFFOLD's control variates."""
    for adapter in all_adapters():
        if adapter.kind == "LoRA":
            b = 4 * sum(tensor.numel() for name, tensor in adapter.state().items() if ".lora_B." in name)
            sizes = [n * size for size in (b, 4 * adapter.num_parameters()) for n in (1, 10_000_000)]
            yield [adapter.model, adapter.targets, *map(readable, sizes)]


def edges_rows() -> Iterator[list[str]]:
    """What a root sends to and gets from edges, in float32, and what one server exchanges with 1,000 clients."""
    for adapter in all_adapters():
        down, up = message_bytes(adapter)
        rounds = [(NUM_EDGES * down, NUM_EDGES * down), (1000 * down, 1000 * up)]
        yield [*adapter, *(", ".join(map(readable, sizes)) for sizes in rounds)]


COMPUTED = {
    "bytes": bytes_rows,
    "bases": bases_rows,
    "kept": kept_rows,
    "personal": personal_rows,
    "edges": edges_rows,
}


def print_bytes(args: argparse.Namespace) -> None:
    for name, rows in COMPUTED.items():
        print(f"{name}: {rows.__doc__}")
        for row in rows():
            print("| " + " | ".join(row) + " |")


# ---- The server in a round -------------------------------------------------------------


def megabytes(name: str) -> float:
    return memory_bytes(name) / 1e6


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the processor, which do not include other programs on the machine."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def make_server(state: State, method: str, num_clients: int, **settings) -> Server:
    sizes = {f"client_{index}": 100 + index % 50 for index in range(num_clients)}
    exchange = ExchangeSettings(UPLOAD_DTYPE, DOWNLOAD_DTYPE)
    merging = MergeSettings(method)
    return Server(
        ServerSettings(sizes, merging, average_rounds=None, exchange=exchange, **settings), ServerState(state)
    )


def run_rounds(adapter: Adapter, num_clients: int, repeats: int) -> dict[str, float]:
    """Milliseconds for each client, the least of several rounds, and the memory of all rounds."""
    run_tiny_round()
    before = megabytes("VmRSS")
    state = adapter.state("cpu")
    server = make_server(state, ADAPTERS[adapter.kind], num_clients)
    changes = compress(state, UPLOAD_DTYPE, seed=0)
    reply = ClientReply(1, "client_0", update=changes, num_examples=1, upload_dtype=UPLOAD_DTYPE)
    data, seconds = reply.to_bytes(), {"open": [], "read": [], "close": []}
    del reply, changes

    def replies(tasks: list[ClientTask]) -> Iterator[ClientReply]:
        for task in tasks:
            took, read = timed(lambda: ClientReply.from_bytes(data))
            seconds["read"][-1] += took
            yield replace(read, round_number=task.round_number, client=task.client)
            del read

    for round_number in range(1, repeats + 1):
        took, tasks = timed(lambda: server.open(round_number))  # noqa: B023
        seconds["open"].append(took)
        seconds["read"].append(0.0)
        took, _ = timed(lambda: server.close(round_number, replies(tasks)))  # noqa: B023
        seconds["close"].append(took - seconds["read"][-1])
    figures = {name: 1e3 * min(times) / num_clients for name, times in seconds.items()}
    return {**figures, "memory": megabytes("VmHWM") - before, "state": 4 * adapter.num_parameters() / 1e6}


def run_tiny_round() -> None:
    """Whatever is loaded and set up on first use is not part of a measurement."""
    server = make_server({"w": torch.ones(64)}, "fedavg", 2)
    reply = ClientReply(1, "client_0", num_examples=1, upload_dtype=UPLOAD_DTYPE)
    data, tasks = replace(reply, update=compress({"w": torch.ones(64)}, UPLOAD_DTYPE)).to_bytes(), server.open(1)
    reply = ClientReply.from_bytes(data)
    server.close(1, [replace(reply, client=task.client) for task in tasks])


def print_server(args: argparse.Namespace) -> None:
    print("| Model | Targets | Adapter | C | open, ms | read, ms | merge, ms | MB | MB of a state |")
    for adapter in all_adapters():
        if args.models and adapter.model not in args.models:
            continue
        for num_clients in args.clients or [10]:
            figures = in_own_process(args.threads, run_rounds, adapter, num_clients, args.repeats)
            columns = [f"{figures[name]:.3g}" for name in ("open", "read", "close", "memory", "state")]
            print(adapter.label(), num_clients, "|", " | ".join(columns), "|", flush=True)


# ---- Methods ---------------------------------------------------------------------------


def target_updates(shape: tuple[int, ...], num_clients: int) -> Iterator[ClientUpdate]:
    """A part that clients have in common, and one of their own."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(shape, generator=generator)
    for index in range(num_clients):
        core = common + 0.3 * torch.randn(shape, generator=generator)
        yield ClientUpdate({"base_model.model.q.ravan_H": core}, 100 + index % 50, f"client_{index}")


def print_methods(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    shape = next(iter(Adapter("Llama-3.2-1B", "q, v", "Ravan").shapes().values()))
    names = args.methods or [name for name, method in MERGE_METHODS.items() if method.different_heads]
    print(f"seconds for one target of {NUM_HEADS} heads, {tuple(shape)}")
    for num_clients in args.clients or [10, 100, 1000]:
        updates = list(target_updates(shape, num_clients))
        start = {"base_model.model.q.ravan_H": torch.zeros(shape)}
        for name in names:
            repeats = 1 if name == "fedrpca" else args.repeats
            times = [timed(lambda: merge(start, updates, name))[0] for _ in range(repeats)]  # noqa: B023
            print(f"| `{name}` | {num_clients:,} | {min(times):.3g} |", flush=True)


# ---- All clients -----------------------------------------------------------------------


def sample_from(num_clients: int, clients_per_round: int, weights: str | None, repeats: int) -> dict[str, float]:
    before = megabytes("VmRSS")
    sizes = {f"client_{index}": 100 + index % 50 for index in range(num_clients)}
    held = megabytes("VmRSS") - before
    participation = Participation(clients_per_round, weights)
    seconds = min(timed(partial(participation.sample, sizes, round_number))[0] for round_number in range(repeats))
    return {"sizes": held, "seconds": seconds, "peak": megabytes("VmHWM") - before}


def keep_for(num_clients: int) -> dict[str, float]:
    """What the server remembers of the files that clients keep, and a checkpoint with it."""
    before = megabytes("VmRSS")
    kept = {f"client_{index}": KeptFile(1, f"{index:08d}{DIGEST[8:]}") for index in range(num_clients)}
    held = megabytes("VmRSS") - before
    with tempfile.TemporaryDirectory() as folder:
        state = ServerState({"w": torch.zeros(1)}, kept=kept)
        seconds, _ = timed(lambda: write_server_state(Path(folder), state, {}))
        size = (Path(folder) / STATE_FILE).stat().st_size
    return {"kept": held, "seconds": seconds, "file": size / 1e6, "peak": megabytes("VmHWM") - before}


def print_registered(args: argparse.Namespace) -> None:
    print("| clients | a round | weights | MB of sizes | seconds to sample | MB at the peak |")
    for num_clients in args.clients or [10, 1000, 100_000, 10_000_000]:
        for weights in (None, "examples"):
            per_round = min(1000, num_clients // 2)
            repeats = args.repeats if num_clients < 10**6 else 1
            figures = in_own_process(args.threads, sample_from, num_clients, per_round, weights, repeats)
            columns = [f"{figures[name]:.3g}" for name in ("sizes", "seconds", "peak")]
            print(f"| {num_clients:,} | {per_round} | {weights} | " + " | ".join(columns) + " |", flush=True)
    print("| clients | MB of kept | seconds to write | MB of the file | MB at the peak |")
    for num_clients in args.clients or [10, 1000, 100_000, 1_000_000]:
        figures = in_own_process(args.threads, keep_for, num_clients)
        columns = [f"{figures[name]:.3g}" for name in ("kept", "seconds", "file", "peak")]
        print(f"| {num_clients:,} | " + " | ".join(columns) + " |", flush=True)


def main() -> None:
    parts = {"bytes": print_bytes, "server": print_server, "methods": print_methods, "registered": print_registered}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--clients", type=int, nargs="*", default=None)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=None, help="for `server`; by default all")
    parser.add_argument("--methods", nargs="*", default=None, help="for `methods`; by default those for Ravan's heads")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    parts[args.part](args)


if __name__ == "__main__":
    main()
