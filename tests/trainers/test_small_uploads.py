"""Uploads and downloads in few bits: rounding without bias, what a server makes of it, and what it costs in bytes."""

import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer

from peft_ravan import RavanConfig
from peft_ravan.merging import ClientUpdate, UpdateError, merge
from peft_ravan.trainers.client.local_client import LocalClient
from peft_ravan.trainers.client.objective import control_change, control_sent
from peft_ravan.trainers.client.store import ClientStore
from peft_ravan.trainers.compression import ExchangeSettings, changes, compress, decompress, with_changes
from peft_ravan.trainers.exchange import ClientReply, ClientTask
from peft_ravan.trainers.heap import frozen_heap
from peft_ravan.trainers.quantization import (
    LEVELS,
    QuantizedTensor,
    code_sizes,
    dequantize,
    quantize,
    to_bfloat16,
)
from peft_ravan.trainers.runners import Runner
from peft_ravan.trainers.server.merging import MergeSettings
from peft_ravan.trainers.server.server import Server
from peft_ravan.trainers.server.settings import ServerSettings
from peft_ravan.trainers.server.state import ServerState

from ..conftest import classification_dataset, tiny_bert
from ..properties import examples
from .helpers import (
    OverBytes,
    WithStatistics,
    adapter_state,
    arguments,
    assert_same,
    comparable,
    kept_by_clients,
    logged,
    lora,
    make_trainer,
    ravan,
    resumable_trainer,
    resumed_after,
)


NAN, INF = math.nan, math.inf
DTYPES = sorted(LEVELS)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scales_of(quantized: QuantizedTensor) -> torch.Tensor:
    """The scale of each number."""
    numel = math.prod(quantized.shape)
    return quantized.scales.float().repeat_interleave(64)[:numel].view(quantized.shape)


# ---- Tensors ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [None, 0])
def test_multiples_of_the_scale_come_back_as_they_were(dtype, seed):
    levels = LEVELS[dtype]
    numbers = torch.cat([torch.arange(-levels, levels + 1.0), torch.tensor([3.0, -2.0])])[-64:] * 2**-9
    quantized = quantize(numbers, dtype, None if seed is None else seeded(seed))
    assert quantized.scales.tolist() == [2**-9]
    assert torch.equal(dequantize(quantized), numbers)


def test_each_block_has_its_own_scale():
    numbers = torch.cat([torch.full((64,), 127.0), torch.full((64,), 127 * 2.0**-20), torch.zeros(64), torch.ones(1)])
    quantized = quantize(numbers, "int8")
    assert quantized.scales[:3].tolist() == [1.0, 2.0**-20, 0.0] and quantized.codes.shape == (193,)
    assert torch.equal(dequantize(quantized)[:192], numbers[:192])


def test_two_numbers_share_a_byte_in_int4():
    quantized = quantize(torch.tensor([7.0, -7.0, -1.0]), "int4")
    assert quantized.codes.tolist() == [0x97, 0x0F] and quantized.scales.tolist() == [1.0]


@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16"])
def test_rounding_has_no_bias(dtype):
    numbers = torch.randn(200, generator=seeded(1)) * 1e-3
    numbers[3] = 1e-6  # far below the scale of its block
    number = 1000
    total = torch.zeros(200, dtype=torch.float64)
    for seed in range(number):
        if dtype == "bfloat16":
            total += to_bfloat16(numbers, seeded(seed))
        else:
            total += dequantize(quantize(numbers, dtype, seeded(seed)))
    step = numbers.abs() / 128 if dtype == "bfloat16" else scales_of(quantize(numbers, dtype))
    # five standard errors of a number that is rounded up in half of all cases
    assert ((total / number - numbers).abs() < 5 * step / 2 / number**0.5).all()
    nearest = numbers.bfloat16() if dtype == "bfloat16" else dequantize(quantize(numbers, dtype))
    assert not torch.allclose(total / number, nearest.double(), rtol=0, atol=float(step.max()) / 20)


@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16"])
def test_the_seed_determines_the_rounding(dtype):
    state = {"b": torch.randn(3, 50, generator=seeded(0)), "a": torch.randn(70, generator=seeded(1))}
    first, again, other = (decompress(compress(state, dtype, seed)) for seed in (5, 5, 6))
    assert_same(first, again)
    assert not torch.equal(first["a"], other["a"])
    reordered = decompress(compress(dict(reversed(state.items())), dtype, 5))
    assert all(torch.equal(first[name], reordered[name]) for name in state)


@examples(150)
@given(
    numbers=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**122, min_value=-(2.0**122)),
        max_size=200,
    ),
    dtype=st.sampled_from(DTYPES),
    seed=st.none() | st.integers(0, 2**32 - 1),
)
def test_a_number_is_off_by_less_than_the_scale_of_its_block(numbers, dtype, seed):
    numbers = torch.tensor(numbers)
    quantized = quantize(numbers, dtype, None if seed is None else seeded(seed))
    assert quantized.scales.shape == (-(-len(numbers) // 64),)
    assert quantized.codes.shape == (code_sizes(dtype, len(numbers))[0],)
    if dtype == "int8":
        assert not len(numbers) or quantized.codes.abs().max() <= 127
    factor = 0.5 if seed is None else 1.0
    scales = scales_of(quantized)
    assert ((dequantize(quantized) - numbers).abs() <= scales * factor * (1 + 1e-6)).all()
    # as small as possible: the largest number of a block is at most a step below the largest code
    for index, scale in enumerate(quantized.scales.tolist()):
        block = numbers[64 * index : 64 * (index + 1)]
        largest = block.abs().max().item()
        assert largest <= scale * LEVELS[dtype] and (scale <= largest / LEVELS[dtype] * 1.008 or scale < 2e-38)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (63,), (64,), (65,), (3, 5, 7)], ids=str)
def test_all_shapes_come_back(dtype, shape):
    tensor = torch.randn(shape, generator=seeded(0))
    quantized = quantize(tensor, dtype, seeded(0))
    found = dequantize(quantized)
    assert found.shape == shape and found.dtype == torch.float32
    assert ((found - tensor).abs() <= scales_of(quantized)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_numbers_are_rounded_and_do_not_become_anything_else(dtype):
    tiny = torch.tensor([1e-45, -1e-40, 3e-39, 0.0])
    found = dequantize(quantize(tiny, dtype, seeded(0)))
    assert found.abs().max() < 2e-38 and found[3] == 0
    assert torch.equal(dequantize(quantize(torch.zeros(70), dtype, seeded(0))), torch.zeros(70))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16"])
def test_what_is_not_finite_stays_so(bad, dtype):
    numbers = torch.zeros(130)
    numbers[5] = bad
    found = decompress(compress({"w": numbers}, dtype, seed=3))["w"]
    assert not found[5].isfinite() and torch.equal(found[64:].float(), numbers[64:])


def test_numbers_that_overflow_while_they_are_rounded_do_not_become_finite():
    largest = torch.finfo(torch.float32).max
    found = to_bfloat16(torch.full((100,), largest), seeded(0)).float()
    assert (found.isinf() | (found > 0.99 * largest)).all()
    assert not changes({"w": torch.tensor(3e38)}, {"w": torch.tensor(-3e38)})["w"].isfinite()


@pytest.mark.parametrize(
    "codes, scales, shape, dtype",
    [
        (torch.zeros(3, dtype=torch.int8), torch.zeros(1, dtype=torch.bfloat16), (4,), "int8"),
        (torch.zeros(4, dtype=torch.uint8), torch.zeros(1, dtype=torch.bfloat16), (4,), "int8"),
        (torch.zeros(4, dtype=torch.uint8), torch.zeros(1, dtype=torch.bfloat16), (4,), "int4"),
        (torch.zeros(65, dtype=torch.int8), torch.zeros(1, dtype=torch.bfloat16), (65,), "int8"),
        (torch.zeros(4, dtype=torch.int8), torch.zeros(1), (4,), "int8"),
    ],
)
def test_codes_that_do_not_fit_are_refused(codes, scales, shape, dtype):
    with pytest.raises(ValueError, match=f"in {dtype} needs"):
        QuantizedTensor(codes, scales, shape, dtype)


# ---- States ----------------------------------------------------------------------


def test_other_dtypes_and_small_ones_are_sent_as_they_are():
    state = {
        "num_batches_tracked": torch.tensor(7), "half": torch.randn(3).half(), "mean": torch.randn(3), "w": torch.randn(3),
    }  # fmt: skip
    sent = compress(state, "bfloat16", exact=("mean",))
    assert all(sent[name] is state[name] for name in ("num_batches_tracked", "half", "mean"))
    assert sent["w"].dtype == torch.bfloat16
    assert isinstance(compress(state, "int8")["half"], QuantizedTensor) and compress(state, "float32") is state


def test_changes_are_added_to_the_heads_that_were_trained():
    own = {"ravan_H": torch.arange(12.0).view(3, 2, 2), "w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    start = {**own, "ravan_H": own["ravan_H"] + 100}  # what rounding made of it
    heads = {"ravan_H": torch.tensor([True, False, True])}
    trained = {"ravan_H": start["ravan_H"][[0, 2]] + 0.5, "w": own["w"] - 0.25, "n": torch.tensor(4)}
    difference = changes(trained, start, heads)
    assert difference["ravan_H"].unique().tolist() == [0.5] and difference["w"].tolist() == [-0.25, -0.25]
    found = with_changes(own, difference, heads)
    assert torch.equal(found["ravan_H"], own["ravan_H"][[0, 2]] + 0.5)
    assert torch.equal(found["w"], trained["w"]) and found["n"] == 4


def test_a_model_in_bfloat16_that_does_not_change_has_no_change():
    start = {"w": torch.tensor([0.1, 0.2, 0.3])}
    in_model = {"w": start["w"].bfloat16()}
    assert not changes(in_model, start)["w"].any()
    found = with_changes(in_model, {"w": torch.full((3,), 0.5)})["w"]
    assert found.dtype == torch.bfloat16 and torch.equal(found, (in_model["w"].float() + 0.5).bfloat16())


MISFITS = {
    "name": ({"v": torch.zeros(2)}, None, "tensor 'v': not expected"),
    "shape": ({"w": torch.zeros(3)}, None, r"must have shape \(2,\), like"),
    "dtype": ({"w": torch.zeros(2, dtype=torch.int64)}, None, "must be torch.float32, got torch.int64"),
    "mask": ({"w": torch.zeros(2)}, {"w": torch.ones(3, dtype=torch.bool)}, "one entry per head"),
    "mask-dtype": ({"w": torch.zeros(2)}, {"w": torch.ones(2)}, "one entry per head"),
    "mask-quantized": ({"w": torch.zeros(2)}, {"w": quantize(torch.ones(2), "int8")}, "one entry per head"),
    "mask-of-more": ({"w": torch.zeros(2)}, {"w": torch.tensor([True, False])}, r"must have shape \(1,\)"),
}  # fmt: skip


@pytest.mark.parametrize("change, heads, message", MISFITS.values(), ids=MISFITS)
def test_changes_that_do_not_fit_are_refused(change, heads, message):
    with pytest.raises(UpdateError, match=message):
        with_changes({"w": torch.zeros(2)}, change, heads)


def test_a_client_of_scaffold_keeps_what_the_server_has_counted():
    old = {"a": torch.tensor([1.0, 2.0]), "gone": torch.tensor([0.3])}
    new = {"a": torch.tensor([1.7, 2.1]), "first": torch.tensor([0.1])}
    change = control_change(old, new)
    assert control_sent(new, change, change) == new
    sent = decompress(compress(change, "int4", seed=1))
    kept = control_sent(new, change, sent)
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, old.get(name, 0) + sent[name])
    assert not torch.equal(kept["a"], new["a"])


# ---- Bytes -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype, num_bytes", [("int8", 65 + 2 * 2), ("int4", 33 + 2 * 2)])
def test_what_65_numbers_cost(dtype, num_bytes):
    sent = quantize(torch.ones(65), dtype)
    assert sent.codes.nbytes + sent.scales.nbytes == num_bytes
    # three tensors of the same name length and shape: nothing else grows
    sizes = [ClientReply(1, "a", update=dict.fromkeys("abc"[:count], sent)).num_bytes for count in (1, 3)]
    assert 2 * num_bytes <= sizes[1] - sizes[0] <= 2 * num_bytes + 40


def minilm() -> BertForSequenceClassification:
    with torch.device("meta"):
        return BertForSequenceClassification(
            BertConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536)
        )


@pytest.mark.parametrize("dtype, bits", [("float32", 32), ("bfloat16", 16), ("int8", 8), ("int4", 4)])
@pytest.mark.parametrize(
    "adapter, most",
    [
        (LoraConfig(r=8, target_modules="all-linear", exclude_modules=["classifier"]), 1.01),
        (RavanConfig(r=16, num_heads=4, target_modules="all-linear", exclude_modules=["classifier"]), 1.03),
    ],
    ids=["lora", "ravan"],
)
def test_an_upload_has_its_numbers_and_scales_and_little_else(dtype, bits, adapter, most):
    model = get_peft_model(minilm(), adapter)
    state = {
        name: torch.zeros(tensor.shape) for name, tensor in model.named_parameters()
        if tensor.requires_grad and not name.endswith("ravan_s.default")
    }  # fmt: skip
    numbers = sum(map(torch.numel, state.values()))
    scales = 2 * sum(-(-tensor.numel() // 64) for tensor in state.values()) if dtype in LEVELS else 0
    reply = ClientReply(1, "client_0", update=compress(state, dtype, seed=0), upload_dtype=dtype)
    assert reply.num_bytes <= most * (numbers * bits / 8 + scales)


# ---- A server --------------------------------------------------------------------


SIZES = {"north": 30, "south": 10}


def make_server(state, upload="int8", download="float32", **settings) -> Server:
    exchange = ExchangeSettings(upload, download)
    return Server(ServerSettings(SIZES, MergeSettings("fedavg"), exchange=exchange, **settings), ServerState(state))


def answer(task: ClientTask, change: dict, dtype="int8", **fields) -> ClientReply:
    update = compress(change, dtype, seed=task.seed)
    return ClientReply.to(task, update=update, num_examples=SIZES[task.client], upload_dtype=dtype, **fields)


def test_a_server_adds_changes_to_its_own_state_and_not_to_what_it_has_sent():
    state = {"w": torch.tensor([0.1, 12.3, -127.0])}
    server = make_server(state, download="int8")
    tasks = server.open(1)
    assert dequantize(tasks[0].state["w"]).tolist() == [0.0, 12.0, -127.0] and tasks[0].state is tasks[1].state
    server.close(1, [answer(task, {"w": torch.tensor([127.0, 0.0, 1.0])}) for task in tasks])
    torch.testing.assert_close(server.state.global_state["w"], state["w"] + torch.tensor([127.0, 0.0, 1.0]))


def test_whole_tensors_and_changes_are_not_mistaken_for_each_other():
    server = make_server({"w": torch.zeros(2)})
    north, south = server.open(1)
    whole = ClientReply.to(south, update={"w": torch.ones(2)}, num_examples=10)
    record = server.close(1, [answer(north, {"w": torch.ones(2)}), whole])
    assert record["clients"] == ["north"] and server.state.global_state["w"].tolist() == pytest.approx(
        [1.0] * 2, rel=1e-2
    )
    [failed] = record["failed_clients"]
    assert failed["reason"] == "client 'south': was asked for changes in int8, and has uploaded whole tensors."
    server = make_server({"w": torch.zeros(2)}, upload="float32")
    north, south = server.open(1)
    assert north.upload_dtype is None
    quantized = replace(answer(south, {"w": torch.ones(2)}), upload_dtype=None)
    replies = [replace(whole, client="north"), quantized]
    record = server.close(1, replies)
    [failed] = record["failed_clients"]
    assert failed["reason"] == "client 'south', tensor 'w': is quantized, but the server has not asked for it."


BAD = {
    "nan": ({"w": torch.tensor([NAN, 1.0])}, "entries are NaN or infinite"),
    "infinite": ({"w": torch.tensor([1.0, INF])}, "entries are NaN or infinite"),
    "shape": ({"w": torch.zeros(3)}, "client 'south', tensor 'w': must have shape (2,)"),
    "name": ({"w": torch.zeros(2), "v": torch.zeros(2)}, "client 'south', tensor 'v': not expected"),
    "missing": ({}, "missing from the update"),
}


@pytest.mark.parametrize("dtype", ["bfloat16", *DTYPES])
@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_a_bad_change_costs_only_its_client(change, message, dtype):
    server = make_server({"w": torch.zeros(2)}, upload=dtype)
    north, south = server.open(1)
    replies = [answer(north, {"w": torch.full((2,), 3.5)}, dtype), answer(south, change, dtype)]
    record = server.close(1, [ClientReply.from_bytes(reply.to_bytes()) for reply in replies])
    assert record["clients"] == ["north"] and message in record["failed_clients"][0]["reason"]
    assert server.state.global_state["w"].tolist() == pytest.approx([3.5, 3.5], rel=1e-2)


@pytest.mark.parametrize("upload", ["float32", "int8"])
def test_heads_and_control_variates_that_are_quantized_unasked_cost_only_their_client(upload):
    quantized = {"w": quantize(torch.ones(2), "int4")}
    for field in ("trained_heads", "control_change"):
        server = make_server({"w": torch.zeros(2)}, upload=upload, scaffold=field == "control_change")
        north, south = server.open(1)
        good, bad = (
            ClientReply.to(
                task, update={"w": torch.ones(2)}, num_examples=10, upload_dtype=task.upload_dtype,
                control_change={"w": torch.ones(2)} if server.settings.scaffold else None,
            )
            for task in (north, south)
        )  # fmt: skip
        record = server.close(1, [good, ClientReply.from_bytes(replace(bad, **{field: quantized}).to_bytes())])
        # changes of control variates may be quantized if uploads are
        expected = ["north", "south"] if upload == "int8" and field == "control_change" else ["north"]
        assert record["clients"] == expected and server.state.global_state["w"].tolist() == [1.0, 1.0]


def test_there_are_four_dtypes(tmp_path):
    with pytest.raises(ValueError, match="`upload_dtype` must be one of float32, bfloat16, int8, int4, got 'int2'"):
        arguments(tmp_path, upload_dtype="int2")
    with pytest.raises(ValueError, match="`download_dtype` must be one of float32, bfloat16, int8, int4, got None"):
        arguments(tmp_path, download_dtype=None)


# ---- Clients ---------------------------------------------------------------------


@pytest.fixture
def quick():
    """Training a client collects garbage, which is fast if the heap is frozen."""
    with frozen_heap():
        yield


def alone(folder, model, **kwargs) -> LocalClient:
    trainer = Trainer(model, arguments(folder, **kwargs), train_dataset=classification_dataset(40))
    return LocalClient(trainer, ClientStore(folder))


@pytest.mark.parametrize("adapter", [ravan, lora])
@pytest.mark.parametrize("upload, download", [("bfloat16", "float32"), ("int4", "float32"), ("int8", "int4")])
def test_a_client_uploads_its_change_from_what_it_was_sent(quick, tmp_path, adapter, upload, download):
    client = alone(tmp_path, get_peft_model(tiny_bert(), adapter()), max_steps=2)
    state = {name: tensor + 0.01 for name, tensor in client.adapter.read().items()}
    sent = compress(state, download)
    task = ClientTask(1, "me", sent, 5)
    whole = client.train(replace(task, state=decompress(sent)))
    reply = client.train(replace(task, upload_dtype=upload))
    for name, change in changes(whole.update, decompress(sent)).items():
        found = reply.update[name]
        if upload == "bfloat16":
            assert ((found.float() - change).abs() <= change.abs() / 128).all()
        else:
            assert ((dequantize(found) - change).abs() <= scales_of(found) * (1 + 1e-6)).all()
            assert found.scales.any()
    again = client.train(replace(task, upload_dtype=upload))
    assert_same(decompress(reply.update), decompress(again.update))
    other = client.train(replace(task, upload_dtype=upload, seed=6))
    assert any(not torch.equal(decompress(other.update)[n], t) for n, t in decompress(reply.update).items())


def test_running_statistics_are_not_rounded(tmp_path):
    model = get_peft_model(
        WithStatistics(), RavanConfig(r=2, num_heads=2, target_modules=["body"], modules_to_save=["head"])
    )
    client = LocalClient(Trainer(model, arguments(tmp_path), train_dataset=classification_dataset(8)))
    exchange = ExchangeSettings("int4", "int4").sparing(client.adapter.statistics)
    sent = exchange.sent(client.adapter.read())
    plain = {name for name, tensor in sent.items() if isinstance(tensor, torch.Tensor)}
    assert plain == set(client.adapter.statistics) and any("running_var" in name for name in plain)
    assert len(plain) < len(sent)
    task = ClientTask(1, "me", sent, 0, upload_dtype="int4")
    uploaded = client._compressed(task, client.adapter.read(), "update")
    assert {name for name, tensor in uploaded.items() if isinstance(tensor, torch.Tensor)} == plain


# ---- Runs ------------------------------------------------------------------------


SMALL = {"num_clients": 3, "max_steps": 1}


def run(folder, adapter=None, **kwargs):
    trainer = make_trainer(folder, adapter, **{**SMALL, **kwargs})
    trainer.train()
    return trainer


def test_float32_is_the_exchange_of_whole_tensors(tmp_path):
    """Clients are sent the tensors of the server, upload what they have trained, and the server takes that as it is."""
    trainer = make_trainer(tmp_path, **SMALL, num_rounds=1, upload_dtype="float32", download_dtype="float32")
    replies, task_states = [], []

    class Watched(Runner):
        def run(self, tasks, work):
            for task in tasks:
                assert task.upload_dtype is None
                task_states.append(task.state)
                replies.append(work(task))
                yield replies[-1]

    trainer._runner = Watched()
    start = adapter_state(trainer)
    trainer.train()
    for state in task_states:
        assert_same(state, start)
    assert all(reply.upload_dtype is None for reply in replies)
    updates = [ClientUpdate(reply.update, reply.num_examples, reply.client) for reply in replies]
    assert_same(trainer.last_global_state, merge(start, updates, "ravan").state)
    trainer.save_model(str(tmp_path / "saved"))
    assert "Compression" not in (tmp_path / "saved" / "README.md").read_text()


RUNS = {
    "ravan": {"upload_dtype": "int4", "max_update_norm": "1*median"},
    "lora": {
        "upload_dtype": "int8", "download_dtype": "int8", "adapter": lora, "local_parameters": ["classifier"],
    },
    "budgets": {"upload_dtype": "int8", "download_dtype": "int4", "client_budgets": 0.4, "head_selection": "gradient"},
    "scaffold": {"upload_dtype": "int8", "download_dtype": "int8", "scaffold": True, "optim": "sgd"},
    "privacy": {"upload_dtype": "int4", "privacy": {"clip_norm": 0.05, "noise_multiplier": 0.1, "noise_seed": 11}},
    "rolora": {"upload_dtype": "bfloat16", "merge_method": "rolora", "adapter": lora},
    "flexlora": {"upload_dtype": "int8", "download_dtype": "int8", "merge_method": "flexlora", "adapter": lora},
    "round_zero": {
        "upload_dtype": "int4", "download_dtype": "int8", "bases_warmup_steps": 1, "bases_batches": 1,
        "adapter": lambda: RavanConfig(r=3, num_heads=2, init_bases="gradient_svd", task_type="SEQ_CLS"),
    },
}  # fmt: skip


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_run_over_bytes_is_the_run(tmp_path, options):
    options = dict(options)
    adapter = options.pop("adapter", ravan)
    direct = run(tmp_path / "direct", adapter(), **options)
    assert not any(record["failed_clients"] for record in direct.state.log_history)
    sent = make_trainer(tmp_path / "sent", adapter(), **SMALL, **options)
    sent._runner = runner = OverBytes()
    output = sent.train()
    assert_same(direct.last_global_state, sent.last_global_state)
    for one, other in zip(kept_by_clients(direct).values(), kept_by_clients(sent).values(), strict=True):
        assert_same(one, other)
    assert output.metrics["upload_bytes"] == runner.up
    if direct.state.log_history[0]["round"]:  # round 0 also counts the bases, which are sent to all
        assert output.metrics["download_bytes"] == runner.down


@pytest.mark.parametrize(
    "options",
    [
        {"upload_dtype": "int8", "download_dtype": "int8", "adapter": lora, "merge_method": "flexlora"},
        {"upload_dtype": "int4", "download_dtype": "int8", "client_budgets": 0.4},
    ],
    ids=["flexlora", "budgets"],
)
def test_a_run_is_near_the_one_in_which_nothing_is_rounded(tmp_path, options):
    options = {"max_steps": 3, **options}
    adapter = options.pop("adapter", ravan)
    rounded = run(tmp_path / "rounded", adapter(), **options)
    exact = run(tmp_path / "exact", adapter(), **{**options, "upload_dtype": "float32", "download_dtype": "float32"})
    start = adapter_state(make_trainer(tmp_path / "start", adapter()))
    moved = math.hypot(*((tensor - start[name]).norm() for name, tensor in exact.last_global_state.items()))
    apart = math.hypot(
        *((tensor - rounded.last_global_state[name]).norm() for name, tensor in exact.last_global_state.items())
    )
    assert 0 < apart < 0.5 * moved
    assert rounded.state.log_history[-1]["upload_bytes"] < 0.6 * exact.state.log_history[-1]["upload_bytes"]


@pytest.mark.parametrize("upload, download", [("float32", "int8"), ("int4", "int4"), ("int8", "bfloat16")])
def test_rounded_downloads_leave_no_trace_in_the_state_of_the_server(quick, tmp_path, download, upload):
    model = get_peft_model(tiny_bert(), lora())
    client = alone(tmp_path, model, max_steps=1, learning_rate=0.0)
    state = {name: torch.randn(tensor.shape, generator=seeded(0)) for name, tensor in client.adapter.read().items()}
    exchange = ExchangeSettings(upload, download)
    server = Server(ServerSettings(SIZES, MergeSettings("fedavg"), exchange=exchange), ServerState(state))
    for round_number in (1, 2):
        tasks = server.open(round_number)
        record = server.close(round_number, [client.train(task) for task in tasks])
        assert not record["failed_clients"]
    assert_same(server.state.global_state, state)


def test_adapters_in_bfloat16_are_rounded_too(tmp_path):
    trainer = make_trainer(
        tmp_path, lora(), tiny_bert().bfloat16(), **SMALL, upload_dtype="int8", download_dtype="int8"
    )
    start = adapter_state(trainer)
    trainer.train()
    assert not any(record["failed_clients"] for record in trainer.state.log_history)
    assert {tensor.dtype for tensor in trainer.last_global_state.values()} == {t.dtype for t in start.values()}
    assert any(not torch.equal(tensor, start[name]) for name, tensor in trainer.last_global_state.items())


def test_nan_costs_only_its_client_and_privacy_clips_what_is_read(tmp_path):
    def fault(client, round_number, update):
        if client == "client_1":
            next(iter(update.state.values())).view(-1)[0] = NAN
        for tensor in update.state.values() if client == "client_0" else ():
            tensor.mul_(0).add_(1e3)

    privacy = {"clip_norm": 1.0, "noise_multiplier": 1e-6, "noise_seed": 3}
    trainer = run(tmp_path, client_fault=fault, num_rounds=1, upload_dtype="int4", privacy=privacy)
    [record] = trainer.state.log_history
    assert [entry["client"] for entry in record["failed_clients"]] == ["client_1"]
    start = adapter_state(make_trainer(tmp_path / "start"))
    moved = math.hypot(*((tensor - start[name]).norm() for name, tensor in trainer.last_global_state.items()))
    assert 0 < moved <= 1.0 * 2 / 3 + 1e-3  # two clients of three, each clipped to 1


def test_the_mean_of_what_clients_of_scaffold_keep_is_that_of_the_server(tmp_path):
    trainer = run(tmp_path, scaffold=True, optim="sgd", upload_dtype="int4", download_dtype="int4", num_rounds=3)
    server, kept = trainer.last_server_state, kept_by_clients(trainer)
    for name, control in server.control.items():
        mean = sum(tensors[f"scaffold.{name}"] for tensors in kept.values()) / len(kept)
        torch.testing.assert_close(control, mean, atol=1e-6, rtol=1e-4)


def test_sketches_are_sent_in_8_bits_and_still_give_bases(tmp_path):
    def opened(folder, **options):
        adapter = RavanConfig(r=3, num_heads=2, init_bases="gradient_svd", task_type="SEQ_CLS")
        return run(folder, adapter, num_rounds=1, max_steps=1, bases_warmup_steps=0, bases_batches=2, **options)

    exact, rounded = (
        opened(tmp_path / "exact", upload_dtype="float32"),
        opened(tmp_path / "rounded", upload_dtype="int4"),
    )
    bytes_of = [trainer.state.log_history[0]["upload_bytes"] for trainer in (exact, rounded)]
    assert 0.5 < bytes_of[1] / bytes_of[0] < 0.65  # 8 bits and a scale instead of 16, and the list of the tensors
    for (name, one), (_, other) in zip(exact.model.named_buffers(), rounded.model.named_buffers(), strict=True):
        if ".ravan_A" in name:  # the leading directions are the same ones
            assert torch.linalg.svdvals(one[:2] @ other.T).min() > 0.9, name


def test_a_resumed_run_is_the_uninterrupted_one_and_may_change_the_dtype(tmp_path, monkeypatch):
    options = {
        "upload_dtype": "int4",
        "download_dtype": "int8",
        "scaffold": True,
        "eval_strategy": "no",
        "num_rounds": 3,
    }
    whole = resumable_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = resumed_after(2, whole, tmp_path / "run", **options)
    assert_same(whole.last_global_state, resumed.last_global_state)
    assert comparable(whole.state.log_history) == comparable(resumed.state.log_history)
    warnings = logged(monkeypatch)
    other = resumable_trainer(tmp_path / "run", **{**options, "upload_dtype": "float32"})
    other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert any("upload_dtype ('int4', now 'float32')" in warning for warning in warnings)
    assert any(not torch.equal(tensor, whole.last_global_state[n]) for n, tensor in other.last_global_state.items())


def test_the_card_says_how_tensors_were_sent(tmp_path):
    trainer = run(tmp_path / "a", num_rounds=1, upload_dtype="int8")
    trainer.save_model(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "uploads are changes in int8 in blocks of 64, downloads are in float32" in card
