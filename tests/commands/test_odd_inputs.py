"""Mistakes on the command line: each is reported in one line, and leaves nothing behind."""

from pathlib import Path

import datasets
import pytest

from .conftest import assert_refused, run
from .helpers import write


WORDS = {"text": "w1 w2", "label": "x"}
ROWS = [{"text": "w1", "label": "a"}, {"text": "w2", "label": "b"}] * 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["north", "./north"], "'north' and './north' are the same folder, which would count twice"),
        (["north", "south", "--method", ""], "There is no merge method ''"),
        (["north", "south", "--base-model", ""], "The name of the base model is empty"),
        *(
            (["north", "south", "--option", f"{name}=1"], f"'ravan' has no option '{name}'. Its options are: none.")
            for name in (
                "method",
                "config",
                "updates",
                "on_bad_update",
                "server_state",
                "server_optimizer",
                "mechanism",
            )
        ),
    ],
)
def test_merge(place, words, message):
    assert_refused(run("merge", *words, "--out", "merged"), message)
    assert not Path("merged").exists()


@pytest.mark.parametrize("name", ["not a repo", "", "a/b/c", "-x"])
def test_push_reports_a_bad_name_before_it_begins(place, hub, name):
    ended = run("push", "--", "north", name)
    assert ended.code == 1 and "interrupted" not in ended.err and not hub.requests


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output_dir", ""], "`output_dir` is empty"),
        (["--output_dir", "train.csv"], "'train.csv' is a file, and a run has a folder"),
        (["--max_length", "0"], "`max_length` must be 1 or more, got 0"),
        (["--max_length", "-1"], "`max_length` must be 1 or more, got -1"),
        (["--text_column", "label"], "must be two columns, got 'label' for both"),
        (["--merge_options", "{bad"], "`merge_options` must be JSON where it is a text, got '{bad'"),
        (["--local_parameters", "[bad"], "`local_parameters` must be regular expressions, but '[bad' is none: "),
        (["--adapter.r", "1000000000"], "num_heads * r = 4 * 1000000000 = 4000000000, d_in = 32 and d_out = 32"),
    ],
)
def test_train(folder, words, message):
    write(test_files=..., eval_strategy="no")
    assert_refused(run("train", "run.yaml", *words), message)
    assert not Path("out").exists() or not list(Path("out").glob("adapter*"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("zero.csv", "", "'zero.csv' could not be read as csv: "),
        ("empty.csv", "text,label\n", "'empty.csv' could not be read as csv: "),
        ("bad.json", "{", "'bad.json' could not be read as json: "),
        ("bad.parquet", "x", "'bad.parquet' could not be read as parquet: "),
        ("gap.csv", [*ROWS, {**WORDS, "text": None}], "1 of 21 examples of the data (train) have nothing in 'text'"),
        (
            "none.csv",
            [*ROWS, {**WORDS, "label": None}],
            "1 of 21 examples of the data (train) have nothing in 'label'",
        ),
        ("one.csv", [WORDS] * 10, "The data (train) has the label 'x' only. A classifier needs two at least"),
        (
            "numbers.csv",
            [{**row, "text": 5} for row in ROWS],
            "The column 'text' of the data (train) has no texts, but",
        ),
    ],
)
def test_data(folder, name, content, message):
    Path(name).write_text(content) if isinstance(content, str) else datasets.Dataset.from_list(content).to_csv(name)
    write(data_files=name, test_files=..., eval_strategy="no")
    assert_refused(run("train", "run.yaml"), message)


def test_a_run_that_could_not_begin_is_no_earlier_run(folder):
    write(adam_beta1=2.0)
    ended = run("train", "run.yaml")
    assert ended.code == 1 and "Round 1: all 3 clients that have tried failed with the same error" in ended.err
    assert "Invalid beta parameter at index 0: 2.0" in ended.err
    write()
    assert run("train", "run.yaml").code == 0
