"""Experiments on accuracy as YAML files: which methods, on which data, with which seeds and learning rates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING


# what an experiment can change of its base one by one
SETTINGS = ("job", "federation", "adapter", "trials", "quick")


@dataclass(frozen=True)
class Method:
    """
    One row of a table.

    Args:
        name (`str`): Its name.
        adapter (`dict`): `peft_type` and the fields of its configuration.
        arguments (`dict`): Arguments of the federation that belong to the method, such as `merge_method`.
        rates_of (`str`, *optional*): The method whose learning rates it takes over. By default its own are chosen.
        rate_factor (`float`): The factor of the grid of the adapter's learning rates, for adapters of another scale.
        gradient_start (`dict`, *optional*): How many `clients` show the gradients of how many `batches` before LoRA-GA starts.
    """

    name: str
    adapter: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    rates_of: str | None = None
    rate_factor: float = 1.0
    gradient_start: Mapping[str, int] | None = None

    def peft_config(self, common: Mapping[str, Any]) -> PeftConfig:
        options = {**common, **self.adapter}
        return PEFT_TYPE_TO_CONFIG_MAPPING[options.pop("peft_type")](**options)


@dataclass(frozen=True)
class Trials:
    """
    How learning rates are chosen: first the one of the adapter, with the middle one of the task head, and then the one of
    the task head. All methods have the same trials.

    Args:
        learning_rates (`list[float]`): The grid for the adapter.
        task_head_learning_rates (`list[float]`): The grid for the task head. Empty: it has the rate of the adapter.
        num_rounds (`int`): The rounds of a trial.
        seed (`int`): The seed of the trials, which no other run has.
        validation_share (`float`): The share of the training data that trials are evaluated on and do not train on.
    """

    learning_rates: Sequence[float]
    task_head_learning_rates: Sequence[float] = ()
    num_rounds: int = 15
    seed: int = 1000
    validation_share: float = 0.1


@dataclass(frozen=True)
class Rates:
    """The learning rates of a run."""

    adapter: float
    task_head: float | None = None


@dataclass(frozen=True)
class Experiment:
    """
    An experiment.

    Args:
        title (`str`): What the table is called.
        job (`dict`): `kind`, see `job_kinds.py`, and the arguments of the job.
        federation (`dict`): The arguments of all runs.
        adapter (`dict`): The fields that all adapters have in common.
        methods (`dict[str, Method]`): The methods, with those of the `base`.
        rows (`list[str]`, *optional*): The methods that are run. By default all.
        trials ([`Trials`]): How learning rates are chosen.
        variants (`dict[str, dict]`): Arguments of the federation by the name of the variant. Learning rates are chosen in the
            first one, and used in all.
        seeds (`list[int]`): The seeds of the runs.
        reference (`str`): The method whose accuracy the others have to reach.
        last_evaluations (`int`): How many of the last evaluations an accuracy is averaged over.
        quick (`dict`): Arguments of the federation with `--quick`.
        compared_variants (`dict[str, str]`): If variants are what is compared, how they are called in the table and the plot
            that they share, in this order. By default each has a table and a plot of its own.
    """

    title: str
    job: Mapping[str, Any]
    federation: Mapping[str, Any]
    adapter: Mapping[str, Any]
    methods: Mapping[str, Method]
    trials: Trials
    variants: Mapping[str, Mapping[str, Any]]
    rows: Sequence[str] = ()
    seeds: Sequence[int] = (0, 1, 2)
    reference: str = "LoRA, FedAvg"
    last_evaluations: int = 5
    quick: Mapping[str, Any] = field(default_factory=dict)
    compared_variants: Mapping[str, str] = field(default_factory=dict)

    def settings(self, cell: Cell) -> dict[str, Any]:
        """All that the result of a cell depends on, except for what is in the cell, and for the place of the data."""
        method = self.methods[cell.method]
        arguments = {**self.federation, **self.variants[cell.variant], **method.arguments}
        if cell.purpose == "trial":
            arguments["num_rounds"] = self.trials.num_rounds
        if cell.purpose == "quick":
            arguments.update(self.quick)
        share = self.trials.validation_share if cell.purpose == "trial" else None
        found = {
            "job": dict(self.job),
            "adapter": {**self.adapter, **method.adapter},
            "arguments": arguments,
            "validation": share,
        }
        return found if method.gradient_start is None else {**found, "gradient_start": method.gradient_start}

    def learning_rates(self, method: str) -> list[float]:
        """The grid of the learning rates of a method's adapter, from low to high."""
        factor = self.methods[method].rate_factor
        return sorted(factor * rate for rate in self.trials.learning_rates)

    def evaluations(self, record: Mapping[str, Any]) -> int:
        """
        Args:
            record (`dict`): The result of a cell.

        Returns:
            `int`: Over how many of its last evaluations its accuracy is averaged: the same share of a shorter run.
        """
        share = record["measured"]["rounds"][-1] / self.federation["num_rounds"]
        return max(1, round(share * self.last_evaluations))

    def cell(self, variant: str, method: str, purpose: str, seed: int, rates: Rates) -> Cell:
        cell = Cell(variant, method, purpose, seed, rates.adapter, rates.task_head)
        text = json.dumps(self.settings(cell), sort_keys=True)
        return Cell(**{**asdict(cell), "settings": hashlib.sha256(text.encode()).hexdigest()[:12]})


@dataclass(frozen=True)
class Cell:
    """
    One run.

    Args:
        variant (`str`): The variant of the experiment.
        method (`str`): The method.
        purpose (`str`): `"trial"` of a learning rate, `"run"` for the table, or `"quick"`.
        seed (`int`): The seed of the partition, the model and the run.
        learning_rate (`float`): The learning rate of the adapter.
        task_head_learning_rate (`float`, *optional*): The learning rate of the task head.
        settings (`str`): A digest of all other settings, so that results of other settings are not mixed in.
    """

    variant: str
    method: str
    purpose: str
    seed: int
    learning_rate: float
    task_head_learning_rate: float | None
    settings: str = ""

    def folder(self) -> str:
        """The name of its folder."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.purpose}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def read_experiment(path: Path) -> Experiment:
    """
    Args:
        path (`Path`): The YAML file. Its `methods` can be the name of another file in the same folder, and so can its `base`,
            an experiment whose entries it has where it says nothing else. Of `job`, `federation`, `adapter`, `trials` and
            `quick` these are single settings. Methods are added to those of the base, unless they are the name of a file.

    Returns:
        [`Experiment`]: The experiment.

    Raises:
        ValueError: if an entry is unknown, or a method takes the learning rates of one that is not there.
    """
    values = _with_base(path)
    known = {entry.name for entry in fields(Experiment)}
    if unknown := values.keys() - known:
        raise ValueError(
            f"{path}: an experiment has no {', '.join(sorted(unknown))}. It has {', '.join(sorted(known))}."
        )
    values["methods"] = {name: Method(name, **given) for name, given in values["methods"].items()}
    values["trials"] = Trials(**values["trials"])
    for rate in (*values["trials"].learning_rates, *values["trials"].task_head_learning_rates):
        if not isinstance(rate, float):  # YAML reads 1e-3 as a text
            raise ValueError(f"{path}: learning rates must be numbers with a point, such as 0.001, got {rate!r}.")
    values["variants"] = {name: given or {} for name, given in (values.get("variants") or {"": {}}).items()}
    experiment = Experiment(**{**values, "rows": values.get("rows") or list(values["methods"])})
    wanted = {experiment.reference, *experiment.rows, *(m.rates_of for m in experiment.methods.values() if m.rates_of)}
    if missing := wanted - experiment.methods.keys():
        raise ValueError(f"{path}: there is no method {', '.join(sorted(missing))}.")
    if missing := experiment.compared_variants.keys() - experiment.variants.keys():
        raise ValueError(f"{path}: there is no variant {', '.join(sorted(missing))}.")
    return experiment


def _with_base(path: Path) -> dict[str, Any]:
    values = yaml.safe_load(path.read_text())
    base = _with_base(path.parent / values.pop("base")) if "base" in values else {}
    if isinstance(values.get("methods"), str):
        values["methods"] = yaml.safe_load((path.parent / values["methods"]).read_text())
        base = {name: entry for name, entry in base.items() if name not in ("methods", "rows")}
    settings = {
        name: {**base.get(name, {}), **values[name]} for name in (*SETTINGS, "methods") if values.get(name) is not None
    }
    return {**base, **values, **settings}


def trial_cells(experiment: Experiment, method: str, best: Rates | None = None) -> Iterator[Cell]:
    """
    Args:
        experiment ([`Experiment`]): The experiment.
        method (`str`): A method with rates of its own.
        best ([`Rates`], *optional*): The best of the first trials.

    Yields:
        [`Cell`]: The trials of the adapter's rate, or those of the head's if the best of the former is given.
    """
    trials, middle = experiment.trials, middle_rates(experiment, method).task_head
    if best is None:
        rates = [Rates(rate, middle) for rate in experiment.learning_rates(method)]
    else:
        rates = [Rates(best.adapter, head) for head in trials.task_head_learning_rates if head != middle]
    for one in rates:
        yield experiment.cell(next(iter(experiment.variants)), method, "trial", trials.seed, one)


def middle_rates(experiment: Experiment, method: str) -> Rates:
    """The rates in the middle of both grids of a method, which are used where none were chosen."""
    adapter, heads = experiment.learning_rates(method), sorted(experiment.trials.task_head_learning_rates)
    return Rates(adapter[len(adapter) // 2], heads[len(heads) // 2] if heads else None)
