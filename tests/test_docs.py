"""docs/ravan.md is correct: its code runs, and its tables match the configuration and the budget."""

import dataclasses
import re
from pathlib import Path

import pytest
from peft import PeftConfig
from torch import nn
from torch.utils.data import DataLoader

from peft_ravan import RavanConfig, RavanLayer, ravan_config_for_budget
from peft_ravan.merging import MERGE_METHODS
from peft_ravan.trainers.server.budgets import BUDGET_DISTRIBUTIONS
from peft_ravan.tuner.bases import BASES
from peft_ravan.tuner.weighted_adapter import COMBINATION_TYPES

from .conftest import classification_dataset, make_model
from .markdown import code_blocks, dead_links, rows, section


PAGE = Path(__file__).parent.parent / "docs" / "ravan.md"
TEXT = PAGE.read_text()
SNIPPETS = re.findall(r"<!-- run -->\n```python\n(.*?)```", TEXT, flags=re.DOTALL)


def config_of(d_in: int, d_out: int, lora_rank: int) -> RavanConfig:
    model = nn.Sequential(nn.Linear(d_in, d_out, device="meta"))
    return ravan_config_for_budget(model, lora_rank=lora_rank, num_heads=4, target_modules=["0"])


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


def test_the_code_runs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    train_dataset = classification_dataset(80)
    namespace = {
        "model": make_model(),
        "base_model": make_model(),
        "fresh_model": make_model(),
        "train_dataset": train_dataset,
        "dataloader": DataLoader(train_dataset.with_format("torch"), batch_size=8),
    }
    for snippet in SNIPPETS:
        exec(compile(snippet, str(PAGE), "exec"), namespace)
        if "optimizer_cls_and_kwargs" in snippet:
            namespace["trainer"].create_optimizer()
            namespace["group_names"] = [group["name"] for group in namespace["trainer"].optimizer.param_groups]
    assert (tmp_path / "ravan-adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "merged-model" / "model.safetensors").exists()
    assert not any(isinstance(module, RavanLayer) for module in namespace["merged_model"].modules())
    assert len(SNIPPETS) == 8 and len(namespace["groups"]) == 4
    # the groups of the snippet are those that a trainer uses
    assert namespace["group_names"] == ["cores", "scalings", "weights", "biases"]
    trained = [state["exp_avg"].shape for state in namespace["trainer"].optimizer.state.values()]
    assert trained.count((2, 8, 8)) == 2  # two of four heads of rank 8, at two targets
    assert not any(layer.all_heads for layer in namespace["gradient_model"].modules() if isinstance(layer, RavanLayer))


def test_the_methods_that_take_different_heads():
    [text] = re.findall(r"Merge methods that take clients with different heads are (.*?)\. ", TEXT)
    assert set(re.findall(r'"(\w+)"', text)) == {
        name for name, method in MERGE_METHODS.items() if method.different_heads
    }


def test_the_distributions_of_budgets():
    found = re.findall(r'`"(\w+)"` is Beta\((\d), (\d)\)', TEXT)
    assert {name: (float(a), float(b)) for name, a, b in found} == BUDGET_DISTRIBUTIONS


@pytest.mark.parametrize("snippet", code_blocks(TEXT))
def test_code_that_is_not_run_is_at_least_python(snippet):
    compile(snippet, str(PAGE), "exec")


def test_the_table_of_fields_has_every_field_and_its_default():
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    fields = {field.name for field in dataclasses.fields(RavanConfig)} - inherited
    table = {row[0].strip("`"): row[1].strip("`") for row in rows(section(TEXT, "RavanConfig"))}
    assert set(table) == fields
    config = RavanConfig()
    assert table == {name: repr(getattr(config, name)).replace("'", '"') for name in table}


def test_the_table_of_budgets_is_what_the_function_gives():
    table = rows(TEXT.split("<!-- budget -->\n")[1])
    assert [tuple(map(number, row[:2])) for row in table] == [
        (d, lora_rank) for d in (768, 1024, 2048, 4096) for lora_rank in (4, 8, 16, 32)
    ]
    for row in table:
        d, lora_rank, lora_trained, r, trained, rank = map(number, row)
        config = config_of(d, d, lora_rank)
        assert lora_trained == lora_rank * 2 * d
        assert r == config.r and not config.rank_pattern
        assert trained == 4 * (r**2 + 1) and rank == 4 * r <= d


def test_where_gram_schmidt_no_longer_fits():
    text = section(TEXT, "Budget")
    square = re.findall(r"([\d,]+) at d = ([\d,]+)", text.split("<!-- fits -->")[1].split("<!-- /fits -->")[0])
    sizes = [(number(d), number(d), int(lora_rank)) for lora_rank, d in square]
    other = re.findall(r"([\d,]+) × ([\d,]+) (?:the largest|it) is (\d+)", text)
    sizes += [(number(d_in), number(d_out), int(lora_rank)) for d_in, d_out, lora_rank in other]
    assert len(sizes) == 7
    for d_in, d_out, lora_rank in sizes:
        assert 4 * config_of(d_in, d_out, lora_rank).r <= min(d_in, d_out)
        assert 4 * config_of(d_in, d_out, lora_rank + 1).r > min(d_in, d_out)


def test_the_kinds_of_bases_and_of_combinations_are_all_there():
    assert [row[0].strip('`"') for row in rows(section(TEXT, "Bases"))] == list(BASES)
    combinations = re.findall(r'`"(\w+)"`', " ".join(row[0] for row in rows(section(TEXT, "Combining adapters"))))
    assert sorted(combinations) == sorted(COMBINATION_TYPES)


def test_the_counts_of_skips_add_up():
    passed, skipped = (
        rows(section(TEXT, "Testing")),
        rows(section(TEXT, "Testing").split("| Skipped |")[1]),
    )
    *groups, total = [[number(cell.strip("* ") or "0") for cell in row[1:3]] for row in passed]
    assert [sum(column) for column in zip(*groups, strict=True)] == total
    reasons = re.findall(r"^\| (\d+) \|", TEXT.split("| Skipped | Reason |")[1], flags=re.M)
    assert sum(map(int, reasons)) == total[1] and skipped


@pytest.mark.parametrize(
    "page", [PAGE.parent.parent / "README.md", *sorted(PAGE.parent.rglob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    assert not dead_links(page)
