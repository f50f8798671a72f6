"""`peft-ravan plan`: what it states is what a round costs, and what it recommends fits."""

import re

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from peft_ravan import RavanConfig
from peft_ravan.trainers import FederatedArguments, FederatedTrainer
from peft_ravan.trainers.commands import PlanRequest, parse_bytes, plan_uploads
from peft_ravan.trainers.commands.planning import upload_bytes
from peft_ravan.trainers.quantization import SENT_DTYPES

from ..conftest import classification_dataset, tiny_llama
from .conftest import assert_refused, place, run, saved  # noqa: F401


# what the lengths of texts and numbers in a reply can make of a difference
TEXTS = 32


def upload_of_a_round(config, upload_dtype: str) -> float:
    """The bytes that a client uploaded in a real round, as they are recorded."""
    args = FederatedArguments(
        "out", num_clients=2, num_rounds=1, max_steps=1, upload_dtype=upload_dtype, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    base_model = AutoModelForSequenceClassification.from_pretrained("base")
    trainer = FederatedTrainer(get_peft_model(base_model, config), args, train_dataset=classification_dataset(32))
    trainer.train()
    [record] = [record for record in trainer.state.log_history if "upload_bytes" in record and "round" in record]
    return record["upload_bytes"] / 2


@pytest.mark.parametrize("upload_dtype", SENT_DTYPES)
def test_the_bytes_are_those_of_a_real_round(place, upload_dtype):  # noqa: F811
    plan = plan_uploads(PlanRequest("base", "4KB", upload_dtype=upload_dtype))
    found = {choice.num_heads: choice for choice in plan.choices}
    for num_heads, choice in found.items():
        if num_heads not in (4, None):
            continue
        size = {"r": choice.r, "task_type": "SEQ_CLS"}
        config = LoraConfig(**size) if num_heads is None else RavanConfig(num_heads=num_heads, **size)
        assert abs(upload_of_a_round(config, upload_dtype) - choice.upload_bytes) <= TEXTS


def test_the_task_head_is_what_is_uploaded_besides_the_adapter(place):  # noqa: F811
    with_head, without = (
        upload_of_a_round(RavanConfig(r=2, num_heads=4, target_modules=["query"], modules_to_save=modules), "float32")
        for modules in (["classifier"], None)
    )
    head = plan_uploads(PlanRequest("base", "4KB", upload_dtype="float32")).uploads.task_head_bytes
    assert head == 4 * 4 * (32 + 1)  # 4 labels, width 32, float32
    # and its names
    assert head < with_head - without < head + 200


def test_each_choice_is_the_largest(place):  # noqa: F811
    plan = plan_uploads(PlanRequest("base", "1060"))
    assert plan.uploads.smallest_side == 32 and plan.recommended.num_heads == 4
    for choice in plan.choices:
        assert choice.upload_bytes <= 1060 and choice.update_rank <= 32
        next_larger = upload_bytes(plan.uploads.shapes(choice.r + 1, choice.num_heads), "int4")
        assert (next_larger <= 1060) == choice.is_limited
        assert not choice.is_limited or choice.r == 32 // choice.num_heads
    ravan = [choice for choice in plan.choices if choice.num_heads == 4]
    assert [choice.trained for choice in ravan] == [4 * 4 * (ravan[0].r ** 2 + 1)]  # 4 targets, 4 heads


def test_where_four_heads_do_not_fit_the_smallest_weight_fewer_use_the_budget(place):  # noqa: F811
    plan = plan_uploads(PlanRequest("base", "1MB"))
    assert plan.recommended.num_heads == 1 and plan.recommended.r == 32 and plan.recommended.is_limited


def test_the_command(place):  # noqa: F811
    ended = run("plan", "base", "--budget", "1.3kb", "--target-modules", "query,key,value")
    assert ended.code == 0, ended
    assert "BertForSequenceClassification: 6 weights are adapted (key, query, value)." in ended.out
    assert max(map(len, ended.out.splitlines()[:14])) <= 80
    [code] = re.findall(r"^ +(RavanConfig\(.*\))$", ended.out, flags=re.MULTILINE)
    config = eval(code, {"RavanConfig": RavanConfig})
    assert config.target_modules == {"query", "key", "value"} and config.num_heads == 4
    assert f"--adapter.r {config.r} --adapter.num_heads 4 --adapter.target_modules '[query, key, value]'" in ended.out


def test_a_language_model_has_no_task_head(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").unlink()  # only the configuration is read
    plan = plan_uploads(PlanRequest(str(tmp_path / "llama"), "4KB"))
    assert plan.task == "sft" and plan.uploads.task_head_bytes == 0 and len(plan.targets) == 4


@pytest.mark.parametrize(
    ("text", "size"), [("1MB", 10**6), ("1.5mb", 1_500_000), ("512KiB", 2**19), ("65536", 65536), (" 2 kb", 2000)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["base", "--budget", "much"], "such as 500KB, 1MB or 512KiB, got 'MUCH'"),
        (["base", "--budget", "0MB"], "got '0MB'"),
        (["base", "--budget", "500"], "A budget of 500 bytes is too small: one head of rank 1 takes"),
        (["base", "--budget", "1MB", "--upload-dtype", "int2"], "must be one of float32, bfloat16, int8, int4"),
        (["base", "--budget", "1MB", "--task", "poetry"], "`task` must be one of classification, sft"),
        (["base", "--budget", "1MB", "--target-modules", "none"], "none of the target modules 'none'"),
        (["nowhere", "--budget", "1MB"], "The configuration of 'nowhere' could not be loaded"),
    ],
)
def test_what_cannot_be_planned(place, words, reason):  # noqa: F811
    assert_refused(run("plan", *words), reason)
