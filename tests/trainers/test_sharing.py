"""The uploads of `trainer.push_to_hub()` and of pushes during training, through huggingface_hub's own client."""

import contextlib
import json
import sys
import time
from concurrent.futures import Future

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers.utils.hub import PushInProgress

from peft_ravan import RavanConfig
from peft_ravan.sharing import model_card
from peft_ravan.sharing.federation_record import read_history
from peft_ravan.sharing.saved_card import card_is_left_to_caller
from peft_ravan.trainers import history_table, plot_history, sharing

from ..conftest import classification_dataset, tiny_bert
from .helpers import FILES, REPO, SMALL, logits, make_trainer


def card_of(hub) -> ModelCard:
    return ModelCard(hub.files(REPO)["README.md"].decode())


def test_a_federation_is_shared_with_its_record(hub, tmp_path):
    clients = {name: classification_dataset(8, seed=i) for i, name in enumerate(["Dr Smith", "Dr Jones"])}
    trainer = make_trainer(
        tmp_path, train_dataset=clients, num_clients=None, clients_per_round=None, eval_strategy="epoch", **SMALL
    )
    trainer.train()
    commit = trainer.push_to_hub(dataset_tags="clinc/clinc_oos", license="mit", tags="medical")
    assert commit.commit_message == "End of training" and set(hub.files(REPO)) == FILES | {"rounds.png"}
    assert hub.files(REPO)["rounds.png"].startswith(b"\x89PNG")

    model = trainer.model
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_bert(), REPO, subfolder="ravan")), logits(model))
    twin = PeftModel.from_pretrained(tiny_bert(), REPO)
    torch.testing.assert_close(logits(twin), logits(model), atol=1e-5, rtol=0)

    card = card_of(hub)
    assert card.data.datasets == ["clinc/clinc_oos"] and card.data.license == "mit" and "medical" in card.data.tags
    last = trainer.state.log_history[-1]
    assert {r.metric_type: r.metric_value for r in card.data.eval_results}["accuracy"] == last["eval_accuracy"]
    assert "# ward-notes" in card.text and "BertForSequenceClassification.from_pretrained" in card.text
    assert (
        "| Downloaded |" in card.text and "](rounds.png)" in card.text and "The adapter was trained with" in card.text
    )
    assert b"Dr Smith" not in b"".join(hub.files(REPO).values())

    (tmp_path / "shared.jsonl").write_bytes(hub.files(REPO)["rounds.jsonl"])
    shared = read_history(tmp_path / "shared.jsonl")
    assert history_table(shared).equals(trainer.history_table())
    assert {client for record in shared for client in record["clients"]} == {"client 1", "client 2"}


def test_the_results_are_those_of_the_best_round_if_its_adapter_is_taken(hub, tmp_path):
    trainer = make_trainer(
        tmp_path, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="loss",
        learning_rate=0.5, **{**SMALL, "num_rounds": 3},
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub(dataset_tags="a/b")
    best = trainer.state.best_global_step
    assert best < 3  # with this learning rate it does not get better all the time
    losses = [trainer.state.log_history[number]["eval_loss"] for number in (best - 1, -1)]
    assert losses[0] < losses[1]
    card = card_of(hub)
    assert f"After round {best}:" in card.text and f"| loss | {losses[0]:.4f} |" in card.text
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"accuracy": trainer.state.log_history[best - 1]["eval_accuracy"]}


def test_the_data_set_of_the_evaluation_says_which_split_it_is(hub, tmp_path):
    trainer = make_trainer(tmp_path, eval_strategy="epoch", hub_ravan_at_root=True, **SMALL)
    trainer.eval_dataset = datasets.Dataset.from_dict(trainer.eval_dataset.to_dict(), split="validation")
    trainer.model.config.id2label = {0: "calm", 1: "busy", 2: "late", 3: "quiet"}
    trainer.train()
    with pytest.raises(ValueError, match="Did you mean `apache-2.0`"):
        trainer.push_to_hub(license="apache2")
    assert hub.requests == []
    trainer.push_to_hub(dataset_tags="clinc/clinc_oos")
    [result] = card_of(hub).data.eval_results
    assert (result.dataset_split, result.metric_type) == ("validation", "accuracy")
    assert card_of(hub).data.model_name == "ward-notes"
    assert {"lora/adapter_config.json", "id2label.json"} <= hub.files(REPO).keys()
    assert json.loads(hub.files(REPO)["adapter_config.json"])["peft_type"] == "RAVAN"


def test_pushes_while_it_trains(hub, tmp_path):
    trainer = make_trainer(
        tmp_path, push_to_hub=True, save_strategy="epoch", hub_private_repo=True, hub_token="hf_mine", hub_always_push=True,
        hub_revision="seed-2", **SMALL,
    )  # fmt: skip
    trainer.train()
    assert hub.messages == ["Training in progress, round 1", "Training in progress, round 2"]
    assert set(hub.files(REPO, "seed-2")) == FILES and set(hub.files(REPO)) == {".gitattributes"}
    assert hub.private[REPO] and hub.tokens == {"hf_mine"}
    rounds = [json.loads(line)["round"] for line in hub.files(REPO, "seed-2")["rounds.jsonl"].splitlines()]
    assert rounds == [1, 2]
    loaded = PeftModel.from_pretrained(tiny_bert(), REPO, revision="seed-2", subfolder="ravan")
    assert torch.equal(logits(loaded), logits(trainer.model))
    everything = b"".join(hub.objects.values()) + b"".join(
        content for branch in hub.repos[REPO].values() for files in branch for content in files.values()
    )
    assert b"hf_mine" not in everything and str(tmp_path).encode() not in everything

    trainer.save_model()  # as in Trainer, a call by the user pushes
    assert hub.messages[2:] == ["Model save"]


@pytest.mark.parametrize("always", [False, True])
def test_a_push_that_takes_long_delays_or_skips_the_next(hub, tmp_path, always):
    trainer = make_trainer(tmp_path, push_to_hub=True, save_strategy="epoch", hub_always_push=always, **SMALL)
    trainer.push_in_progress = PushInProgress([busy := Future()])
    trainer.add_callback(Finisher(busy))
    trainer.train()
    assert len(hub.messages) == (2 if always else 1)  # done after the first round


class Finisher:
    def __init__(self, job):
        self.job = job

    def __getattr__(self, name):
        if not name.startswith("on_"):
            raise AttributeError(name)
        return self._finish if name == "on_save" else lambda *args, **kwargs: None

    def _finish(self, args, state, control, **kwargs):
        if not self.job.done():
            self.job.set_result(None)


def test_strategies_of_pushing(hub, tmp_path):
    trainer = make_trainer(tmp_path, push_to_hub=True, save_strategy="epoch", hub_strategy="end", **SMALL)
    trainer.train()
    assert hub.messages == []
    for strategy in ("checkpoint", "all_checkpoints"):
        with pytest.raises(ValueError, match=f"`hub_strategy='{strategy}'` would upload checkpoints"):
            make_trainer(tmp_path, push_to_hub=True, hub_strategy=strategy)


def test_training_goes_on_if_a_push_fails(hub, tmp_path, caplog):
    trainer = make_trainer(tmp_path, push_to_hub=True, save_strategy="epoch", **SMALL)
    hub.breaks = ["/commit/"] * 20
    trainer.train()
    assert [record["round"] for record in trainer.state.log_history] == [1, 2] and hub.messages == []
    deadline = time.monotonic() + 60
    while "A push" not in caplog.text and time.monotonic() < deadline:  # it continues in the background
        time.sleep(0.05)
    assert "A push to the Hub failed, and training goes on. The upload to 'tester/ward-notes'" in caplog.text
    hub.breaks = []
    trainer.push_to_hub()
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_bert(), REPO, subfolder="ravan")), logits(trainer.model))


def test_only_the_first_process_pushes(hub, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, save_strategy="epoch", **SMALL)
    trainer.train()
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    assert trainer.push_to_hub() is None
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert hub.requests == []


def test_without_matplotlib_the_card_says_that_there_is_no_picture(hub, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trainer = make_trainer(tmp_path, hub_lora_twin=False, **SMALL)
    trainer.train()
    (tmp_path / "rounds.png").write_bytes(b"of another run")
    trainer.push_to_hub()
    assert set(hub.files(REPO)) == {name for name in FILES if not name.startswith("ravan/")}
    assert "There is no picture of the rounds here." in card_of(hub).text
    with pytest.raises(ImportError):
        plot_history(trainer.state.log_history)


def test_bases_that_are_not_in_the_file_come_from_the_model_for_the_twin(hub, tmp_path):
    adapter = RavanConfig(r=3, num_heads=2, task_type="SEQ_CLS", init_bases="weight_svd", save_projection=False)
    trainer = make_trainer(tmp_path, adapter=adapter, **SMALL)
    trainer.train()
    trainer.push_to_hub()
    twin = PeftModel.from_pretrained(tiny_bert(), REPO)
    torch.testing.assert_close(logits(twin), logits(trainer.model), atol=1e-5, rtol=0)


def test_a_private_federation_shares_its_guarantee_and_not_what_is_not_protected(hub, tmp_path):
    def fail(client, number, update):
        if client == "client_1":
            raise RuntimeError("no power in ward 7")

    privacy = {"clip_norm": 1.0, "noise_multiplier": 20.0, "secret_sampling": True}
    trainer = make_trainer(
        tmp_path, privacy=privacy, clients_per_round=2, client_fault=fail, eval_strategy="epoch", **SMALL
    )
    trainer.train()
    trainer.push_to_hub()
    shared = [json.loads(line) for line in hub.files(REPO)["rounds.jsonl"].splitlines()]
    assert shared[-1]["epsilon"] == trainer.state.log_history[-1]["epsilon"] and "eval_accuracy" in shared[-1]
    assert "rounds.png" in hub.files(REPO) and "| Differential privacy | ε = " in card_of(hub).text
    for name in ("README.md", "rounds.jsonl", "federation.json"):
        text = hub.files(REPO)[name].decode()
        for word in ("client_", "ward 7", "train_loss", '"clients"', "failed_clients", '"Seed"', "| Seed |"):
            assert word not in text, (name, word)


def test_saving_makes_the_card_once(tmp_path, monkeypatch):
    """The card that PEFT's hook would write first says less, and takes as long: it has the SHA-256 of the weights, too."""
    hashed, sha256 = [], model_card._sha256
    monkeypatch.setattr(model_card, "_sha256", lambda path: hashed.append(path.parent.name) or sha256(path))
    trainer = make_trainer(tmp_path / "run", **{**SMALL, "num_rounds": 1})
    trainer.train()
    hashed.clear()
    trainer.save_model(str(tmp_path / "once"))
    assert hashed == ["once"]
    monkeypatch.setattr(sharing, "card_is_left_to_caller", contextlib.nullcontext)
    trainer.save_model(str(tmp_path / "twice"))
    assert hashed == ["once", "twice", "twice"]
    once, twice = ((tmp_path / name / "README.md").read_text() for name in ("once", "twice"))
    assert once == twice
    # what others save in the meantime has a card
    with card_is_left_to_caller(tmp_path / "once"):
        trainer.model.save_pretrained(tmp_path / "other")
    assert "## What this card does not know" in (tmp_path / "other" / "README.md").read_text()
