"""
What Flower costs: bytes on the wire, seconds of a round over loopback, and a federation against Flower's simulation.

    python benchmarks/flower.py loopback      # 4 rounds of 2 nodes: bytes and seconds, against the same in one process
    python benchmarks/flower.py simulation    # LoRA with FedAvg by hand in Flower's simulation, against a FederatedTrainer
    python benchmarks/flower.py --report      # the tables of what was measured so far

Each measurement is written down when it has finished, with the load of the machine before it, so the benchmark can be
stopped and continued. `loopback` needs `peft-ravan[flower]`, and `simulation` needs `peft-ravan[flower-simulation]`. The
apps are in flower_jobs/.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cells import finished_cells, run_cells
from own_process import in_own_process
from running_jobs import RUN_SECONDS, lines_of_code, new_folder, round_ends
from transformers import set_seed

from peft_ravan.trainers import FederatedTrainer, read_history
from peft_ravan.trainers.demo.loopback import BIN, Loopback, Simulation, ended_by_signals


JOBS = Path(__file__).parent / "flower_jobs"
PAYLOAD = JOBS / "payload"

# the rank of LoRA for each size of an upload: twelve matrices A and B take 98,304 bytes for a rank
RANKS = {"0.1 MB": 1, "10 MB": 102, "100 MB": 1017}
OVER_LOOPBACK, ALONE = "over Flower", "one process"


# ---- Loopback --------------------------------------------------------------------------


@dataclass(frozen=True)
class LoopbackCell:
    """Rounds with uploads of one size."""

    size: str
    how: str
    rounds: int
    repeat: int


def run_loopback(cell: LoopbackCell, folder: Path) -> dict[str, Any]:
    load = os.getloadavg()[0]
    run_folder = new_folder(folder)
    out, environment = run_folder / "out", {"PAYLOAD_RANK": str(RANKS[cell.size])}
    measured: dict[str, Any] = {"load": load}
    if cell.how == ALONE:
        in_own_process(1, run_payload_alone, environment, str(out), cell.rounds)
    else:
        with Loopback(run_folder / "flower", 2, environment) as loopback:
            loopback.start_run(PAYLOAD, output_dir=str(out), num_rounds=cell.rounds).wait(RUN_SECONDS)
            measured["traffic"] = traffic(loopback)
            if not (out / "adapter_model.safetensors").exists():
                raise SystemExit(loopback.logs())
    history = read_history(out)
    for name in ("upload_bytes", "download_bytes", "round_seconds"):
        measured[name] = [record[name] for record in history]
    return measured


def run_payload_alone(environment: dict[str, str], output_dir: str, num_rounds: int) -> None:
    """The job of the nodes in this process."""
    os.environ.update(environment)
    job = runpy.run_path(str(PAYLOAD / "payload.py"))
    args = job["arguments"]({"output-dir": output_dir, "num-rounds": num_rounds})
    set_seed(args.seed)
    clients = {f"client_{index}": job["load_part"](index) for index in range(job["CLIENTS"])}
    FederatedTrainer(job["load_model"](), args, train_dataset=clients).train()


def traffic(loopback: Loopback) -> dict[str, int]:
    """The bytes of the only run by Flower's own count: from nodes to the SuperLink, and the other way."""
    command = [BIN / "flwr", "ls", "here", "--format", "json"]
    listed = subprocess.run(command, env=loopback.environment, capture_output=True, text=True, check=True).stdout
    [run] = json.loads(listed)["runs"]
    return {"up": run["network-traffic"]["inbound-bytes"], "down": run["network-traffic"]["outbound-bytes"]}


# ---- Simulation ------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A way to run the same job, in a number of processes that train clients, with some threads each."""

    name: str
    job: str  # what the user writes, in flower_jobs
    processes: int
    threads: int


@dataclass(frozen=True)
class SimulationCell:
    """Rounds of a federation with one model."""

    model: str
    way: str
    rounds: int
    repeat: int


TRAINER_JOB, HAND_JOB, APPS_JOB = "federated_trainer.py", "by_hand/by_hand.py", "apps/apps.py"
WAYS = [
    Way(f"{name}, {processes} x {threads}", job, processes, threads)
    for name, job in {
        "FederatedTrainer": TRAINER_JOB,
        "Flower, by hand": HAND_JOB,
        "Flower, our apps": APPS_JOB,
    }.items()
    for processes, threads in ((1, 2), (2, 1))
]
ROUNDS = {"small": 20, "MiniLM": 4}


def run_simulation(cell: SimulationCell, folder: Path) -> dict[str, Any]:
    """The seconds from the command until the end of each round."""
    load = os.getloadavg()[0]
    way = next(way for way in WAYS if way.name == cell.way)
    base = folder.absolute() / f"base {cell.model}"
    if not (base / "model.safetensors").exists():
        in_own_process(1, save_base_model, cell.model, str(base))
    run_folder = new_folder(folder)
    out = run_folder / "out"
    environment = {
        "FLOWER_JOBS_BASE": str(base),
        "OMP_NUM_THREADS": str(way.threads),
        "PYTHONPATH": os.pathsep.join([str(JOBS), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    if way.job == TRAINER_JOB:
        seconds = run_trainer(way, out, cell.rounds, environment)
    else:
        with Simulation(
            run_folder / "flower", jobs_module("texts")["CLIENTS"], environment, way.threads
        ) as simulation:
            start = partial(simulation.start_run, (JOBS / way.job).parent, output_dir=str(out), num_rounds=cell.rounds)
            seconds = round_ends(start, out)
            logs = simulation.logs()
        if len(seconds) < cell.rounds:
            raise SystemExit(logs)
    return {"load": load, "round_ends": seconds[-cell.rounds :]}


def run_trainer(way: Way, out: Path, num_rounds: int, environment: dict[str, str]) -> list[float]:
    launcher = ["torch.distributed.run", f"--nproc_per_node={way.processes}"] if way.processes > 1 else []
    module = ["-m", *launcher] if launcher else []
    command = [sys.executable, *module, str(JOBS / way.job), str(out), str(num_rounds)]
    log_path = out.parent / "log.txt"
    with open(log_path, "w") as log:
        start = partial(subprocess.Popen, command, env={**os.environ, **environment}, stdout=log, stderr=log)
        seconds = round_ends(start, out)
    if len(seconds) < num_rounds:
        raise SystemExit(log_path.read_text())
    return seconds


def jobs_module(name: str) -> dict[str, Any]:
    return runpy.run_path(str(JOBS / f"{name}.py"))


def save_base_model(size: str, folder: str) -> None:
    jobs_module("texts")["save_base_model"](size, Path(folder))


# ---- Tables ----------------------------------------------------------------------------


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def spread(values: Iterable[float], digits: int = 2) -> str:
    """A mean, and the values if there are several."""
    values = list(values)
    each = f" ({', '.join(f'{value:.{digits}f}' for value in values)})" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{each}"


def loads(records: list[dict]) -> str:
    found = [record["measured"]["load"] for record in records]
    return f"{min(found):.1f} to {max(found):.1f}"


def loopback_tables(records: list[dict]) -> Iterator[str]:
    yield "| An upload | Sent up, counted here | by Flower | Ratio | Sent down, counted here | by Flower | Ratio |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for size in RANKS:
        found = [record["measured"] for record in records if (record["size"], record["how"]) == (size, OVER_LOOPBACK)]
        if found:
            cells = []
            for key, name in (("up", "upload_bytes"), ("down", "download_bytes")):
                own, flower = mean(sum(one[name]) for one in found), mean(one["traffic"][key] for one in found)
                cells += [f"{own / 1e6:,.3f} MB", f"{flower / 1e6:,.3f} MB", f"{flower / own:.3f}"]
            yield f"| {size} | {' | '.join(cells)} |"
    yield ""
    yield "| An upload | A round in one process, s | over Flower, s | Runs | Load |"
    yield "|---|---:|---:|---:|---:|"
    for size in RANKS:
        of_size = [record for record in records if record["size"] == size]
        by_way = {how: [record for record in of_size if record["how"] == how] for how in (ALONE, OVER_LOOPBACK)}
        if all(by_way.values()):
            seconds = [
                spread((statistics.median(record["measured"]["round_seconds"]) for record in found), 2)
                for found in by_way.values()
            ]
            yield f"| {size} | {' | '.join(seconds)} | {len(by_way[ALONE])} | {loads(of_size)} |"


def seconds_a_round(record: dict) -> float:
    """Of the rounds after the first one."""
    ends = record["measured"]["round_ends"]
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def simulation_tables(records: list[dict]) -> Iterator[str]:
    yield "| Model | How, processes x threads | A round, s | First round ends after, s | Lines of code | Load |"
    yield "|---|---|---:|---:|---:|---:|"
    fastest: dict[tuple[str, str], float] = {}
    for model in ROUNDS:
        for way in WAYS:
            found = [record for record in records if (record["model"], record["way"]) == (model, way.name)]
            if found:
                seconds = [seconds_a_round(record) for record in found]
                first = [record["measured"]["round_ends"][0] for record in found]
                lines = lines_of_code(JOBS / way.job)
                cells = [way.name, spread(seconds), spread(first, 0), str(lines), loads(found)]
                yield f"| {model} | {' | '.join(cells)} |"
                fastest[model, way.job] = min(mean(seconds), fastest.get((model, way.job), float("inf")))
    yield ""
    yield "| Model | FederatedTrainer against Flower by hand, each at its best | and against our apps |"
    yield "|---|---:|---:|"
    for model in ROUNDS:
        jobs = [fastest.get((model, job)) for job in (TRAINER_JOB, HAND_JOB, APPS_JOB)]
        if all(jobs):
            trainer, hand, apps = jobs
            yield f"| {model} | {hand / trainer:.2f} x as fast | {apps / trainer:.2f} x as fast |"


PARTS = {"loopback": (run_loopback, loopback_tables), "simulation": (run_simulation, simulation_tables)}


def cells(part: str, options: argparse.Namespace) -> Iterator[LoopbackCell | SimulationCell]:
    # alternately, so that other load on the machine affects all alike
    for repeat in range(options.repeats):
        if part == "loopback":
            for size in options.sizes:
                for how in (ALONE, OVER_LOOPBACK):
                    yield LoopbackCell(size, how, options.rounds or 4, repeat)
        else:
            for model in options.models:
                for way in WAYS:
                    yield SimulationCell(model, way.name, options.rounds or ROUNDS[model], repeat)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS, nargs="?", help="what is measured")
    parser.add_argument("--output", type=Path, default=Path("outputs/flower-benchmark"), help="folder for the results")
    parser.add_argument("--report", action="store_true", help="print the tables, and measure nothing")
    parser.add_argument("--sizes", nargs="+", choices=RANKS, default=list(RANKS), help="of uploads, for `loopback`")
    parser.add_argument("--models", nargs="+", choices=ROUNDS, default=list(ROUNDS), help="for `simulation`")
    parser.add_argument("--rounds", type=int, default=None, help="by default 4, and 20 for the small model")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    if options.part is None and not options.report:
        parser.error("say what to measure, or --report")
    options.output.mkdir(parents=True, exist_ok=True)
    for part in [options.part] if options.part else PARTS:
        run, tables = PARTS[part]
        path = options.output / f"{part}.jsonl"
        if options.report:
            records = finished_cells(path)
        else:
            with ended_by_signals():
                records = run_cells(
                    cells(part, options),
                    lambda cell, run=run: run(cell, options.output),
                    path,
                    "measured",
                )
        print("\n" + "\n".join(tables(records)))


if __name__ == "__main__":
    main()
