"""The runner of experiments on accuracy, with a tiny model and tiny data."""

import contextlib
import io
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    ViTConfig,
    ViTForImageClassification,
)

from .conftest import make_tokenizer, sentence, tiny_bert


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # where a script finds the others

import accuracy  # noqa: E402
import experiment as experiments  # noqa: E402
import jobs  # noqa: E402
import real_data  # noqa: E402
from accuracy_measures import chosen_rates  # noqa: E402
from cells import is_of  # noqa: E402
from job_kinds import JOBS  # noqa: E402


LORA = {"adapter": {"peft_type": "LORA", "r": 2}, "arguments": {"merge_method": "fedavg", "upload_dtype": "float32"}}
RAVAN = {"adapter": {"peft_type": "RAVAN", "r": 2, "num_heads": 2}}
TINY = {
    "title": "Words",
    "job": {"kind": "texts", "data": "", "model": "", "max_length": 8, "upper_layers": 1, "max_test_examples": 40},
    "federation": {
        "num_clients": 4,
        "clients_per_round": 2,
        "partition": "dirichlet",
        "num_rounds": 2,
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
    },
    "adapter": {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]},
    "methods": {"LoRA, FedAvg": LORA, "Ravan": RAVAN},
    "trials": {"learning_rates": [0.001, 0.01], "task_head_learning_rates": [0.01, 0.1], "num_rounds": 2},
    "variants": {"skewed": {}, "iid": {"partition": "iid"}},
    "seeds": [0],
    "quick": {"num_rounds": 2},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("accuracy")
    BertForSequenceClassification(tiny_bert().config).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    labels = datasets.ClassLabel(names=["a", "b", "c", "d"])
    (folder / "data").mkdir()
    for split, number in (("train", 120), ("test", 60)):
        rows = {"text": [sentence(i) for i in range(number)], "label": [i % 4 for i in range(number)]}
        rows = datasets.Dataset.from_dict({**rows, "author": [f"author {i % 5}" for i in range(number)]})
        rows.cast_column("label", labels).to_parquet(folder / "data" / f"{split}.parquet")
    return folder


def run_script(place: Path, folder: Path, *options: object, **changes) -> None:
    """Run the script on an experiment. The runs go to `out` in the folder."""
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False))
    places = ("--data", place / "data", "--model", place / "model", "--output", folder / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["accuracy.py", *map(str, (path, *places, *options))])
        accuracy.main()


@pytest.fixture
def run(place, tmp_path, capsys):
    """Runs the script on an experiment, and returns what it has printed."""

    def run(*options: object, **changes) -> str:
        capsys.readouterr()
        run_script(place, tmp_path, *options, **changes)
        return capsys.readouterr().out

    return run


@dataclass(frozen=True)
class Finished:
    """An experiment of which all runs are made, and what the script has printed."""

    out: Path
    printed: str


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_script(place, folder)
    return Finished(folder / "out", printed.getvalue())


def test_each_run_is_made_once_with_the_best_rates_of_its_method(finished, run, tmp_path):
    cells = (finished.out / "cells.jsonl").read_text().splitlines()
    # two rates and one more of the head for each method, and then two variants of each
    assert len(cells) == 2 * 3 + 2 * 2
    assert {path.name for path in finished.out.iterdir()} == {
        "cells.jsonl", "made", "experiment-run.md", "experiment-skewed-run.png", "experiment-iid-run.png"
    }  # fmt: skip
    shutil.copytree(finished.out, tmp_path / "out")
    again = run()
    assert (tmp_path / "out" / "cells.jsonl").read_text().splitlines() == cells
    assert finished.printed.endswith(again) and "| Ravan | 1 |" in again
    assert "**iid**" in again and "**Learning rates**" in again


def test_variants_can_share_a_table_and_a_plot(finished, run, tmp_path):
    shutil.copytree(finished.out, tmp_path / "out")
    printed = run(compared_variants={"iid": "equal shares", "skewed": "few classes each"})
    names = [row.split(" | ")[:2] for row in printed.splitlines() if row.startswith(("| equal", "| few"))]
    assert names == [
        ["| equal shares", "LoRA, FedAvg"], ["| equal shares", "Ravan"],
        ["| few classes each", "LoRA, FedAvg"], ["| few classes each", "Ravan"],
    ]  # fmt: skip
    assert "**iid**" not in printed and (tmp_path / "out" / "experiment-run.png").is_file()
    assert len((tmp_path / "out" / "cells.jsonl").read_text().splitlines()) == 10  # as before
    with pytest.raises(ValueError, match="there is no variant pathological"):
        run(compared_variants={"pathological": "two classes each"})


def test_the_rates_of_finished_runs_can_be_used(finished, run, tmp_path):
    table = [line for line in finished.printed.splitlines() if line.startswith("|")]
    again = run("--rates", finished.out / "cells.jsonl", "--variants", "skewed", "--methods", "Ravan")
    [cell] = (tmp_path / "out" / "cells.jsonl").read_text().splitlines()
    assert json.loads(cell)["purpose"] == "run"
    rows = [line for line in again.splitlines() if line.startswith("| Ravan |")]
    # the same figures, and the same choice of rates
    alone, among_others = rows[0].split("|"), next(row for row in table if row.startswith("| Ravan |")).split("|")
    assert [alone[2], alone[3], alone[5]] == [among_others[2], among_others[3], among_others[5]]
    assert len(rows) == 2 and rows[1] in table


def test_other_settings_are_other_runs():
    rates, cells = experiments.Rates(0.01), []
    for federation in (TINY["federation"], {**TINY["federation"], "max_steps": 2}):
        experiment = experiments.Experiment(
            **{**TINY, "methods": methods(), "trials": experiments.Trials(**TINY["trials"]), "federation": federation}
        )
        cells.append(experiment.cell("skewed", "Ravan", "run", 0, rates))
    assert cells[0] != cells[1] and not is_of(vars(cells[1]), cells[0]) and is_of(vars(cells[0]), cells[0])


def test_a_run_that_was_killed_goes_on(run, tmp_path, monkeypatch):
    whole = run("--quick", quick={"num_rounds": 4})
    (tmp_path / "out" / "cells.jsonl").unlink()
    evaluate, calls = jobs.hits, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 4:  # the second evaluation, of two states each, after the third checkpoint
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(jobs, "hits", killed)
    with pytest.raises(KeyboardInterrupt):
        run("--quick", quick={"num_rounds": 4})
    assert not (tmp_path / "out" / "cells.jsonl").exists()
    [folder] = (tmp_path / "out").glob("quick-*")
    assert (folder / "checkpoint-3").is_dir()
    rest = run("--quick", quick={"num_rounds": 4})
    table = [line for line in whole.splitlines() if line.startswith("|")]
    assert table == [line for line in rest.splitlines() if line.startswith("|")] and len(table) == 4


def test_authors_can_be_the_clients(run):
    federation = {**TINY["federation"], "partition": "column", "partition_column": "client"}
    job = {**TINY["job"], "client_column": "author", "min_examples": 3}
    assert "| Ravan | 1 |" in run(
        "--quick", federation={k: v for k, v in federation.items() if k != "num_clients"}, job=job
    )


def test_uploads_are_lost_at_the_given_rate():
    def lost(rate: float, seed: int) -> list[tuple[str, int]]:
        fault, found = accuracy.lost_uploads(rate, seed), []
        for client in ("a", "b"):
            for round_number in range(100):
                try:
                    assert fault(client, round_number, None) is None
                except ConnectionError:
                    found.append((client, round_number))
        return found

    assert not lost(0.0, 0) and len(lost(1.0, 0)) == 200
    assert 40 < len(lost(0.3, 0)) < 80 and lost(0.3, 0) == lost(0.3, 0) != lost(0.3, 1)


def test_an_experiment_can_add_rows_to_another(run, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    path = tmp_path / "more.yaml"
    more = {"title": "More", "base": "tiny.yaml", "rows": ["one head"]}
    path.write_text(yaml.safe_dump({**more, "methods": {"one head": {**RAVAN, "rates_of": "Ravan"}}}))
    experiment = experiments.read_experiment(path)
    assert list(experiment.methods) == ["LoRA, FedAvg", "Ravan", "one head"] and experiment.rows == ["one head"]
    assert experiment.job == TINY["job"] and experiment.title == "More"
    base = experiments.read_experiment(tmp_path / "tiny.yaml")
    # the same run in both
    rates = experiments.Rates(0.01)
    assert base.cell("skewed", "Ravan", "run", 0, rates) == experiment.cell("skewed", "Ravan", "run", 0, rates)


def test_lora_can_start_from_a_gradient(run):
    adapter = {"peft_type": "LORA", "r": 2, "init_lora_weights": "lora_ga", "lora_ga_config": {"scale": "stable"}}
    started = {**LORA, "adapter": adapter, "gradient_start": {"clients": 2, "batches": 1}}
    assert "| LoRA-GA | 1 |" in run(
        "--quick", "--methods", "LoRA-GA", methods={"LoRA, FedAvg": LORA, "LoRA-GA": started}
    )


def test_clients_that_keep_a_part_are_evaluated_on_their_own_data(run, tmp_path):
    personal = {"adapter": {"peft_type": "LORA", "r": 4}, "arguments": {"merge_method": "fedsa_lora"}}
    printed = run(
        "--quick",
        methods={"LoRA, FedAvg": LORA, "FedSA-LoRA": {**personal, "rates_of": "LoRA, FedAvg"}},
        federation={**TINY["federation"], "own_test_data": True},
    )
    assert "| Mean of clients, % |" in printed and "| FedSA-LoRA | 1 |" in printed
    cells = [json.loads(line) for line in (tmp_path / "out" / "cells.jsonl").read_text().splitlines()]
    assert [len(cell["measured"]["clients"]) for cell in cells] == [4, 4]
    assert (tmp_path / "out" / "experiment-skewed-quick.png").is_file()


def test_the_best_rates_are_those_of_the_best_trials():
    experiment = experiments.Experiment(
        **{**TINY, "methods": methods(), "trials": experiments.Trials(**TINY["trials"])}
    )
    records = []

    def add(cells, accuracies):
        for cell, value in zip(cells, accuracies, strict=True):
            records.append({**vars(cell), "measured": {"rounds": [1, 2], "last": [0.9, value], "mean": [0.0, 0.0]}})

    assert chosen_rates(experiment, records, "Ravan") == experiments.Rates(0.01, 0.1)  # in the middle
    add(experiments.trial_cells(experiment, "Ravan"), [0.4, 0.3])
    best = chosen_rates(experiment, records, "Ravan")
    assert best == experiments.Rates(0.001, 0.1)
    add(experiments.trial_cells(experiment, "Ravan", best), [0.5])
    assert chosen_rates(experiment, records, "Ravan") == experiments.Rates(0.001, 0.01)


def test_hits_of_classes_and_of_tokens():
    assert jobs.hits(np.array([1, 2]), np.array([1, 3])).tolist() == [1, 0]
    predicted, tokens = np.array([[5, 6, 7, 0]]), np.array([[4, 5, 9, -100]])
    assert jobs.hits(predicted, tokens).tolist() == [0.5]  # 5 after 4 is right, 6 instead of 9 is not


def test_examples_count_for_clients_as_often_as_their_labels():
    def of(labels):
        return datasets.Dataset.from_dict({"labels": labels})

    weights = jobs.client_weights({"x": of([0, 0, 0, 1]), "y": of([1])}, of([0, 1, 1]))
    np.testing.assert_allclose(weights, [[0.75, 0.125, 0.125], [0, 0.5, 0.5]])
    without = datasets.Dataset.from_dict({"text": ["a", "b"]})
    np.testing.assert_allclose(jobs.client_weights({"x": without, "y": without}, without), [[0.5, 0.5], [0.5, 0.5]])
    test = datasets.Dataset.from_dict({"labels": [0, 1, 1], "client": ["y", "x", "y"]})
    np.testing.assert_allclose(jobs.client_weights({"x": of([0]), "y": of([1])}, test), [[0, 1, 0], [0.5, 0, 0.5]])


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_experiments_can_be_read(path):
    if path.stem.startswith("methods"):
        return
    experiment = experiments.read_experiment(path)
    assert experiment.job["kind"] in JOBS
    for name in experiment.rows:
        experiment.methods[name].peft_config(experiment.adapter)
        cell = experiment.cell(
            next(iter(experiment.variants)), name, "run", 0, experiments.middle_rates(experiment, name)
        )
        arguments = experiment.settings(cell)["arguments"]
        arguments.pop("own_test_data", None)
        accuracy.FederatedArguments("unused", **arguments, use_cpu=True)


SHAPES = {
    "clinc150": (
        BertForSequenceClassification,
        BertConfig(hidden_size=384, num_hidden_layers=2, num_attention_heads=12, intermediate_size=64),
    ),
    "cifar10": (
        ViTForImageClassification,
        ViTConfig(
            image_size=32,
            patch_size=4,
            hidden_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=64,
        ),
    ),
    "shakespeare": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=8,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=8,
            num_key_value_heads=4,
            intermediate_size=8,
        ),
    ),
}


def uploaded_numbers(experiment: experiments.Experiment, method: str, shape: tuple[type, PreTrainedConfig]) -> int:
    """The numbers in an upload on a model of the experiment's shape, without the task head. Ravan uploads s·H."""
    model_class, config = shape
    adapted = get_peft_model(model_class(config), experiment.methods[method].peft_config(experiment.adapter))
    trained = {name: parameter.numel() for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    return sum(number for name, number in trained.items() if "lora_" in name or "ravan_H" in name)


@pytest.mark.parametrize("name", SHAPES)
def test_the_adapters_of_an_experiment_fit_its_model_and_upload_alike(name):
    experiment = experiments.read_experiment(BENCHMARKS / "experiments" / f"{name}.yaml")
    lora = uploaded_numbers(experiment, "LoRA, FedAvg", SHAPES[name])
    ravan = uploaded_numbers(experiment, "Ravan", SHAPES[name])
    assert 0.94 * lora < ravan <= lora, (lora, ravan)


def test_an_experiment_can_change_single_settings_of_another(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "rows": ["Ravan"]}, sort_keys=False))
    (tmp_path / "methods.yaml").write_text(yaml.safe_dump({"two heads": RAVAN}))
    path = tmp_path / "longer.yaml"
    changes = {"job": {"max_length": 16}, "federation": {"max_steps": 2}, "variants": {"iid": {}}}
    path.write_text(yaml.safe_dump({"base": "tiny.yaml", **changes}))
    longer = experiments.read_experiment(path)
    assert longer.job == {**TINY["job"], "max_length": 16} and longer.variants == {"iid": {}}
    assert longer.federation == {**TINY["federation"], "max_steps": 2} and longer.rows == ["Ravan"]
    # methods of a file take the place of those of the base
    path.write_text(yaml.safe_dump({"base": "tiny.yaml", "methods": "methods.yaml", "reference": "two heads"}))
    assert list(experiments.read_experiment(path).methods) == experiments.read_experiment(path).rows == ["two heads"]


def test_data_on_the_hub_can_have_subsets_and_other_splits(monkeypatch):
    asked = []

    def load_dataset(*args, split):
        asked.append((*args, split))
        return [datasets.Dataset.from_dict({"text": [name]}) for name in split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = real_data.load_splits("nyu-mll/glue", "mnli", "validation_matched")
    assert asked == [("nyu-mll/glue", "mnli", ["train", "validation_matched"])]
    assert found["test"]["text"] == ["validation_matched"]


def test_mistakes_in_a_file_are_named(tmp_path):
    path = tmp_path / "experiment.yaml"
    for changes, message in (
        ({"metods": {}}, "an experiment has no metods"),
        ({"reference": "LoRA"}, "there is no method LoRA"),
        ({"trials": {"learning_rates": ["1e-3"]}}, "must be numbers with a point.*'1e-3'"),
    ):
        path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False))
        with pytest.raises(ValueError, match=message):
            experiments.read_experiment(path)


def methods() -> dict[str, experiments.Method]:
    return {name: experiments.Method(name, **given) for name, given in TINY["methods"].items()}
