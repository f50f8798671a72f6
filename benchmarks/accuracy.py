"""
Accuracy and megabytes of federated methods on real data: one run for each method, seed and learning rate.

An experiment is a YAML file, see `experiments/`. Learning rates are chosen for each method on a validation split of the
training data, with another seed and the same number of trials, and then each method is run with the same draws of clients.
Each run is written down when it has finished and never repeated. One that was killed goes on after its last round. Runs use
a GPU if there is one.

    python benchmarks/accuracy.py benchmarks/experiments/clinc150.yaml --model MODEL --data PATH_OR_HUB_ID --output out
    python benchmarks/accuracy.py benchmarks/experiments/clinc150.yaml --output out --report
    python benchmarks/accuracy.py benchmarks/experiments/clinc150.yaml --model ... --data ... --output out --quick

One of our figures, with the learning rates that we have found:

    python benchmarks/accuracy.py benchmarks/experiments/clinc150.yaml --model ... --data ... --output out \
        --rates benchmarks/results/clinc150.jsonl --methods Ravan --variants "alpha 0.3" --seeds 0
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accuracy_measures import chosen_rates
from accuracy_report import Report
from cells import finished_cells, is_of, run_cells
from experiment import Cell, Experiment, Rates, middle_rates, read_experiment, trial_cells
from gradient_start import adapted
from job_kinds import JOBS
from jobs import Job, client_weights
from transformers import EvalPrediction, PrinterCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from peft_ravan.merging import ClientUpdate
from peft_ravan.trainers import FederatedArguments, client_statistics, make_clients


class Runs:
    """
    The runs of an experiment and their results.

    Args:
        experiment ([`Experiment`]): The experiment.
        make_job (`Callable[[], Job]`): Loads the data and the model. It is called if there is anything to run.
        output (`Path`): The folder of the results.
        known (`list[dict]`, *optional*): Finished runs of somebody else, whose learning rates are used.
    """

    def __init__(
        self, experiment: Experiment, make_job: Callable[[], Job], output: Path, known: Sequence[dict[str, Any]] = ()
    ):
        self.experiment, self.output, self.known = experiment, output, known
        self._make_job, self._job = make_job, None
        self._path = output / "cells.jsonl"
        self.records = finished_cells(self._path)

    def tuned_rates(self, method: str) -> Rates:
        """The learning rates of a method: those that it takes over, those that are known, or those of its own trials."""
        method = self.experiment.methods[method].rates_of or method
        if any(is_of(record, cell) for cell in trial_cells(self.experiment, method) for record in self.known):
            return chosen_rates(self.experiment, self.known, method)
        self.run(trial_cells(self.experiment, method))
        self.run(trial_cells(self.experiment, method, chosen_rates(self.experiment, self.records, method)))
        return chosen_rates(self.experiment, self.records, method)

    def run(self, cells: Iterable[Cell]) -> None:
        """Run the cells that have not finished yet."""
        self.records = run_cells(cells, self._run, self._path, "measured", show)

    def _run(self, cell: Cell) -> dict[str, Any]:
        if self._job is None:
            self._job = self._make_job()
        return run_cell(self.experiment, cell, self._job, self.output / cell.folder())


def show(record: dict[str, Any]) -> str:
    """A line about a cell that has finished."""
    measured = record["measured"]
    return (
        f"{record['purpose']} {record['variant']} {record['method']}, seed {record['seed']}, {record['learning_rate']:g}, "
        f"{record['task_head_learning_rate']}: {100 * measured['last'][-1]:.1f} % in {measured['seconds']:.0f} s"
    )


def run_cell(experiment: Experiment, cell: Cell, job: Job, folder: Path) -> dict[str, Any]:
    """
    Run one cell, or go on with it.

    Args:
        experiment ([`Experiment`]): The experiment.
        cell ([`Cell`]): The cell.
        job ([`Job`]): What is trained.
        folder (`Path`): The folder of its checkpoints, which is removed at the end.

    Returns:
        `dict[str, Any]`: The accuracy of the last state and of the mean of rounds, the accuracy of the worst decile of clients
        and the uploaded megabytes so far, each after the evaluated rounds, and the cosine similarity of the updates of each
        round. With the setting `own_test_data`, also the accuracy of each client at the end, with what it keeps to itself,
        on its own part of the test data, which is split with the same shares.
    """
    given = experiment.settings(cell)
    split = job.split(given["validation"], cell.seed)
    arguments = dict(given["arguments"])
    fault_rate, own_test_data = arguments.pop("fault_rate", 0.0), arguments.pop("own_test_data", False)
    args = FederatedArguments(
        str(folder),
        **arguments,
        learning_rate=cell.learning_rate,
        task_head_learning_rate=cell.task_head_learning_rate,
        seed=cell.seed,
        eval_last=True,
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    clients = make_clients(split.train, args)
    weights = client_weights(clients, split.test)

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        found = job.hits(prediction.predictions, prediction.label_ids, split.test)
        metrics = {"accuracy": float(found.mean())}
        if len(found) < len(split.test):  # those of one client
            return metrics
        return {**metrics, "worst_decile": client_statistics(weights @ found)["worst_decile"]}

    set_seed(cell.seed)
    method = experiment.methods[cell.method]
    trainer = job.trainer_class(
        adapted(
            job.make_model(),
            method.peft_config(experiment.adapter),
            method.gradient_start,
            clients,
            args,
            job.collator,
        ),
        args,
        train_dataset=clients,
        eval_dataset=split.test,
        data_collator=job.collator,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=job.predicted,
        client_fault=lost_uploads(fault_rate, cell.seed),
    )
    trainer.remove_callback(PrinterCallback)
    start_time = time.perf_counter()  # of what is left to do
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    result = evaluations(trainer.state.log_history)
    if own_test_data:
        result["clients"] = trainer.evaluate_clients()["accuracy"].tolist()
    shutil.rmtree(folder)
    return {**result, "seconds": time.perf_counter() - start_time}


def lost_uploads(rate: float, seed: int) -> Callable[[str, int, ClientUpdate], None]:
    """
    Args:
        rate (`float`): The share of uploads that are lost.
        seed (`int`): The seed of which ones.

    Returns:
        `Callable`: A fault for a [`FederatedTrainer`].
    """

    def fault(client: str, round_number: int, update: ClientUpdate) -> None:
        if np.random.default_rng([seed, round_number, *client.encode()]).random() < rate:
            raise ConnectionError("The upload was lost.")

    return fault


def evaluations(history: list[dict[str, Any]]) -> dict[str, list[float]]:
    """What the records of a run say of each evaluation."""
    found: dict[str, list[float]] = {name: [] for name in ("rounds", "last", "mean", "worst_decile", "megabytes")}
    found["update_cosines"] = [record["update_cosine"] for record in history if "update_cosine" in record]
    uploaded = 0
    for record in history:
        uploaded += record.get("upload_bytes", 0)
        if "round" in record and "eval_accuracy" in record:
            found["rounds"].append(record["round"])
            found["mean"].append(record["eval_accuracy"])
            # the result of some methods is the last state
            found["last"].append(record.get("eval_last_accuracy", record["eval_accuracy"]))
            found["worst_decile"].append(record["eval_worst_decile"])
            found["megabytes"].append(uploaded / 1e6)
    return found


def run_all(runs: Runs, methods: Iterable[str], seeds: Iterable[int], variants: Iterable[str]) -> None:
    """Choose the learning rates of the methods, and run them."""
    rates = {name: runs.tuned_rates(name) for name in methods}
    variants = list(variants)
    for seed in seeds:  # a table of one seed is complete first
        for variant in variants:
            for name in rates:
                runs.run([runs.experiment.cell(variant, name, "run", seed, rates[name])])


def quick_cells(experiment: Experiment, methods: Iterable[str]) -> Iterator[Cell]:
    """One seed of each method with the rates in the middle of the grids."""
    for name in methods:
        yield experiment.cell(
            next(iter(experiment.variants)), name, "quick", experiment.seeds[0], middle_rates(experiment, name)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("experiment", type=Path, help="YAML file, see benchmarks/experiments")
    parser.add_argument("--data", help="folder with train.parquet and test.parquet, or Hub id; by default of the file")
    parser.add_argument("--model", help="path or Hub id; by default of the file")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--variants", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    parser.add_argument(
        "--rates", type=Path, help="finished runs, such as results/clinc150.jsonl, whose rates are used"
    )
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, where there is no GPU")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer rounds, and no choice of learning rates")
    parser.add_argument("--report", action="store_true", help="write the tables and plots of the finished runs")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    experiment = read_experiment(options.experiment)

    def make_job() -> Job:
        given = dict(experiment.job)
        places = {"data": options.data, "model": options.model, "folder": options.output / "made"}
        return JOBS[given.pop("kind")](**{**given, **{name: place for name, place in places.items() if place}})

    known = finished_cells(options.rates) if options.rates else ()
    runs = Runs(experiment, make_job, options.output, known)
    methods = options.methods or list(experiment.rows)
    if not options.report:
        if options.quick:
            runs.run(quick_cells(experiment, methods))
        else:
            run_all(runs, methods, options.seeds or experiment.seeds, options.variants or list(experiment.variants))
    purpose = "quick" if options.quick else "run"
    print(Report(experiment, runs.records, purpose, known).write(options.output / options.experiment.stem))


if __name__ == "__main__":
    main()
