"""Answers as texts are judged as if they had been generated, and CLIP's head is made of the names of classes."""

import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from .conftest import VOCAB_SIZE, make_tokenizer, sentence, tiny_llama


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # where a script finds the others

from answer_jobs import Answers  # noqa: E402
from generation import GeneratingTrainer, last_number, prompts, word_f1  # noqa: E402
from image_jobs import ClipImages  # noqa: E402
from real_data import label_column, load_splits  # noqa: E402


PAD, END = 60, 61  # of the tokenizer
QUESTIONS = [" ".join(sentence(index).split()[: 2 + index % 3]) for index in range(6)]


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB_SIZE, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=PAD,
            eos_token_id=END, decoder_start_token_id=PAD,
        )
    )  # fmt: skip
    torch.nn.init.normal_(model.lm_head.weight)  # so that answers differ
    return model


@pytest.fixture(params=[tiny_llama, tiny_t5], ids=["decoder", "encoder-decoder"])
def job_of(request, tmp_path):
    """Makes a job of questions that have the given answers."""
    request.param().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")

    def job_of(answers: list, **given) -> Answers:
        rows = {"question": QUESTIONS[: len(answers)], "answer": answers, "kind": ["x", "y", "x"] * 2}
        rows["kind"] = rows["kind"][: len(answers)]
        for split in ("train", "test"):
            datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"{split}.parquet")
        given = {"prompt": "{question}", "max_length": 16, "answer_length": 4, "answer": "answer", **given}
        return Answers(data=str(tmp_path), model=str(tmp_path / "model"), folder=tmp_path, **given)

    return job_of


@torch.no_grad()
def generated(job: Answers) -> list[list[int]]:
    """The tokens that the model answers, one question at a time."""
    model, found = job.make_model().eval(), []
    for question in job.test["question"]:
        tokens = job.tokenizer(question, return_tensors="pt").input_ids
        answer = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False)[0]
        found.append(answer[1 if job.has_encoder else tokens.shape[1] :].tolist())
    return found


def test_an_exact_answer_is_what_would_be_generated(job_of, monkeypatch):
    job = job_of(generated(job_of([""] * len(QUESTIONS))))
    monkeypatch.setattr(job, "_answer_tokens", lambda row: row["answer"])
    wrong = [{**row, "answer": [*row["answer"][:-1], row["answer"][-1] ^ 1]} for row in job.test]
    for rows, expected in ((job.test.to_list(), 1), (wrong, 0)):
        batch = job.collator(rows)
        with torch.no_grad():
            logits = job.make_model().eval()(**batch).logits
        predicted = job.predicted(logits, batch["labels"]).numpy()
        assert job.hits(predicted, batch["labels"].numpy(), job.test).tolist() == [expected] * len(QUESTIONS)


def test_only_the_answer_is_trained(job_of):
    job = job_of(["w1 w2", "w3"])
    batch = job.collator(job.test.to_list())
    answers = [[1, 2, END], [3, END]]
    assert [row[row >= 0].tolist() for row in batch["labels"]] == answers
    given = prompts(batch, PAD, not job.has_encoder)
    asked = [row[mask.bool()].tolist() for row, mask in zip(*given.values(), strict=True)]
    assert asked == [job.tokenizer(question).input_ids for question in job.test["question"]]
    if not job.has_encoder:
        inputs = [
            row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert inputs == [prompt + answer for prompt, answer in zip(asked, answers, strict=True)]
        assert given["input_ids"][0, 0] == PAD  # the shorter one, on the left


def test_long_questions_and_answers_are_cut(job_of):
    job = job_of(["w1 w2 w3 w4 w5", "w6"], prompt="{question} w10 w11 w12", max_length=7)
    batch = job.collator(job.test.to_list())
    assert batch["labels"][0][batch["labels"][0] >= 0].tolist() == [1, 2, 3, END]
    if job.has_encoder:
        assert batch["input_ids"].shape[1] <= 7
    else:  # the end of the prompt is what is asked for
        assert batch["input_ids"][0].tolist() == [10, 11, 12, 1, 2, 3, END]


def test_the_trainer_predicts_what_the_model_generates(job_of, tmp_path):
    job = job_of(["w1 w2"] * len(QUESTIONS), judge="f1")
    assert issubclass(job.trainer_class, GeneratingTrainer)
    args = TrainingArguments(
        str(tmp_path / "out"),
        per_device_eval_batch_size=4,
        use_cpu=True,
        remove_unused_columns=False,
        report_to="none",
    )
    trainer = GeneratingTrainer(job.make_model(), args, data_collator=job.collator)
    found = trainer.predict(job.test)
    expected = generated(job)
    assert found.predictions.shape[0] == len(QUESTIONS)
    for row, tokens in zip(found.predictions, expected, strict=True):
        row = row[1:] if job.has_encoder else row
        assert row[: len(tokens)].tolist() == tokens and set(row[len(tokens) :]) <= {PAD, -100}
    texts = job.tokenizer.batch_decode(expected, skip_special_tokens=True)
    right = job_of([[text, "w1"] for text in texts], judge="f1")
    assert right.hits(found.predictions, found.label_ids, right.test).tolist() == [1.0] * len(QUESTIONS)


def test_classes_can_be_a_column_of_texts(job_of):
    job = job_of(["a", "b", "c"], classes="kind", answer=None)
    assert job.test["labels"] == [0, 1, 0] and job._answers(job.test[1]) == ["y"]
    with pytest.raises(ValueError, match="judged by exact, f1, number, got 'bleu'"):
        job_of(["a"], judge="bleu")


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [("The Eiffel tower.", "eiffel Tower", 1), ("in Paris", "Paris", 2 / 3), ("Rome", "Paris", 0), ("", "the", 1)],
)
def test_f1_of_words(answer, right, expected):
    assert word_f1(answer, right) == pytest.approx(expected)


def test_the_last_number():
    assert [last_number(text) for text in ("2 + 2 = 4\n#### 1,004", "-3.50 dollars", "none.")] == [
        "1004",
        "-3.50",
        None,
    ]


def test_the_head_of_clip_is_made_of_the_names(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "eos_token_id": END}
    image = {"image_size": 16, "patch_size": 8}
    clip = CLIPModel(
        CLIPConfig(text_config={**sizes, **text}, vision_config={**sizes, **image}, projection_dim=8)
    ).eval()
    clip.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        tmp_path / "model"
    )
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["w1_w2", "w3"]))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 20, 16, 3), dtype=np.uint8)
    rows = {"image": [Image.fromarray(one) for one in pixels], "label": [0, 1, 0, 1]}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")

    job = ClipImages(data=str(tmp_path), model=str(tmp_path / "model"), folder=tmp_path, prompt="w9 {}")
    batch = job.collator(list(job.test))
    with torch.no_grad():
        found = job.make_model()(**batch)
        tokens = text_tokens(["w9 w1 w2", "w9 w3"])
        expected = clip(pixel_values=batch["pixel_values"], **tokens).logits_per_image
    torch.testing.assert_close(found.logits, expected)
    torch.testing.assert_close(found.loss, torch.nn.functional.cross_entropy(expected, torch.tensor([0, 1, 0, 1])))


def text_tokens(texts: list[str]) -> dict[str, torch.Tensor]:
    return make_tokenizer()(texts, padding=True, return_tensors="pt")


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        ({"label": [2, 0, 2]}, ["0", "1", "2"]),
        ({"label": [2, 0, 2], "label_text": ["c", "a", "c"]}, ["a", "1", "c"]),
        ({"labels": [0, 1, 1]}, ["0", "1"]),
    ],
)
def test_integers_are_read_as_classes(tmp_path, columns, names):
    """As those of SetFit/20_newsgroups, for example."""
    for split in ("train", "test"):
        datasets.Dataset.from_dict({"text": ["x", "y", "z"], **columns}).to_parquet(tmp_path / f"{split}.parquet")
    splits = load_splits(str(tmp_path))
    column = label_column(splits["train"])
    assert [rows[column] for rows in splits.values()] == [columns[column]] * 2
    assert splits["test"].features[column].names == names


def test_a_column_that_has_no_integers_is_left_as_it_is(tmp_path):
    for split in ("train", "test"):
        datasets.Dataset.from_dict({"text": ["x"], "label": ["a"]}).to_parquet(tmp_path / f"{split}.parquet")
    assert load_splits(str(tmp_path))["train"]["label"] == ["a"]
