"""
The cost of robust PCA, compared with `tensorly.decomposition.robust_pca`, on four kinds of matrices: rank 2 with 5 %
of the entries corrupted ("planted"), a common column with noise, heavy-tailed entries, and Gaussian entries.
`tests/merging/test_robust_pca.py` compares the optimum with that of an independent iteration.

tensorly solves `min sum_i reg_J ||J_i||_* + reg_E ||E||_1` with one J_i for each unfolding of a tensor. A matrix has two
unfoldings with the same singular values, so `reg_J = 1/2` and `reg_E = lambda` define the problem that is solved here.
Its penalty starts at 1.25 / ||M||_2, which needs fewer iterations than its default. It gets float32 torch tensors,
since that backend is 2 to 3 times faster than numpy.

Both must reach the same accuracy: an objective that is at most `--tol` above the optimum, for which our certified
lower bound is used. The faster tensorly's penalty grows, the earlier it stops, and the farther from the optimum. It
gets the largest growth of `GROWTHS` with which it reaches the accuracy, and the time is that of this one run. It may
run for `--budget` times our time. If it does not reach the accuracy, the table shows the budget after a `>`, and the
smallest excess that it reached.

An adapter has a matrix for each of its modules, and `fedrpca` solves those of one shape together. Each row is
therefore for a batch, and shows the time per matrix. tensorly handles one matrix at a time and gets the first one.
Memory is the peak of all tensors, including M, relative to the size of M.

    python benchmarks/robust_pca.py --threads 1
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

KINDS = ["planted", "common + noise", "heavy-tailed", "unstructured"]
SHAPES = [(24, 5, 2), (24, 256, 5), (24, 1024, 10), (24, 1024, 50), (4, 12288, 10), (4, 12288, 50)]
# the growth factors of tensorly's penalty, its default first, and the relative residual at which it stops
GROWTHS = [1.1, 1.05, 1.02, 1.01, 1.005, 1.002]
STOP = 3e-7
RANKS = [1, 2, 4, 6, 8, 12, 16, 20]
SHARES = [0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5]


def planted(n: int, C: int, rank: int = 2, share: float = 0.05, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """L of this rank, and L with this share of its entries corrupted."""
    generator = torch.Generator().manual_seed(seed)
    L = torch.randn(n, rank, generator=generator) @ torch.randn(rank, C, generator=generator)
    M = torch.randn(n, C, generator=generator)
    M.mul_(torch.rand(n, C, generator=generator) < share).add_(L)
    return L, M


def of_kind(kind: str, n: int, C: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if kind == "planted":
        return planted(n, C, seed=seed)[1]
    if kind == "common + noise":
        return draw(n, 1) * (1 + 0.3 * draw(1, C)) + 0.5 * draw(n, C)
    if kind == "heavy-tailed":  # Student's t with 2 degrees of freedom
        return draw(n, 1) + draw(n, C) / draw(2, n, C).square().mean(dim=0).sqrt()
    return draw(n, C)


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found - right).norm() / right.norm()).item()


def peak_memory(M: torch.Tensor) -> float:
    """The peak size of all tensors that exist while M is decomposed, including M, relative to the size of M."""
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


def time_ours(M: torch.Tensor, tol: float) -> tuple[float, tuple]:
    """The best of as many runs as fit into a second."""
    seconds, spent = [], 0.0
    while not seconds or (spent < 1 and len(seconds) < 20):
        start = time.perf_counter()
        result = robust_pca(M, tol=tol)
        result[2].gap.tolist()  # waits for the device
        seconds.append(time.perf_counter() - start)
        spent += seconds[-1]
    return min(seconds), result


def objective(L: torch.Tensor, S: torch.Tensor) -> float:
    L, S = L.double(), S.double()
    return (torch.linalg.matrix_norm(L, "nuc") + max(L.shape) ** -0.5 * S.abs().sum()).item()


def time_tensorly(M: torch.Tensor, bound: float, tol: float, budget: float) -> dict:
    """Run tensorly until its objective is at most `tol` above the bound, for about `budget` seconds a run."""
    tensorly.set_backend("pytorch")
    first_penalty = 1.25 / torch.linalg.eigvalsh((M.T @ M).double())[-1].sqrt().item()
    options = {"reg_E": len(M) ** -0.5, "reg_J": 0.5, "mu_init": first_penalty, "verbose": 0}
    options |= {"tol": STOP * M.norm().item(), "return_errors": True}
    start = time.perf_counter()
    tensorly_robust_pca(M, n_iter_max=4, **options)
    affordable = math.ceil(budget / (time.perf_counter() - start) * 4)
    best = math.inf
    for growth in GROWTHS:
        start = time.perf_counter()
        L, _, errors = tensorly_robust_pca(M, n_iter_max=affordable, learning_rate=growth, **options)
        seconds = time.perf_counter() - start
        best = min(best, objective(L, M - L) / bound - 1)
        if best <= tol:
            break
    return {
        "tensorly_reached": best <= tol,
        "tensorly_seconds": seconds if best <= tol else budget,
        "tensorly_iterations": len(errors),
        "tensorly_growth": growth,
        "tensorly_excess": best,
    }


def measure(kind: str, batch: int, n: int, C: int, options: argparse.Namespace) -> dict:
    M = torch.stack([of_kind(kind, n, C, seed) for seed in range(batch)]).to(options.device)
    robust_pca(M[0, :1000], max_iter=3)
    seconds, (L, S, info) = time_ours(M, options.tol)
    row = {
        "kind": kind,
        "batch": batch,
        "n": n,
        "C": C,
        "seconds": seconds / batch,
        "iterations": round(info.iterations.double().mean().item()),
        "gap": info.gap.max().item(),
        "memory": peak_memory(M),
    }
    if tensorly is not None and not options.alone:
        bound = objective(L[0], S[0]) * (1 - info.gap[0].item())
        row.update(time_tensorly(M[0], bound, options.tol, options.budget * row["seconds"]))
        row["ratio"] = row["tensorly_seconds"] / row["seconds"]
    return row


HEADER = (
    "| kind           | batch |       n |   C | seconds | iterations | largest gap | memory | tensorly: seconds | iterations "
    "| growth | excess  |  ratio |\n| :--- |" + " ---: |" * 12
)


def formatted(row: dict) -> str:
    ours = (
        f"| {row['kind']:<14} | {row['batch']:>5} | {row['n']:>7,} | {row['C']:>3} | {row['seconds']:>7.4f} "
        f"| {row['iterations']:>10} | {row['gap']:>11.1e} | {row['memory']:>6.1f} |"
    )
    if "ratio" not in row:
        return ours + " |" * 5
    more = "" if row["tensorly_reached"] else "> "
    return ours + (
        f" {more + format(row['tensorly_seconds'], '.2f'):>17} | {row['tensorly_iterations']:>10} "
        f"| {row['tensorly_growth']:>6} | {row['tensorly_excess']:>7.1e} | {more + format(row['ratio'], '.1f'):>6} |"
    )


def compare(options: argparse.Namespace) -> list[dict]:
    if tensorly is None:
        print("tensorly is not installed (pip install tensorly), so there is nothing to compare with.")
    print(HEADER, flush=True)
    rows = []
    for shape in options.shapes:
        for kind in KINDS:
            rows.append(measure(kind, *shape, options))
            print(formatted(rows[-1]), flush=True)
    return rows


def recovery(n: int, C: int, device: str) -> list[dict]:
    """The error of L by rank and share of corrupted entries, the median over three seeds."""
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


def _shape(text: str) -> tuple[int, ...]:
    batch, n, C = text.split("x")
    return int(batch), int(n), int(C)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument(
        "--shapes", type=_shape, nargs="+", default=SHAPES, metavar="BxNxC", help="matrices x rows x columns"
    )
    parser.add_argument("--tol", type=float, default=1e-6, help="how far the objective may be above the optimum")
    parser.add_argument("--budget", type=float, default=50.0, help="tensorly's time for one run in units of ours")
    parser.add_argument("--alone", action="store_true", help="leave out tensorly")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--recovery", type=Path, metavar="FILE", help="only plot where planted matrices are recovered")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    if options.recovery:
        n, C = 1000, 50
        print("| rank | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |\n|" + " ---: |" * (len(SHARES) + 1))
        rows = recovery(n, C, options.device)
        plot_recovery(rows, f"Recovery of planted {n} x {C} matrices", options.recovery)
    else:
        rows = compare(options)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
