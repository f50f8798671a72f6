"""
What robust PCA costs, against `tensorly.decomposition.robust_pca`, on planted matrices: rank 2, 5 % of entries hit.

tensorly solves `min sum_i reg_J ||J_i||_* + reg_E ||E||_1` with one J_i for each unfolding of a tensor. A matrix has two
unfoldings, with the same singular values, so `reg_J = 1/2` and `reg_E = lambda` state the problem that is solved here.
Its penalty starts where ours does, which spares it iterations against its default, and grows by its default of 1.1. It
gets float32 torch tensors: that backend is its faster one, by 2 to 3 times against numpy.

The goal of both is the residual `||M - L - S||_F` that ours ends with. tensorly gives its own for every iteration; that
its J_i agree with L is not asked of it. It may run for `--budget` times our time. Then the table has its time to the goal
or, if it has not come there, the budget after a `>` and the residual it had. Memory is the peak of all tensors, with M,
over the size of M.

    python benchmarks/robust_pca.py --max-entries 50_000_000 --plot robust_pca.png
    python benchmarks/robust_pca.py --recovery recovery.png
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from peft_ravan.merging import robust_pca


try:
    import tensorly
    from tensorly.decomposition import robust_pca as tensorly_robust_pca
except ImportError:
    tensorly = None

RANKS = [1, 2, 4, 6, 8, 12, 16, 20]
SHARES = [0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5]


def planted(n: int, C: int, rank: int = 2, share: float = 0.05, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """L of this rank, and L with this share of its entries hit."""
    generator = torch.Generator().manual_seed(seed)
    L = torch.randn(n, rank, generator=generator) @ torch.randn(rank, C, generator=generator)
    M = torch.randn(n, C, generator=generator)
    M.mul_(torch.rand(n, C, generator=generator) < share).add_(L)
    return L, M


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found - right).norm() / right.norm()).item()


def peak_memory(M: torch.Tensor) -> float:
    """The largest sum of the tensors that exist while M is decomposed, M among them, over the size of M."""
    if M.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        robust_pca(M, max_iter=3)
        return 1 + (torch.cuda.max_memory_allocated() - before) / M.nbytes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        robust_pca(M, max_iter=3)  # all iterations allocate the same
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return 1 + allocated.cumsum(0).max().item() / M.nbytes


def time_ours(M: torch.Tensor) -> tuple[float, tuple]:
    """The best of some runs, as many as fit into a second."""
    seconds, spent = [], 0.0
    while not seconds or (spent < 1 and len(seconds) < 20):
        start = time.perf_counter()
        result = robust_pca(M)
        result[2].residual.tolist()  # waits for the device
        seconds.append(time.perf_counter() - start)
        spent += seconds[-1]
    return min(seconds), result


def time_tensorly(M: torch.Tensor, goal: float, budget: float, options: argparse.Namespace) -> dict:
    """Run tensorly for about `budget` seconds. `goal` is relative to the norm of M."""
    tensorly.set_backend("pytorch")
    arguments = {
        "reg_E": len(M) ** -0.5,
        "reg_J": 0.5,
        "mu_init": 1.25 / torch.linalg.eigvalsh((M.T @ M).double())[-1].sqrt().item(),
        "learning_rate": options.tensorly_growth,
        "tol": goal * M.norm().item(),
        "return_errors": True,
        "verbose": 0,
    }
    tensorly_robust_pca(M[:1000], n_iter_max=2, **arguments)
    max_iter, seconds, reached = 2, 0.0, None
    while reached is None and seconds < budget:
        # enough iterations for the budget, by the time of the last attempt
        max_iter = max_iter if seconds == 0 else math.ceil(1.1 * max_iter * budget / seconds)
        start = time.perf_counter()
        L, _, residuals = tensorly_robust_pca(M, n_iter_max=max_iter, **arguments)
        seconds = time.perf_counter() - start
        residuals = [residual.item() / M.norm().item() for residual in residuals]
        reached = next((index + 1 for index, residual in enumerate(residuals) if residual <= goal), None)
    return {
        "tensorly_reached": reached is not None,
        "tensorly_seconds": seconds * (reached or len(residuals)) / len(residuals),
        "tensorly_iterations": reached or len(residuals),
        "tensorly_residual": residuals[(reached or 0) - 1],
        "tensorly_L": L,
    }


def measure(n: int, C: int, options: argparse.Namespace) -> dict:
    L, M = planted(n, C)
    L, M = L.to(options.device), M.to(options.device)
    robust_pca(M[:1000], max_iter=3)
    seconds, (found_L, _, info) = time_ours(M)
    row = {
        "n": n,
        "C": C,
        "seconds": seconds,
        "iterations": info.iterations.item(),
        "residual": info.residual.item(),
        "error": error(found_L, L),
    }
    del found_L
    row["memory"] = peak_memory(M)
    if tensorly is not None and not options.alone:
        row.update(time_tensorly(M, row["residual"], options.budget * seconds, options))
        row["tensorly_error"] = error(row.pop("tensorly_L"), L)
        row["ratio"] = row["tensorly_seconds"] / seconds
    return row


HEADER = (
    "|        n |   C | seconds | iterations | residual | error of L | memory | tensorly: seconds | iterations | residual "
    "| error of L |  ratio |\n|" + " ---: |" * 12
)


def formatted(row: dict) -> str:
    ours = (
        f"| {row['n']:>8,} | {row['C']:>3} | {row['seconds']:>7.3f} | {row['iterations']:>10} | {row['residual']:>8.1e} "
        f"| {row['error']:>10.1e} | {row['memory']:>6.2f} |"
    )
    if "ratio" not in row:
        return ours + " |" * 5
    more = "" if row["tensorly_reached"] else "> "
    return ours + (
        f" {more + format(row['tensorly_seconds'], '.2f'):>17} | {row['tensorly_iterations']:>10} "
        f"| {row['tensorly_residual']:>8.1e} | {row['tensorly_error']:>10.1e} | {more + format(row['ratio'], '.1f'):>6} |"
    )


def compare(options: argparse.Namespace) -> list[dict]:
    if tensorly is None:
        print("tensorly is not installed (pip install tensorly), so there is nothing to compare with.")
    print(HEADER, flush=True)
    rows = []
    for C in options.C:
        for n in options.n:
            if n * C <= options.max_entries:
                rows.append(measure(n, C, options))
                print(formatted(rows[-1]), flush=True)
    return rows


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5))
    for index, C in enumerate(sorted({row["C"] for row in rows})):
        some = [row for row in rows if row["C"] == C]
        n = [row["n"] for row in some]
        axes.loglog(n, [row["seconds"] for row in some], "o-", color=f"C{index}", label=f"peft-ravan, C = {C}")
        if "ratio" in some[0]:
            seconds = [row["tensorly_seconds"] for row in some]
            axes.loglog(n, seconds, "s--", color=f"C{index}", label=f"tensorly, C = {C}")
            for row in some:
                if not row["tensorly_reached"]:
                    axes.annotate("not there yet", (row["n"], row["tensorly_seconds"]), fontsize=7)
    axes.set(xlabel="n", ylabel="seconds", title="Robust PCA to the same residual")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def recovery(n: int, C: int, device: str) -> list[dict]:
    """The error of L over rank and share of entries hit, the middle one of three seeds."""
    rows = []
    for rank in RANKS:
        for share in SHARES:
            pairs = [planted(n, C, rank, share, seed) for seed in range(3)]
            found, _, info = robust_pca(torch.stack([M for _, M in pairs]).to(device))
            errors = [error(found[index].cpu(), L) for index, (L, _) in enumerate(pairs)]
            rows.append({"rank": rank, "share": share, "error": sorted(errors)[1], "all_errors": errors})
        print(f"| {rank:4} | " + " | ".join(f"{row['error']:.0e}" for row in rows[-len(SHARES) :]) + " |", flush=True)
    return rows


def plot_recovery(rows: list[dict], title: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    errors = torch.tensor([row["error"] for row in rows]).reshape(len(RANKS), len(SHARES))
    figure, axes = plt.subplots(figsize=(7, 5))
    image = axes.imshow(errors.log10(), origin="lower", aspect="auto", vmin=-7, vmax=0, cmap="viridis_r")
    axes.set(xlabel="share of entries hit", ylabel="rank", title=title)
    axes.set_xticks(range(len(SHARES)), SHARES)
    axes.set_yticks(range(len(RANKS)), RANKS)
    figure.colorbar(image, label="log10 of the error of L")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000], help="rows")
    parser.add_argument("--C", type=int, nargs="+", default=[10, 50, 200], help="columns")
    parser.add_argument("--max-entries", type=int, default=200_000_000, help="leave out matrices with more entries")
    parser.add_argument("--budget", type=float, default=10.0, help="tensorly's time in units of ours")
    parser.add_argument("--tensorly-growth", type=float, default=1.1, help="by what its penalty grows")
    parser.add_argument("--alone", action="store_true", help="leave out tensorly")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time against n")
    parser.add_argument("--recovery", type=Path, metavar="FILE", help="only draw where planted matrices are recovered")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    if options.recovery:
        n, C = 1000, 50
        print("| rank | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |\n|" + " ---: |" * (len(SHARES) + 1))
        rows = recovery(n, C, options.device)
        plot_recovery(rows, f"Recovery of planted {n} x {C} matrices", options.recovery)
    else:
        rows = compare(options)
        if options.plot:
            plot(rows, options.plot)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
