"""docs/federated_trainer.md is correct: its code gives the results it shows, and its tables are complete."""

import dataclasses
import doctest
import re
from pathlib import Path

import datasets
import pytest
import torch
from peft import get_peft_model

from peft_ravan import GradientSketch, RavanConfig
from peft_ravan.trainers import FederatedArguments, Privacy
from peft_ravan.trainers.compression import compress
from peft_ravan.trainers.data.partition import DEFAULT_NUM_CLIENTS, PARTITIONS
from peft_ravan.trainers.data.partition_report import MAX_BARS, MAX_COLOURS
from peft_ravan.trainers.quantization import BLOCK_SIZE, SENT_DTYPES, QuantizedTensor
from peft_ravan.trainers.records.client_metrics import client_statistics
from peft_ravan.trainers.runners import PARALLEL_MODES
from peft_ravan.tuner.bases import BasesShape

from .conftest import classification_dataset, make_model, make_tokenizer, sentence, tiny_llama
from .markdown import rows, run_blocks, section


PAGE = Path(__file__).parent.parent / "docs" / "federated_trainer.md"
TEXT = PAGE.read_text()


def given() -> dict:
    """The variables that the examples of the page assume."""
    dataset = classification_dataset().rename_column("labels", "label")
    speakers = ["anna", "ben", "chloe"] * (len(dataset) // 3)
    return {
        "torch": torch,
        "language_model": tiny_llama(),
        "tokenizer": make_tokenizer(),
        "texts": datasets.Dataset.from_dict({"text": [sentence(i) for i in range(30)], "speaker": speakers[:30]}),
        "base_model": make_model(),
        "dataset": dataset.add_column("speaker", speakers),
        "model": get_peft_model(make_model(), RavanConfig(r=4, num_heads=2, task_type="SEQ_CLS")),
    }


@pytest.mark.filterwarnings("ignore:Round . is skipped")
def test_the_code_gives_the_results_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    # pandas pads the lines of a table with blanks
    attempted = run_blocks(PAGE, given(), doctest.NORMALIZE_WHITESPACE)
    assert attempted >= 10
    assert all((tmp_path / name).exists() for name in ("labels.png", "speakers.png", "history.png"))


def test_the_table_of_dtypes_has_their_bytes():
    table = rows(section(TEXT, "Small uploads", level=2))
    assert [re.findall(r'"(\w+)"', row[0])[0] for row in table] == list(SENT_DTYPES)
    numbers = torch.zeros(64 * 1000)
    for dtype, (_, size, _) in zip(SENT_DTYPES, table, strict=True):
        sent = compress({"w": numbers}, dtype)["w"]
        parts = (sent.codes, sent.scales) if isinstance(sent, QuantizedTensor) else (sent,)
        assert round(sum(part.nbytes for part in parts) / len(numbers), 2) == float(size)
    args = FederatedArguments("out")
    for direction, dtype in (("uploads", args.upload_dtype), ("downloads", args.download_dtype)):
        assert [row[0] for row in table if f"(default of {direction})" in row[0]] == [
            f'`"{dtype}"` (default of {direction})'
        ]


def test_every_partition_is_in_the_table_with_its_arguments():
    table = {row[0].strip('`"'): row[2] for row in rows(section(TEXT, "Partitions", level=3))}
    assert set(table) == {*PARTITIONS, "an object"}
    defaults = dict(re.findall(r"`(\w+)` \(([\d.]+)\)", " ".join(table.values())))
    args = FederatedArguments("out")
    assert defaults.pop("num_clients") == str(DEFAULT_NUM_CLIENTS)
    assert defaults == {name: str(getattr(args, name)) for name in ("partition_alpha", "labels_per_client")}


def test_the_limits_of_bars():
    text = section(TEXT, "Inspecting the partition", level=3)
    assert f"more than {MAX_BARS} clients or {MAX_COLOURS} labels" in text


def test_the_figures_of_bases_from_the_clients():
    text, args = section(TEXT, "Communication cost", level=3), FederatedArguments("out")
    for (_, heads, *columns), d in zip(rows(text), (384, 4096), strict=True):
        num_heads, r = map(int, re.findall(r"\d+", heads))
        bytes_of = {}  # in int8, the cores in int4, the others in float32
        for rank in (args.bases_rank, num_heads * r):
            sketch = GradientSketch(BasesShape(d, d, num_heads, r), 0, "cpu", rank)
            bytes_of[rank] = (sketch.columns.numel() + sketch.rows.numel()) * (1 + 2 / BLOCK_SIZE)
        cores = num_heads * r**2 * (1 / 2 + 2 / BLOCK_SIZE)
        sizes = [bytes_of[args.bases_rank], 4 * d * d, 4 * 2 * d * num_heads * r]
        assert columns == [*(f"{size / 1e6:.2f} MB" for size in sizes), f"{cores / 1e6:.3f} MB"]
        assert f"cores of {bytes_of[args.bases_rank] / cores:.0f} rounds" in text
    assert f"cores of {bytes_of[num_heads * r] / cores:.0f} rounds" in text


def test_the_arguments_of_faults_are_in_the_table_with_their_defaults():
    table = {row[0].strip("`"): row[1] for row in rows(section(TEXT, "Failing clients", level=3))}
    args = FederatedArguments("out")
    assert set(table) == {"client_timeout", "min_successful_clients", "max_round_attempts"}
    assert f"({args.min_successful_clients})" in table["min_successful_clients"]
    assert f"({args.max_round_attempts})" in table["max_round_attempts"] and args.client_timeout is None


def test_the_fields_of_privacy_are_in_the_table_with_their_defaults():
    table = {row[0].strip("`"): row[1] for row in rows(section(TEXT, "Privacy")) if row[0] != "Field"}
    assert set(table) == {field.name for field in dataclasses.fields(Privacy)}
    defaults = Privacy(clip_norm=1.0, noise_multiplier=1.0)
    assert f"({defaults.delta})" in table["delta"] and f"(`{defaults.secret_sampling}`)" in table["secret_sampling"]


def test_every_figure_of_clients_is_in_the_table():
    table = rows(section(TEXT, "Evaluating each client", level=3))
    assert [name for row in table for name in re.findall(r"`(\w+)`", row[0])] == list(client_statistics([0]))


def test_the_ways_to_share_work_are_in_the_table():
    table = [row[0] for row in rows(section(TEXT, "Multiple processes"))]
    args = FederatedArguments("out")
    assert [name.split("`")[1].strip('"') for name in table] == list(PARALLEL_MODES)
    assert table[0] == f'`"{args.parallel}"` (default)' and f"`ddp_timeout` ({args.ddp_timeout:,} s)" in TEXT
