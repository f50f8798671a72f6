"""
The cost of a merge, and how it grows with the number of clients C and the entries n of a head.

The first table is for a Ravan adapter of a model with about a billion parameters: 150 targets with 4 heads of rank 64.
`ravan` is compared with reading the clients' tensors once from memory (their sum, tensor by tensor and as one block),
in the same run. The second table has all methods on one adapter: LoRA of rank 8 on 24 targets, or Ravan with the same
number of parameters.

    python benchmarks/merging.py --plot merging.png
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from peft import LoraConfig

from peft_ravan.merging import MERGE_METHODS, ClientUpdate, merge


def ravan_updates(num_clients: int, num_targets: int, num_heads: int, r: int) -> list[ClientUpdate]:
    generator = torch.Generator().manual_seed(0)
    names = [f"base_model.model.layers.{index}.ravan_H" for index in range(num_targets)]
    # a part that clients have in common, and one of their own: noise alone would be an unusual case for robust PCA
    common = [torch.randn(num_heads, r, r, generator=generator) for _ in names]
    return [
        ClientUpdate(
            {
                name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
                for name, tensor in zip(names, common, strict=True)
            },
            num_examples=100 + client,
            client_id=f"client_{client}",
        )
        for client in range(num_clients)
    ]


def lora_updates(num_clients: int, num_targets: int, width: int, rank: int) -> list[ClientUpdate]:
    generator = torch.Generator().manual_seed(0)
    return [
        ClientUpdate(
            {
                f"base_model.model.layers.{index}.lora_{part}.weight": torch.randn(shape, generator=generator)
                for index in range(num_targets)
                for part, shape in (("A", (rank, width)), ("B", (width, rank)))
            },
            num_examples=100 + client,
            client_id=f"client_{client}",
        )
        for client in range(num_clients)
    ]


def zeros_like(update: ClientUpdate) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in update.state.items()}


def seconds(function: Callable[[], object], repeats: int) -> float:
    """The best of several runs, after a warm-up run."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measure(updates: list[ClientUpdate], repeats: int) -> dict[str, float]:
    global_state = zeros_like(updates[0])
    tensors = [tensor for update in updates for tensor in update.state.values()]
    block = torch.cat([tensor.flatten() for tensor in tensors])
    figures = {
        "megabytes": block.nbytes / 1e6,
        "read_tensors": seconds(lambda: [tensor.sum() for tensor in tensors], repeats),
        "read_block": seconds(block.sum, repeats),
    }
    figures["ravan"] = seconds(lambda: merge(global_state, updates, "ravan"), repeats)
    figures["ravan_from_iterator"] = seconds(lambda: merge(global_state, iter(updates), "ravan"), repeats)
    figures["fedrpca"] = seconds(lambda: merge(global_state, updates, "fedrpca"), 1)
    return figures


def growth(args: argparse.Namespace) -> list[dict[str, float]]:
    points = [(num_clients, args.r) for num_clients in args.clients] + [(args.num_clients, r) for r in args.ranks]
    records = []
    for num_clients, r in sorted(set(points)):
        figures = measure(ravan_updates(num_clients, args.num_targets, args.num_heads, r), args.repeats)
        records.append({"C": num_clients, "r": r, "n": r * r, **figures})
        print_growth(records[-1])
    return records


def print_growth(record: dict[str, float]) -> None:
    milliseconds = [1e3 * record[name] for name in ("read_block", "read_tensors", "ravan", "ravan_from_iterator")]
    ratio = record["ravan"] / record["read_tensors"]
    print(
        f"| {record['C']} | {record['n']:,} | {record['megabytes']:.0f} | "
        + " | ".join(f"{value:.0f}" for value in milliseconds)
        + f" | {ratio:.2f} | {record['ravan'] / record['read_block']:.2f} | {record['fedrpca']:.1f} |",
        flush=True,
    )


def all_methods(args: argparse.Namespace) -> dict[str, float]:
    num_targets, width, rank = 24, 1024, 8
    config = LoraConfig(r=rank, lora_alpha=16)
    lora = lora_updates(10, num_targets, width, rank)
    ravan = ravan_updates(10, num_targets, 1, int((2 * width * rank) ** 0.5))
    times = {}
    for name, method in MERGE_METHODS.items():
        left_out = method.frozen_in(1) + method.personal_parts
        updates = [
            ClientUpdate(
                {key: value for key, value in update.state.items() if not any(part in key for part in left_out)},
                update.num_examples,
                update.client_id,
            )
            for update in (ravan if name in ("ravan", "fed_sb") else lora)
        ]
        global_state = zeros_like(ravan[0] if name in ("ravan", "fed_sb") else lora[0])
        times[name] = seconds(lambda: merge(global_state, updates, name, config=config), 1)  # noqa: B023
        print(f"| `{name}` | {1e3 * times[name]:.0f} |", flush=True)
    return times


def plot(records: list[dict[str, float]], args: argparse.Namespace) -> None:
    from peft_ravan.sharing.plotting import COLOURS, legend_above, make_figure, save_figure, style_curves

    figure = make_figure(9, 3.8, f"Merging {args.num_targets} targets with {args.num_heads} heads")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, fixed, label in (
        (left, "C", {"r": args.r}, f"clients C, for heads of {args.r**2:,} entries"),
        (right, "n", {"C": args.num_clients}, f"entries of a head n, for {args.num_clients} clients"),
    ):
        chosen = [record for record in records if all(record[name] == value for name, value in fixed.items())]
        names = (("fedrpca", "fedrpca"), ("ravan", "ravan"), ("read_tensors", "read once"))
        for (name, title), colour in zip(names, COLOURS, strict=False):
            axes.loglog([r[key] for r in chosen], [r[name] for r in chosen], marker="o", label=title, color=colour)
        axes.set_xticks([record[key] for record in chosen], [f"{record[key]:,}" for record in chosen])
        axes.minorticks_off()
        axes.set_xlabel(label)
        style_curves(axes)
    left.set_ylabel("seconds")
    legend_above(left)
    save_figure(figure, args.plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-targets", type=int, default=150)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--num-clients", type=int, default=50, help="clients while the rank grows")
    parser.add_argument("--r", type=int, default=64, help="rank of a head while the clients grow")
    parser.add_argument("--clients", type=int, nargs="*", default=[5, 10, 20, 50, 100])
    parser.add_argument("--ranks", type=int, nargs="*", default=[16, 32, 64, 128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--plot", default=None, help="file for the plot of the growth")
    parser.add_argument("--output", default=None, help="file for the results as JSON")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    print("| C | n | MB | read block, ms | read tensors, ms | ravan, ms | from an iterator, ms |", end="")
    print(" ravan / tensors | ravan / block | fedrpca, s |\n" + "| ---: " * 10 + "|")
    records = growth(args)
    print("\n| Method | ms |\n| --- | ---: |")
    times = all_methods(args)
    if args.plot:
        plot(records, args)
    if args.output:
        with open(args.output, "w") as file:
            json.dump({"arguments": vars(args), "growth": records, "methods": times}, file, indent=2)


if __name__ == "__main__":
    main()
