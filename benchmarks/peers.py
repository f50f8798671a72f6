"""
The same federation with a FederatedTrainer and with other frameworks: seconds, memory and lines of code.

    python benchmarks/peers.py            # measure what has not been measured yet
    python benchmarks/peers.py --report   # the tables of what was measured so far
    python benchmarks/peers.py --page     # write them into docs/benchmarks.md, from benchmarks/results/peers

20 clients, 5 a round, train LoRA for 10 steps. The jobs are in peer_jobs/. Each framework has an environment of its own, which
is made in `--output`. Each run is written down when it has finished, so the benchmark can be stopped and continued. Checks
are runs of 3 rounds that evaluate the merged adapter after each round, so that one sees that the jobs are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cells import finished_cells, run_cells
from peer_environments import ENVIRONMENTS, make_environment, python_of
from process_tree import ProcessTree
from running_jobs import lines_of_code, new_folder, round_ends

from peft_ravan.trainers.server.participation import Participation


FOLDER = Path(__file__).parent
JOBS = FOLDER / "peer_jobs"
RESULTS = FOLDER / "results" / "peers"
PAGE = FOLDER.parent / "docs" / "benchmarks.md"
SECTION = re.compile(r"<!-- peers -->\n.*?<!-- /peers -->", flags=re.DOTALL)
CLIENTS, CLIENTS_PER_ROUND, SEED = 20, 5, 0  # as in peer_jobs/common.py
MEASURES = "# measures"  # at the end of lines of the jobs that only the benchmark needs
CHECK, TIME = "check", "time"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Way:
    """
    How the job is run.

    Args:
        name (`str`): The name in the tables.
        environment (`str`): One of [`ENVIRONMENTS`].
        job (`str`): The script, in peer_jobs.
        options (`tuple[str, ...]`, *optional*): Arguments of the script after the output folder and the rounds.
        processes (`int`, *optional*, defaults to 1): Processes that torchrun starts.
        rounds (`int`, *optional*): At most how many rounds, for what takes minutes.
    """

    name: str
    environment: str
    job: str
    options: tuple[str, ...] = ()
    processes: int = 1
    rounds: int = 1000

    @property
    def files(self) -> list[Path]:
        """The code of its user."""
        path = JOBS / self.job
        return [path] if path.parent == JOBS else sorted(path.parent.glob("*.py"))


OURS, FLOOR = "FederatedTrainer", "The steps alone"
WAYS = [
    Way(FLOOR, "federated_trainer", "bare_loop.py"),
    Way(OURS, "federated_trainer", "federated_trainer.py"),
    Way(f"{OURS}, 2 processes", "federated_trainer", "federated_trainer.py", processes=2),
    Way("pfl-research", "pfl", "pfl_research.py"),
    Way("pfl-research, 2 processes", "pfl", "pfl_research.py", processes=2),
    Way("Flower, 2 actors", "flower", "flower_simulation.py"),
    Way("Flower, 2 actors that keep the model", "flower", "flower_simulation.py", ("--keep",)),
    Way("NVFlare, 20 threads", "nvflare", "nvflare_simulator/job.py", ("20",), rounds=3),
    Way("NVFlare, 2 threads", "nvflare", "nvflare_simulator/job.py", ("2",), rounds=2),
]
ROUNDS = {"small": 10, "MiniLM": 5}
CHECKED_ROUNDS = 3


@dataclass(frozen=True)
class Cell:
    """A run."""

    model: str
    way: str
    purpose: str
    rounds: int
    repeat: int


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    # alternately, so that other load on the machine affects all alike
    for repeat in range(options.repeats):
        for model in options.models:
            for way in options.ways:
                at_most = next(one for one in WAYS if one.name == way).rounds
                yield Cell(model, way, TIME, min(options.rounds or ROUNDS[model], at_most), repeat)
                if repeat == 0 and options.check and way != FLOOR:
                    yield Cell(model, way, CHECK, min(CHECKED_ROUNDS, at_most), repeat)


def run(cell: Cell, output: Path) -> dict:
    """The seconds from the command until the end of each round, or the losses of a check."""
    load = os.getloadavg()[0]
    way = next(way for way in WAYS if way.name == cell.way)
    folder = new_folder(output)
    python, out = python_of(output / "environments", way.environment), folder / "out"
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={way.processes}"] if way.processes > 1 else []
    command = [python, *launcher, JOBS / way.job, out, str(cell.rounds), *way.options]
    environment = {
        **os.environ,
        **QUIET,
        "PYTHONPATH": os.pathsep.join(map(str, [JOBS, (JOBS / way.job).parent])),
        "PEER_JOBS_FOLDER": str(prepared(output / f"base-{cell.model}", cell.model, python)),
        "FLWR_HOME": str(folder / "flower"),
    }
    if cell.purpose == CHECK:
        environment["PEER_JOBS_CHECK"] = "1"
    tree, log = ProcessTree(), folder / "log.txt"
    with open(log, "w") as file:
        start = partial(
            subprocess.Popen, command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
        try:
            seconds = round_ends(start, out, tree.watch)
        finally:
            tree.stop()
    if len(seconds) < cell.rounds:
        raise SystemExit(log.read_text()[-5000:])
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    sums = [line["sum"] for line in lines if "sum" in line]
    if len(set(sums)) < len(sums):
        raise SystemExit(f"A round has changed nothing.\n{log.read_text()[-5000:]}")
    if cell.purpose == CHECK:
        return {"losses": [line["eval_loss"] for line in lines if line.get("round")]}
    return {
        "load": load,
        "round_ends": seconds[-cell.rounds :],
        "processor_ends": tree.processor_ends[-cell.rounds :],
        "peak_bytes": tree.peak_bytes,
    }


def prepared(folder: Path, model: str, python: Path) -> Path:
    """A folder with the base model and with the clients that a `FederatedTrainer` draws in each round."""
    if not (folder / "draws.json").is_file():
        environment = {**os.environ, "PYTHONPATH": str(JOBS)}
        subprocess.run([python, JOBS / "common.py", model, folder], check=True, env=environment)
        (folder / "draws.json").write_text(json.dumps(draws(max(ROUNDS.values()))))
    return folder


def draws(num_rounds: int) -> list[list[int]]:
    """The clients of each round."""
    sizes = {f"client_{index:02}": 1 for index in range(CLIENTS)}
    participation = Participation(CLIENTS_PER_ROUND, seed=SEED)
    return [
        [int(name.removeprefix("client_")) for name in participation.sample(sizes, number)]
        for number in range(1, num_rounds + 1)
    ]


# ---- Tables ----------------------------------------------------------------------------


def user_lines(way: Way) -> int:
    """Lines of code that a user of a framework writes, without those that only the benchmark needs."""
    return sum(lines_of_code(path, without=MEASURES) for path in way.files if path.name != "notes.py")


def a_round(ends: list[float]) -> float:
    """What a round takes, after the first one."""
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def median(records: Iterable[dict], value: Callable[[dict], float]) -> float:
    return statistics.median(value(record["measured"]) for record in records)


FIGURES: dict[str, Callable[[dict], float]] = {
    "First round ends after, s": lambda found: found["round_ends"][0],
    "A round, s": lambda found: a_round(found["round_ends"]),
    "Clients a second": lambda found: CLIENTS_PER_ROUND / a_round(found["round_ends"]),
    "Processor time until then, s": lambda found: found["processor_ends"][0],
    "of a round, s": lambda found: a_round(found["processor_ends"]),
    "Peak memory, MB": lambda found: found["peak_bytes"] / 1e6,
}


def tables(records: list[dict], environments: dict[str, dict]) -> Iterator[str]:
    timed = [record for record in records if record["purpose"] == TIME]
    for model in ROUNDS:
        found = {way.name: records_of(timed, model, way.name) for way in WAYS}
        yield f"**{'A small model' if model == 'small' else 'The shape of MiniLM'}**"
        yield ""
        yield f"| How | {' | '.join(FIGURES)} | Lines of code | Rounds of each run | Load |"
        yield f"|---|{'---:|' * (len(FIGURES) + 3)}"
        for way in WAYS:
            error = environments.get(way.environment, {}).get("error")
            if error:
                yield f"| {way.name} | not installed: {error} |" + " |" * (len(FIGURES) + 2)
                continue
            if runs := found[way.name]:
                values = [
                    f"{median(runs, value):,.{0 if name.endswith('MB') else 2}f}" for name, value in FIGURES.items()
                ]
                loads = [record["measured"]["load"] for record in runs]
                rounds = ", ".join(str(record["rounds"]) for record in runs)
                more = [str(user_lines(way)), rounds, f"{min(loads):.1f} to {max(loads):.1f}"]
                yield f"| {way.name} | {' | '.join(values + more)} |"
            else:
                yield f"| {way.name} | not measured |" + " |" * (len(FIGURES) + 2)
        yield ""
    yield from comparison(timed)
    yield ""
    yield from losses([record for record in records if record["purpose"] == CHECK])
    yield ""
    yield "Versions: " + "; ".join(described(name, found) for name, found in environments.items()) + "."


def records_of(records: list[dict], model: str, way: str) -> list[dict]:
    return [record for record in records if (record["model"], record["way"]) == (model, way)]


RATIOS = {
    "first round sooner by": "First round ends after, s",
    "clients a second": "A round, s",
    "first round, processor time": "Processor time until then, s",
    "clients a second of processor time": "of a round, s",
}


def comparison(timed: list[dict]) -> Iterator[str]:
    """How many times as fast a FederatedTrainer is, each framework at its best."""
    yield f"| Model | Framework | {OURS}: {' | '.join(RATIOS)} |"
    yield f"|---|---|{'---:|' * len(RATIOS)}"
    figures = [FIGURES[name] for name in RATIOS.values()]
    for model in ROUNDS:
        best = {}
        for environment in ENVIRONMENTS:
            names = [way.name for way in WAYS if way.environment == environment and way.name != FLOOR]
            runs = [found for name in names if (found := records_of(timed, model, name))]
            if runs:
                best[environment] = [min(median(found, figure) for found in runs) for figure in figures]
        own = best.pop("federated_trainer", None)
        for environment, values in best.items() if own else ():
            ratios = [f"{value / own_value:.1f} ×" for value, own_value in zip(values, own, strict=True)]
            yield f"| {model} | {ENVIRONMENTS[environment].distribution} | {' | '.join(ratios)} |"


def losses(checked: list[dict]) -> Iterator[str]:
    yield "| Model | How | Loss after round 1 | 2 | 3 |"
    yield "|---|---|---:|---:|---:|"
    for record in sorted(checked, key=lambda record: list(ROUNDS).index(record["model"])):
        values = [f"{loss:.3f}" for loss in record["measured"]["losses"]]
        values += ["–"] * (CHECKED_ROUNDS - len(values))
        yield f"| {record['model']} | {record['way']} | {' | '.join(values)} |"


def described(name: str, environment: dict) -> str:
    if "error" in environment:
        return f"{ENVIRONMENTS[name].distribution} not installed"
    return ", ".join(f"{package} {version}" for package, version in environment["versions"].items())


def with_tables(page: str) -> str:
    """
    Args:
        page (`str`): The text of docs/benchmarks.md.

    Returns:
        `str`: The same text with the tables of benchmarks/results/peers.
    """
    environments = json.loads((RESULTS / "environments.json").read_text())
    found = "\n".join(tables(finished_cells(RESULTS / "runs.jsonl"), environments))
    return SECTION.sub(lambda _: f"<!-- peers -->\n\n{found}\n\n<!-- /peers -->", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/peers"), help="folder of environments and results"
    )
    parser.add_argument("--report", action="store_true", help="print the tables, and measure nothing")
    parser.add_argument("--page", action="store_true", help="write the tables into the docs, and measure nothing")
    names = [way.name for way in WAYS]
    parser.add_argument("--ways", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--models", nargs="+", choices=ROUNDS, default=list(ROUNDS))
    parser.add_argument(
        "--rounds", type=int, default=None, help="by default 10 for the small model, and 5 for the other"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-check", dest="check", action="store_false", help="leave out the checks")
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(with_tables(PAGE.read_text()))
        return
    output = options.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    runs, made = output / "runs.jsonl", output / "environments.json"
    if not options.report:
        environments = {name: make_environment(output / "environments", name) for name in ENVIRONMENTS}
        made.write_text(json.dumps(environments, indent=1) + "\n")
        installed = {way.name for way in WAYS if "versions" in environments[way.environment]}
        options.ways = [name for name in options.ways if name in installed]
        run_cells(cells(options), lambda cell: run(cell, output), runs, "measured")
    print("\n".join(tables(finished_cells(runs), json.loads(made.read_text()))))
    print(f"\n{platform.platform()}, {os.cpu_count()} CPUs")


if __name__ == "__main__":
    main()
