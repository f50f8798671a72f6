"""The quickstart and the how-to guides run as printed, on tiny models, and their tables are computed again."""

import re
import shlex
from pathlib import Path

import datasets
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from peft_ravan import RavanConfig, ravan_config_for_budget
from peft_ravan.trainers import read_history
from peft_ravan.trainers.commands import PlanRequest, plan_uploads
from peft_ravan.trainers.compression import compress
from peft_ravan.trainers.quantization import QuantizedTensor

from .conftest import classification_dataset, make_model, make_tokenizer, save_data, sentence, tiny_bert, tiny_llama
from .markdown import code_blocks, rows


DOCS = Path(__file__).parent.parent / "docs"
BUDGET = (DOCS / "how_to" / "budget.md").read_text()


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def run(page: str, namespace: dict, replaced: dict[str, str] | None = None) -> dict:
    """Run the blocks of a page that are marked so, with what a test cannot have replaced."""
    text = (DOCS / page).read_text()
    for old, new in (replaced or {}).items():
        assert old in text
        text = text.replace(old, new)
    snippets = re.findall(r"<!-- run -->\n```python\n(.*?)```", text, flags=re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), namespace)
    return namespace


def test_the_quickstart(tmp_path):
    config = tiny_bert().config
    config.hidden_size = 64
    BertForSequenceClassification(config).save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    labels = datasets.ClassLabel(names=["a", "b", "c", "d"])
    columns = {"text": [sentence(i) for i in range(240)], "label": [i % 4 for i in range(240)]}
    save_data(tmp_path / "data", columns, label=labels)
    replaced = {
        "sentence-transformers/all-MiniLM-L6-v2": "model",
        "fancyzhx/ag_news": "data",
        "num_rounds=30": "num_rounds=2",
        "max_steps=10": "max_steps=2",
    }
    namespace = run("index.md", {}, replaced)
    assert [record["num_examples"] > 0 for record in read_history("federated-adapter")] == [True, True]
    trained = namespace["trainer"].model.state_dict()
    loaded = namespace["model"].state_dict()
    cores = [name for name in trained if "ravan_H" in name]
    assert cores and all(torch.equal(trained[name].cpu(), loaded[name].cpu()) for name in cores)
    assert any(loaded[name].any() for name in cores)


def test_own_clients(capsys):
    dataset = classification_dataset(60).add_column("hospital", ["a", "b", "c"] * 20)
    plain = dataset.remove_columns("hospital")
    namespace = {
        "model": get_peft_model(make_model(), RavanConfig(r=4, num_heads=2, task_type="SEQ_CLS")),
        "dataset": dataset,
        "north": plain.select(range(40)),
        "south": plain.select(range(40, 60)),
    }
    run("how_to/own_clients.md", namespace)
    assert {client for record in read_history("run") for client in record["clients"]} == {"north", "south"}
    assert list(namespace["trainer"].clients) == ["a", "b", "c"]
    assert "examples" in capsys.readouterr().out


def test_a_model_in_4_bit():
    pytest.importorskip("bitsandbytes")
    tiny_llama().save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    texts = datasets.Dataset.from_dict({"text": [sentence(i) for i in range(16)]})
    replaced = {"Qwen/Qwen3-0.6B": "model", "r=16, num_heads=4": "r=4, num_heads=2"}
    namespace = run("how_to/quantized.md", {"texts": texts}, replaced)
    kinds = {type(module).__name__ for module in namespace["model"].modules()}
    assert "Linear4bit" in kinds
    cores = [parameter for name, parameter in namespace["model"].named_parameters() if "ravan_H" in name]
    assert any(core.any() for core in cores)


def number(cell: str) -> int:
    return int(re.sub(r"\D", "", cell))


def size(parameters: int, dtype: str) -> int:
    [sent] = compress({"x": torch.zeros(parameters)}, dtype, None).values()
    parts = (sent.codes, sent.scales) if isinstance(sent, QuantizedTensor) else (sent,)
    return sum(part.numel() * part.element_size() for part in parts)


def square(lora_rank: int, num_heads: int) -> RavanConfig:
    model = nn.Sequential(nn.Linear(768, 768, device="meta"))
    return ravan_config_for_budget(model, lora_rank=lora_rank, num_heads=num_heads, target_modules=["0"])


def test_the_table_of_uploads():
    table = rows(BUDGET.split("<!-- uploads -->\n")[1])
    assert [number(row[0]) for row in table] == [4, 8, 16, 32]
    for row in table:
        lora_rank, r, *kilobytes = map(number, row)
        assert r == square(lora_rank, 4).r
        cores = 4 * r * r
        assert kilobytes == [round(24 * size(cores, dtype) / 1000) for dtype in ("int4", "float32")]


def test_the_table_of_heads():
    for row in rows(BUDGET.split("<!-- heads -->\n")[1]):
        num_heads, r, trained, rank = map(number, row)
        assert r == square(8, num_heads).r
        assert (trained, rank) == (num_heads * (r * r + 1), num_heads * r)


def test_the_figures_in_the_text_of_the_budget():
    assert "has 115,350 numbers, 61 kB in int4" in BUDGET
    assert 150 * 769 == 115_350 and round(size(115_350, "int4") / 1000) == 61
    assert "1 MB for 24 targets and 4 heads gives `r = 140`" in BUDGET
    assert 24 * size(4 * 140**2, "int4") <= 1_000_000 < 24 * size(4 * 141**2, "int4")


def test_the_table_of_the_plan(tmp_path, monkeypatch):
    """The configuration is that of MiniLM."""
    [command] = code_blocks(BUDGET, "sh")[0].splitlines()
    _, name, model, *words = shlex.split(command)
    assert (name, words[::2]) == ("plan", ["--budget", "--num-labels"])
    BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536).save_pretrained(tmp_path / model)
    plan = plan_uploads(PlanRequest(str(tmp_path / model), words[1], num_labels=int(words[3])))
    table = rows(BUDGET.split("<!-- plan -->\n")[1])
    for row, choice in zip(table, plan.choices, strict=True):
        kind, num_heads, r, trained, upload, rank = (cell.strip("*") for cell in row)
        assert (kind == "LoRA", num_heads) == (choice.num_heads is None, str(choice.num_heads or "–"))
        assert (number(r), number(trained), number(rank)) == (choice.r, choice.trained, choice.update_rank)
        assert upload == f"{choice.upload_bytes / 1000:.1f} kB"
        assert row[0].startswith("**") == (choice is plan.recommended)


def test_the_code_of_the_budget():
    assert run("how_to/budget.md", {"base_model": make_model()})["config"].r >= 1
