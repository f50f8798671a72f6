"""An adapter may have any name. PEFT saves one that is not named "default" in a subfolder of its name."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file

from peft_ravan import RavanConfig, push_to_hub
from peft_ravan.trainers import CheckpointError, FederatedCallback

from ..conftest import make_tokenizer, tiny_bert
from .helpers import (
    FILES,
    REPO,
    SMALL,
    adapter_state,
    assert_same,
    interrupted,
    logged,
    logits,
    lora,
    make_trainer,
    ravan,
    resumable_trainer,
)


OPTIONS = {"max_steps": 1, "num_rounds": 3, "eval_strategy": "no", "scaffold": True, "local_parameters": "classifier"}


@pytest.mark.parametrize("adapter", [ravan, lora])
def test_a_run_goes_on_with_an_adapter_of_any_name(tmp_path, adapter):
    whole = resumable_trainer(tmp_path / "whole", adapter=adapter(), **OPTIONS)
    whole.train()
    options = {**OPTIONS, "adapter_name": "ward"}
    interrupted(tmp_path / "named", 2, adapter=adapter(), **options)
    resumed = resumable_trainer(tmp_path / "named", adapter=adapter(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(adapter_state(resumed), adapter_state(whole))
    for number in range(4):
        named = tmp_path / "named" / f"checkpoint-{number}" / "ward"
        default = tmp_path / "whole" / f"checkpoint-{number}"
        assert_same(*(load_file(folder / "adapter_model.safetensors") for folder in (named, default)))
        # the files that belong to the adapter are next to it
        own = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        assert {path.name for path in named.iterdir()} == own | (
            {"federation.json", "rounds.jsonl"} if number else set()
        )


def test_bases_from_gradients_are_taken_from_the_checkpoint(tmp_path):
    adapter = RavanConfig(r=2, num_heads=2, init_bases="gradient_svd", task_type="SEQ_CLS")
    options = {"max_steps": 1, "num_rounds": 2, "adapter": adapter, "adapter_name": "ward"}
    interrupted(tmp_path, 1, **options)
    resumed = resumable_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    saved = load_file(tmp_path / "checkpoint-1" / "ward" / "adapter_model.safetensors")
    end = load_file(tmp_path / "checkpoint-2" / "ward" / "adapter_model.safetensors")
    bases = [name for name in saved if "ravan_A" in name]
    assert bases and all(torch.equal(saved[name], end[name]) and saved[name].any() for name in bases)


def test_its_weights_are_hashed(tmp_path):
    options = {"max_steps": 1, "num_rounds": 1, "adapter_name": "ward"}
    resumable_trainer(tmp_path, **options).train()
    path = tmp_path / "checkpoint-1" / "ward" / "adapter_model.safetensors"
    listed = json.loads((tmp_path / "checkpoint-1" / "federation_state.json").read_text())["files"]
    assert "ward/adapter_model.safetensors" in listed and "training_args.bin" in listed
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="ward/adapter_model.safetensors is not what was written"):
        resumable_trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_checkpoint_of_an_adapter_of_another_name_is_refused(tmp_path):
    options = {"max_steps": 1, "num_rounds": 1}
    resumable_trainer(tmp_path, **options).train()
    with pytest.raises(CheckpointError, match="other name of the adapter .'default', not 'ward'."):
        resumable_trainer(tmp_path, **options, adapter_name="ward").train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


@pytest.mark.parametrize("name", ["default", "ward"])
def test_the_best_adapter_is_loaded_at_the_end(tmp_path, name):
    trainer = resumable_trainer(
        tmp_path, max_steps=1, num_rounds=3, load_best_model_at_end=True, metric_for_best_model="accuracy",
        adapter_name=name,
    )  # fmt: skip
    trainer.compute_metrics = lambda prediction: {"accuracy": [0.1, 0.9, 0.3][trainer.state.global_step - 1]}
    trainer.train()
    folder = tmp_path / "checkpoint-2" / ("" if name == "default" else name)
    saved = PeftModel.from_pretrained(tiny_bert(), folder)
    assert torch.equal(logits(saved), logits(trainer.model))
    last = PeftModel.from_pretrained(tiny_bert(), str(folder).replace("checkpoint-2", "checkpoint-3"))
    assert not torch.equal(logits(last), logits(trainer.model))


def test_a_best_adapter_that_was_deleted_is_reported(tmp_path, monkeypatch):
    class Delete(FederatedCallback):
        def on_save(self, args, state, control, **kwargs):
            shutil.rmtree(tmp_path / f"checkpoint-{state.global_step}")

    warnings = logged(monkeypatch)
    trainer = resumable_trainer(tmp_path, max_steps=1, num_rounds=2, load_best_model_at_end=True, callbacks=[Delete()])
    trainer.train()
    assert "The best adapter is not in" in warnings[0] and len(trainer.state.log_history) == 2
    assert_same(adapter_state(trainer), trainer.last_global_state)


def test_another_adapter_of_the_model_is_left_alone(tmp_path):
    trainer = resumable_trainer(tmp_path, max_steps=1, num_rounds=2, adapter_name="ward")
    trainer.model.add_adapter("default", RavanConfig(r=2, num_heads=2, task_type="SEQ_CLS"))
    trainer.model.set_adapter("ward")
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad_("ward" in name)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items() if ".default." in name}
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    assert_same(before, {n: t for n, t in trainer.model.state_dict().items() if ".default." in n})
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (folder, folder / "ward")]
    assert [config["num_heads"] for config in configs] == [2, 3]


def test_it_is_shared_with_its_card_its_record_and_its_twin(hub, tmp_path):
    trainer = make_trainer(tmp_path, adapter_name="ward", eval_strategy="epoch", **SMALL)
    trainer.processing_class = make_tokenizer()
    trainer.train()
    trainer.push_to_hub(dataset_tags="a/b")
    uploaded = hub.files(REPO)
    assert FILES | {"rounds.png", "tokenizer.json", "tokenizer_config.json"} == set(uploaded)
    card = ModelCard(uploaded["README.md"].decode())
    assert "| Merge method |" in card.text and "](rounds.png)" in card.text
    assert card.data.eval_results and "adapter_model.safetensors`" in card.text.replace("|", "`")
    ravan_adapter = PeftModel.from_pretrained(tiny_bert(), REPO, subfolder="ravan")
    assert torch.equal(logits(ravan_adapter), logits(trainer.model))
    twin = PeftModel.from_pretrained(tiny_bert(), REPO)
    torch.testing.assert_close(logits(twin), logits(trainer.model), atol=1e-5, rtol=0)


def test_it_is_pushed_while_it_trains_and_from_its_folder(hub, tmp_path):
    trainer = make_trainer(tmp_path, adapter_name="ward", push_to_hub=True, save_strategy="epoch", **SMALL)
    trainer.train()
    assert set(hub.files(REPO)) == FILES
    trainer.save_model(str(tmp_path / "saved"), _internal_call=True)
    for folder, options in ((tmp_path / "saved", {"adapter_name": "ward"}), (tmp_path / "saved" / "ward", {})):
        push_to_hub(folder, "tester/again", **options)
        assert set(hub.files("tester/again")) == FILES
        pushed = PeftModel.from_pretrained(tiny_bert(), "tester/again", subfolder="ravan")
        assert torch.equal(logits(pushed), logits(trainer.model))
