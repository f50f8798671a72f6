"""docs/scaling.md is correct: its code gives the results it shows, and its computed figures are those of the messages."""

import doctest
import re
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from peft_ravan import ravan_config_for_budget
from peft_ravan.merging import MERGE_METHODS
from peft_ravan.trainers.client.live_adapter import LiveAdapter
from peft_ravan.trainers.compression import compress
from peft_ravan.trainers.exchange import ClientReply, ClientTask

from .benchmark import BENCHMARKS, load_script
from .conftest import tiny_llama
from .markdown import rows, run_blocks, section


# methods that are neither linear nor inexact in two steps, each with a row of its own
SENT_DIFFERENTLY = [["fedrot_lora"], ["flora"], ["fedex_lora"]]
ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "scaling.md"
TEXT = PAGE.read_text()


scaling = load_script(BENCHMARKS / "scaling.py")


def table(name: str) -> list[list[str]]:
    return rows(TEXT.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0])


def number(cell: str) -> float:
    return float(re.match(r"[\d,.]+", cell)[0].replace(",", ""))


def test_the_code_gives_the_results_it_shows():
    assert run_blocks(PAGE, {}, doctest.NORMALIZE_WHITESPACE) >= 7


@pytest.mark.parametrize("name", scaling.COMPUTED)
def test_the_computed_tables_are_what_the_benchmark_computes(name):
    assert table(name) == list(scaling.COMPUTED[name]())


def test_the_parameters_are_those_of_the_configurations():
    # rank 8 of [2048 x 2048] and [512 x 2048] in 16 layers, and of [4096 x 4096] and [1024 x 4096] in 32
    of_queries_and_values = [16 * 8 * (4096 + 2560), 32 * 8 * (8192 + 5120)]
    # and of k and o, and of three projections between 2048 and 8192, or 4096 and 14336
    of_all = [16 * 8 * (2 * 4096 + 2 * 2560 + 3 * 10240), 32 * 8 * (2 * 8192 + 2 * 5120 + 3 * 18432)]
    expected = {
        (model, targets, "LoRA"): count
        for targets, counts in (("q, v", of_queries_and_values), ("all linear", of_all))
        for model, count in zip(scaling.MODELS, counts, strict=True)
    }
    found = {tuple(row[:3]): int(number(row[3])) for row in table("bytes")}
    assert {key: count for key, count in found.items() if key[2] == "LoRA"} == expected
    for (model, targets, kind), count in found.items():
        assert kind == "LoRA" or 0.98 < count / expected[model, targets, "LoRA"] <= 1


@pytest.mark.parametrize("kind", scaling.ADAPTERS)
def test_messages_without_values_have_the_size_of_real_ones(kind, monkeypatch):
    model = tiny_llama()
    monkeypatch.setitem(scaling.MODELS, "tiny", model.config)
    monkeypatch.setattr(scaling, "LORA_RANK", 4)
    monkeypatch.setattr(scaling, "NUM_HEADS", 2)
    adapter, targets = scaling.Adapter("tiny", "q, v", kind), ["q_proj", "v_proj"]
    ravan = ravan_config_for_budget(model, lora_rank=4, num_heads=2, target_modules=targets)
    config = ravan if kind == "Ravan" else LoraConfig(r=4, target_modules=targets)
    state = LiveAdapter(get_peft_model(model, config)).read()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == adapter.shapes()
    task = ClientTask(1, "client_1234567", state, seed=2**31, run="2f9c0a7e41d3", upload_dtype="int4")
    reply = ClientReply.to(
        task,
        update=compress(state, "int4"),
        num_examples=100,
        train_loss=1.0123456789012345,
        learning_rate=0.001,
        upload_dtype="int4",
    )
    assert scaling.message_bytes(adapter) == (len(task.to_bytes()), len(reply.to_bytes()))


def test_the_totals_of_the_measured_rounds_are_sums():
    found = table("server")
    assert [row[:3] for row in found] == [row[:3] for row in table("bytes")]
    for *_, opened, read, closed, total, memory, size in found:
        assert number(total) == pytest.approx(sum(map(number, (opened, read, closed))), abs=0.51)
        assert number(memory) > number(size)
    parameters = [number(row[3]) for row in table("bytes")]
    assert [row[-1] for row in found] == [f"{4 * count / 1e6:.1f} MB" for count in parameters]


def test_the_methods_that_stream_are_listed():
    names = [name for name, method in MERGE_METHODS.items() if method.secure_aggregation]
    [listed] = re.findall(r"those with \*Secure aggregation\*: (.*?)\. All", TEXT)
    assert re.findall(r"`(\w+)`", listed) == names
    assert all(MERGE_METHODS[name].streaming for name in names)
    timed = [row[0].strip("`") for row in table("methods")]
    assert timed == [name for name, method in MERGE_METHODS.items() if method.different_heads]


def test_every_method_is_in_the_table_of_what_is_exact():
    listed = [re.findall(r"`(\w+)`", row[0]) for row in rows(section(TEXT, "What is exact", level=3))]
    sums = [name for name, method in MERGE_METHODS.items() if method.secure_aggregation]
    plain = [name for name in sums if MERGE_METHODS[name].plain_mean]
    others = [name for name in MERGE_METHODS if name not in sums and [name] not in SENT_DIFFERENTLY]
    assert listed == [plain, [name for name in sums if name not in plain], *SENT_DIFFERENTLY, others]
