"""Tables of the finished runs of an experiment on accuracy, in markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from accuracy_measures import Record, best_trial, finished_trials, last_accuracy, mean_accuracy, mean_of_clients
from experiment import Experiment

from peft_ravan.trainers import client_statistics


def table_of_methods(experiment: Experiment, runs: Mapping[str, list[Record]]) -> list[str]:
    """The lines of a table of one variant, from its runs by method."""
    reference = runs.get(experiment.reference)
    target = None if reference is None else statistics.fmean(last_accuracy(experiment, record) for record in reference)
    to_target = "" if target is None else f" to {target:.1f} %"
    rows = [(*_columns(experiment), f"Rounds{to_target}", f"MB{to_target}")]
    for name, found in runs.items():
        reached = [_first(record, target) for record in found] if target is not None else [None]
        rows.append((*_row(experiment, name, found, reference), *_mean_of_reached(reached)))
    return list(markdown(rows))


def table_of_clients(experiment: Experiment, runs: Mapping[str, list[Record]]) -> list[str]:
    """The lines of a table of the accuracy of clients on their own data, from the runs of one variant by method."""
    rows = [
        ("Method", "Seeds", "Mean of clients, %", f"against {experiment.reference}, points", "Worst decile, %", "MB")
    ]
    reference = runs.get(experiment.reference)
    for name, found in runs.items():
        compared = reference if name != experiment.reference else None
        worst = [100 * client_statistics(record["measured"]["clients"])["worst_decile"] for record in found]
        rows.append(
            (
                name,
                str(len(found)),
                _spread([mean_of_clients(record) for record in found]),
                _lead(found, compared, mean_of_clients),
                _spread(worst),
                _megabytes(found),
            )
        )
    return list(markdown(rows))


def table_of_variants(experiment: Experiment, runs: Mapping[str, Mapping[str, list[Record]]]) -> list[str]:
    """The lines of one table of all variants that are compared, from the runs by variant and method."""
    rows = [("Variant", *_columns(experiment))]
    for variant, shown in experiment.compared_variants.items():
        of_variant = runs.get(variant, {})
        reference = of_variant.get(experiment.reference)
        rows += [(shown, *_row(experiment, name, found, reference)) for name, found in of_variant.items()]
    return list(markdown(rows, names=2))


def _columns(experiment: Experiment) -> tuple[str, ...]:
    lead = f"against {experiment.reference}, points"
    accuracies = ("Last state, %", lead, "Mean of rounds, %", lead, "Worst decile, %")
    return "Method", "Seeds", *accuracies, "Cosine of updates", "MB"


def _row(
    experiment: Experiment, name: str, found: Sequence[Record], reference: Sequence[Record] | None
) -> tuple[str, ...]:
    of_last = partial(last_accuracy, experiment)
    compared = reference if name != experiment.reference else None
    return (
        name,
        str(len(found)),
        _spread([of_last(record) for record in found]),
        _lead(found, compared, of_last),
        _spread([mean_accuracy(record) for record in found]),
        _lead(found, compared, mean_accuracy),
        _spread([100 * record["measured"]["worst_decile"][-1] for record in found]),
        _cosine(found),
        _megabytes(found),
    )


def table_of_rates(experiment: Experiment, records: Sequence[Record]) -> list[str]:
    """The lines of a table of the trials by which learning rates were chosen, a row for each method that has finished some."""
    tuned = dict.fromkeys(experiment.methods[name].rates_of or name for name in experiment.rows)
    rows = [("Method", "by learning rate", "chosen", "by learning rate of the task head", "chosen")]
    for name in tuned:
        of_adapter, of_head = finished_trials(experiment, records, name)
        if not of_adapter:
            continue
        chosen = best_trial(experiment, of_head)
        of_task_head = chosen["task_head_learning_rate"]
        rows.append(
            (
                name,
                _by_rate(experiment, of_adapter, "learning_rate"),
                f"{chosen['learning_rate']:g}",
                _by_rate(experiment, of_head, "task_head_learning_rate") or "–",
                "–" if of_task_head is None else f"{of_task_head:g}",
            )
        )
    return list(markdown(rows))


def _by_rate(experiment: Experiment, records: Sequence[Record], key: str) -> str:
    accuracies = {record[key]: last_accuracy(experiment, record) for record in records if record[key] is not None}
    return ", ".join(f"{rate:g}: {accuracy:.1f}" for rate, accuracy in sorted(accuracies.items()))


def markdown(rows: Sequence[Sequence[str]], names: int = 1) -> Iterator[str]:
    """
    Args:
        rows (`Sequence[Sequence[str]]`): The rows of a table, with the header first.
        names (`int`, *optional*, defaults to 1): How many of the first columns are names. The others are aligned to the right.

    Yields:
        `str`: Its lines.
    """
    header, *body = rows
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * names + "---:|" * (len(header) - names)
    for row in body:
        yield f"| {' | '.join(row)} |"


def _first(record: Record, target: float) -> tuple[float, float] | None:
    """The round and the megabytes after which the mean of rounds reaches an accuracy, in percent."""
    for number, accuracy, megabytes in zip(
        record["measured"]["rounds"], record["measured"]["mean"], record["measured"]["megabytes"], strict=True
    ):
        if 100 * accuracy >= target:
            return number, megabytes
    return None


def _mean_of_reached(reached: Sequence[tuple[float, float] | None]) -> tuple[str, str]:
    if any(one is None for one in reached):
        return "–", "–"
    rounds, megabytes = zip(*reached, strict=True)
    return f"{statistics.fmean(rounds):.1f}", f"{statistics.fmean(megabytes):.2f}"


def _lead(records: Sequence[Record], reference: Sequence[Record] | None, accuracy: Callable[[Record], float]) -> str:
    """How far the accuracy is ahead, and the range over the seeds that both have."""
    of_seed = {record["seed"]: accuracy(record) for record in reference or ()}
    leads = [accuracy(record) - of_seed[record["seed"]] for record in records if record["seed"] in of_seed]
    if not leads:
        return "–"
    over = f" ({min(leads):+.1f} to {max(leads):+.1f})" if len(leads) > 1 else ""
    return f"{statistics.fmean(leads):+.1f}{over}"


def _cosine(records: Sequence[Record]) -> str:
    found = [cosine for record in records for cosine in record["measured"].get("update_cosines", ())]
    return f"{statistics.fmean(found):.2f}" if found else "–"


def _megabytes(records: Sequence[Record]) -> str:
    return f"{statistics.fmean(record['measured']['megabytes'][-1] for record in records):.2f}"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")
