"""Sharing on the Hub through huggingface_hub's own client, with a small local server instead of the Hub."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants, hf_api, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load
from transformers import PreTrainedTokenizerFast

from peft_ravan import RavanConfig, UploadError, card_of_folder, inspect_adapter, push_to_hub, to_lora
from peft_ravan.sharing.federation_record import public_history
from peft_ravan.trainers.commands import MergeRequest, find_adapter, merge_adapters

from .conftest import NUM_LABELS, make_tokenizer, tiny_bert, tiny_llama
from .forked import run_clean
from .markdown import code_blocks


REPO = "tester/ward-notes"
INPUTS = {"input_ids": torch.arange(14).reshape(2, 7) + 4}


def ravan_model(base_model=None, **options) -> PeftModel:
    model = get_peft_model(base_model or tiny_bert(), RavanConfig(r=3, num_heads=2, task_type="SEQ_CLS", **options))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "ravan_H" in name or "classifier" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(**INPUTS).logits


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def card_of(hub, repo_id=REPO) -> ModelCard:
    return ModelCard(hub.files(repo_id)["README.md"].decode())


# ---- Upload and download -----------------------------------------------------------


def test_an_adapter_comes_back_from_the_hub(hub):
    model = ravan_model()
    commit = push_to_hub(model, REPO, commit_message="Ward notes", private=True)
    assert commit.commit_message == "Ward notes" and hub.messages == ["Ward notes"] and hub.private[REPO]
    assert set(hub.files(REPO)) == {
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors",
        "ravan/adapter_config.json", "ravan/adapter_model.safetensors",
    }  # fmt: skip
    loaded = PeftModel.from_pretrained(tiny_bert(), REPO, subfolder="ravan")
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(model), logits(tiny_bert()), atol=0.1)  # what is loaded matters
    assert inspect_adapter(loaded).targets.keys() == inspect_adapter(model).targets.keys()


# in another cache, as on the machine of a stranger
WITHOUT_THE_PACKAGE = """
import sys
from pathlib import Path
from tests.hub_server import direct_client
direct_client({endpoint!r}, Path("stranger"))
sys.modules["peft_ravan"] = None  # as if it were not installed
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification

outputs = open("outputs.txt", "w")
try:
    PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained("{root}-base"), "{alone}")
except KeyError as error:
    print(repr(error), file=outputs)
base_model = AutoModelForSequenceClassification.from_pretrained("{root}-base")
for model in (
    PeftModel.from_pretrained(base_model, "{root}"),
    AutoPeftModelForSequenceClassification.from_pretrained("{root}"),
):
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.arange(14).reshape(2, 7) + 4).logits
    print(logits.flatten().tolist(), file=outputs)
outputs.close()
"""


def saved_adapter(folder: Path, labels: dict[int, str] | None = None, tokenizer: bool = False) -> PeftModel:
    """An adapter in `adapter`, of a base model in `base`, both within the folder. Returns the model with the adapter."""
    base = tiny_bert()
    if labels:
        base.config.id2label, base.config.label2id = labels, {name: number for number, name in labels.items()}
    base.save_pretrained(folder / "base")
    if tokenizer:
        make_tokenizer().save_pretrained(folder / "base")
    model = ravan_model(type(base).from_pretrained(folder / "base"))
    model.save_pretrained(folder / "adapter")
    return model


def test_without_the_package_the_root_loads(hub, tmp_path):
    model = saved_adapter(tmp_path)
    push_to_hub(tmp_path / "adapter", REPO, with_base_model=True)
    push_to_hub(tmp_path / "adapter", "tester/alone", lora_twin=False)
    code = WITHOUT_THE_PACKAGE.format(endpoint=hub.endpoint, root=REPO, alone="tester/alone")
    exit_code, errors = run_clean(code, tmp_path)
    assert exit_code == 0, errors
    error, *outputs = (tmp_path / "outputs.txt").read_text().splitlines()
    assert list((tmp_path / "stranger" / "cache").glob("models--*"))  # nothing came from the cache of this process
    assert error == "KeyError('RAVAN')" and len(outputs) == 2
    for output in outputs:
        torch.testing.assert_close(torch.tensor(json.loads(output)), logits(model).flatten(), atol=1e-5, rtol=0)

    first_lines = card_of(hub, "tester/alone").text.strip().splitlines()[:3]
    [remedy] = [line for line in first_lines if "KeyError: 'RAVAN'" in line]
    assert "Install the package `peft-ravan`" in remedy
    first_lines = card_of(hub).text.strip().splitlines()[:6]
    [lora] = [line for line in first_lines if line.startswith("- at the top level as LoRA of rank 6")]
    [ravan] = [line for line in first_lines if line.startswith("- in [`ravan/`]")]
    assert "with PEFT alone;" in lora and "`import peft_ravan`" in ravan


def test_what_vllm_reads_at_the_root(hub):
    push_to_hub(get_peft_model(tiny_llama(), RavanConfig(r=3, num_heads=2, task_type="CAUSAL_LM")), REPO)
    config = json.loads(hub.files(REPO)["adapter_config.json"])
    assert config["peft_type"] == "LORA" and config["lora_alpha"] == config["r"] == 6 and not config["modules_to_save"]
    assert {"q_proj", "v_proj"} == {name.split(".")[-1] for name in config["target_modules"]}
    names = {name.split(".")[-2] for name in load(hub.files(REPO)["adapter_model.safetensors"])}
    assert names == {"lora_A", "lora_B"}
    assert "loads with PEFT alone and in vLLM;" in card_of(hub).text


@pytest.mark.parametrize("layout", [{}, {"ravan_at_root": True}, {"lora_twin": False}], ids=lambda layout: str(layout))
def test_the_snippets_of_the_card_run_as_printed(hub, tmp_path, capsys, layout):
    labels = {0: "calm", 1: 'busy "late"', 2: "närrisch", 3: "quiet"}
    model = saved_adapter(tmp_path, labels, tokenizer=True)
    push_to_hub(tmp_path / "adapter", REPO, with_base_model=True, **layout)
    snippets = code_blocks(card_of(hub).text)
    assert len(snippets) == (1 if "lora_twin" in layout else 2)
    for number, snippet in enumerate(snippets):
        scope = {}
        exec(snippet, scope)
        torch.testing.assert_close(logits(scope["model"]), logits(model), atol=1e-5, rtol=0)
        assert scope["model"].config.id2label == labels
        assert ("import peft_ravan" in snippet) == (number == 1 if not layout else number == 0)
        trains = any(parameter.requires_grad for parameter in scope["model"].parameters())
        assert trains == (number == 1 and not layout)
        assert trains or capsys.readouterr().out.strip() in labels.values()


def test_many_labels_are_read_from_their_file(hub, tmp_path):
    labels = {number: f"intent {number}" for number in range(30)}
    base = type(tiny_bert())(type(tiny_bert().config)(**{**tiny_bert().config.to_dict(), "id2label": labels}))
    push_to_hub(ravan_model(base), REPO, base_model="tester/base")
    assert json.loads(hub.files(REPO)["id2label.json"]) == {str(number): name for number, name in labels.items()}
    base.save_pretrained(tmp_path / "base")
    [snippet, _] = code_blocks(card_of(hub).text)
    assert "intent 3" not in snippet
    scope = {}
    exec(snippet.split("tokenizer =")[0].replace("tester/base", str(tmp_path / "base")), scope)
    assert scope["model"].config.id2label == labels


def test_without_names_of_labels_the_card_has_their_number(hub):
    push_to_hub(ravan_model(), REPO, base_model="tester/base")
    assert f'from_pretrained("tester/base", num_labels={NUM_LABELS})' in card_of(hub).text
    assert "id2label.json" not in hub.files(REPO)


# ---- The base model ----------------------------------------------------------------


def test_the_base_model_gets_a_repository_of_its_own(hub, tmp_path):
    saved_adapter(tmp_path, tokenizer=True)
    (tmp_path / "base" / "optimizer.pt").write_bytes(b"private")
    push_to_hub(tmp_path / "adapter", "ward-notes", with_base_model=True, private=True)
    base = hub.files("tester/ward-notes-base")
    assert set(base) == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert hub.private["tester/ward-notes-base"] and str(tmp_path).encode() not in b"".join(base.values())
    card = card_of(hub, "tester/ward-notes-base")
    assert card.data.library_name == "transformers" and "[tester/ward-notes](https://" in card.text
    for name in ("adapter_config.json", "ravan/adapter_config.json"):
        config = json.loads(hub.files("tester/ward-notes")[name])
        assert config["base_model_name_or_path"] == "tester/ward-notes-base"
    assert card_of(hub, "tester/ward-notes").data.base_model == "tester/ward-notes-base"


def test_a_base_model_that_is_no_folder_is_not_uploaded(hub, tmp_path):
    model = saved_adapter(tmp_path)
    with pytest.raises(
        ValueError, match="if it is a folder on this machine, but this adapter names 'google/bert-tiny'"
    ):
        push_to_hub(model, REPO, with_base_model=True, base_model="google/bert-tiny")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="since there is no model.safetensors. Save it there"):
        push_to_hub(tmp_path / "adapter", REPO, with_base_model=True)
    assert not hub.repos


def test_a_branch_a_token_and_a_push_in_the_background(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    future = push_to_hub(ravan_model(), REPO, revision="seed-2", token="hf_other", blocking=False)
    assert future.result(60).oid
    assert hub.tokens == {"hf_other"}
    assert "adapter_model.safetensors" in hub.files(REPO, "seed-2")
    assert "adapter_model.safetensors" not in hub.files(REPO, "main")
    push_to_hub(ravan_model(), REPO, revision="seed-2", token="hf_other")  # the branch now exists
    loaded = PeftModel.from_pretrained(tiny_bert(), REPO, revision="seed-2", subfolder="ravan")
    assert torch.equal(logits(loaded), logits(ravan_model()))


def test_nothing_of_an_earlier_upload_belongs_to_another_adapter(hub, tmp_path):
    model = ravan_model()
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "rounds.jsonl").write_text('{"round": 1, "clients": ["a"], "upload_bytes": 8}\n')
    push_to_hub(tmp_path / "adapter", REPO)
    assert "ravan/adapter_model.safetensors" in hub.files(REPO) and "rounds.jsonl" in hub.files(REPO)
    hub.files(REPO)["ravan/notes.txt"] = b"not ours"
    push_to_hub(model, REPO, ravan_at_root=True)
    assert not {"ravan/adapter_config.json", "ravan/adapter_model.safetensors", "rounds.jsonl"} & set(hub.files(REPO))
    assert "ravan/notes.txt" in hub.files(REPO) and "lora/adapter_model.safetensors" in hub.files(REPO)
    push_to_hub(model, REPO, lora_twin=False)
    assert not [name for name in hub.files(REPO) if name.startswith("lora/")]
    assert "subfolder" not in card_of(hub).text and "There is no LoRA twin of it here." in card_of(hub).text


def test_another_adapter_of_a_model(hub):
    model = ravan_model()
    model.add_adapter("second", RavanConfig(r=2, num_heads=3, task_type="SEQ_CLS"))
    push_to_hub(model, REPO, adapter_name="second")
    assert json.loads(hub.files(REPO)["ravan/adapter_config.json"])["r"] == 2
    assert json.loads(hub.files(REPO)["adapter_config.json"])["r"] == 6
    requests = len(hub.requests)
    with pytest.raises(ValueError, match="no adapter 'third'. Its adapters are \\['default', 'second'\\]"):
        push_to_hub(model, REPO, adapter_name="third")
    assert len(hub.requests) == requests


# ---- What is not uploaded ----------------------------------------------------------


def test_only_what_belongs_to_the_adapter_is_uploaded(hub, tmp_path):
    folder = tmp_path / "run"
    ravan_model().save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=a_tokenizer(), unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    for name in (
        "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "notes.txt",
        "federation_state.json", "federation_state.safetensors", "checkpoint-3/adapter_model.safetensors",
        "clients/ward-7.safetensors", ".env",
    ):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"private")
    push_to_hub(folder, REPO, lora_twin=False)
    assert set(hub.files(REPO)) - {".gitattributes"} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert b"private" not in b"".join(hub.files(REPO).values())


def a_tokenizer():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"[UNK]": 0, "ward": 1}, unk_token="[UNK]"))


def test_no_path_and_no_token_is_revealed(hub, tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    base_model = type(tiny_bert()).from_pretrained(tmp_path / "base")
    PreTrainedTokenizerFast(tokenizer_object=a_tokenizer(), unk_token="[UNK]").save_pretrained(tmp_path / "base")
    ravan_model(base_model).save_pretrained(tmp_path / "adapter")
    PreTrainedTokenizerFast.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "adapter")
    push_to_hub(tmp_path / "adapter", REPO, token="hf_other")
    everything = b"".join(hub.files(REPO).values())
    assert str(tmp_path).encode() not in everything and b"hf_other" not in everything
    for name in ("adapter_config.json", "ravan/adapter_config.json"):
        assert json.loads(hub.files(REPO)[name])["base_model_name_or_path"] is None
    card = card_of(hub)
    assert "it was loaded from a local folder" in card.text and card.data.base_model is None

    push_to_hub(tmp_path / "adapter", REPO, base_model="google/bert-tiny")
    for name in ("adapter_config.json", "ravan/adapter_config.json"):
        assert json.loads(hub.files(REPO)[name])["base_model_name_or_path"] == "google/bert-tiny"
    assert card_of(hub).data.base_model == "google/bert-tiny" and "local folder" not in card_of(hub).text


HISTORY = [
    {"round": 0, "eval_loss": 2.0},
    {
        "round": 1, "clients": ["Dr Smith", "client 1"], "failed_clients": [{"client": "Ward", "reason": "/home/x"}],
        "num_examples": 12, "train_loss": 1.5, "upload_bytes": 2_000_000, "eval_accuracy": 0.5, "eval_loss": 1.25,
        "eval_runtime": 3.0,
    },
    {"train_runtime": 9.0},
    {"round": 2, "clients": ["Ward"], "failed_clients": [], "num_examples": 4, "train_loss": 1.0, "upload_bytes": 8},
]  # fmt: skip


def test_clients_are_numbered_in_what_is_shared():
    public = public_history(HISTORY)
    assert [record["round"] for record in public] == [0, 1, 2]
    assert public[1]["clients"] == ["client 1", "client 2"]  # numbered by their order, whatever their names
    assert public[1]["failed_clients"] == [{"client": "client 3"}]
    assert public[2]["clients"] == ["client 3"]
    assert public[1]["train_loss"] == 1.5 and public[1]["eval_accuracy"] == 0.5
    assert HISTORY[1]["clients"] == ["Dr Smith", "client 1"]
    assert public_history(public) == public


def test_what_noise_does_not_protect_is_not_shared():
    not_protected = {"eval_clients_worst_accuracy": 0.1, "heads_trained": [3], "update_cosine": 0.5}
    private = [{**record, "epsilon": 1.0, **not_protected} for record in HISTORY[1:2]]
    assert public_history(private) == [
        {
            "round": 1, "num_clients": 2, "upload_bytes": 2_000_000, "eval_accuracy": 0.5, "eval_loss": 1.25,
            "eval_runtime": 3.0, "epsilon": 1.0,
        }
    ]  # fmt: skip
    assert public_history(public_history(private)) == public_history(private)


# ---- Interruptions -------------------------------------------------------------------


@pytest.mark.parametrize("at", ["PUT /lfs/", "/commit/main", "/preupload/main", "/api/repos/create"])
def test_an_interrupted_upload_can_be_run_again(hub, at):
    push_to_hub(ravan_model(), REPO, lora_twin=False)
    before, commits = dict(hub.files(REPO)), len(hub.repos[REPO]["main"])
    torch.manual_seed(2)
    model = ravan_model(init_bases="normal")
    hub.breaks = [at] * 20
    with pytest.raises(UploadError, match="'tester/ward-notes' was interrupted .*Push again") as raised:
        push_to_hub(model, REPO)
    assert raised.value.__cause__ is not None
    assert hub.files(REPO) == before and len(hub.repos[REPO]["main"]) == commits
    hub.breaks, hub.requests = [], []
    push_to_hub(model, REPO)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_bert(), REPO, subfolder="ravan")), logits(model))
    assert len(hub.repos[REPO]["main"]) == commits + 1
    # files that have arrived are not sent again
    sent = [line for line in hub.requests if "/lfs/" in line and line.startswith("PUT")]
    assert len(sent) == (0 if at == "/commit/main" else 2)


def test_a_drop_that_the_client_survives_is_no_error(hub):
    hub.breaks = ["PUT /lfs/"]
    model = ravan_model()
    push_to_hub(model, REPO)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_bert(), REPO, subfolder="ravan")), logits(model))


def test_refusals_of_the_hub_are_reported_in_its_words(hub):
    with pytest.raises(HfHubHTTPError, match="404"):  # there is no such pull request
        push_to_hub(ravan_model(), REPO, revision="refs/pr/1")


def test_nothing_is_sent_if_there_is_nothing_to_upload(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no adapter_config.json"):
        push_to_hub(tmp_path, REPO)
    ravan_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`datasets` .* must be a name on the Hub, got '/data/wards'"):
        push_to_hub(tmp_path, REPO, datasets="/data/wards")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"repo_id": "owner/na me"}, "Repo id must use alphanumeric"),
        ({"repo_id": "a/b/c"}, "Repo id must be in the form"),
        ({"revision": "two words"}, "`revision` must be the name of a branch, got 'two words'"),
        ({"license": "apache2"}, "got 'apache2'. Did you mean `apache-2.0`?"),
        ({"license": "MIT"}, "Did you mean `mit`?"),
        ({"license": "mine"}, "For any other license, it is 'other'"),
        ({"base_model": "outputs/digits/base"}, "`base_model` .* must be a name on the Hub"),
    ],
)
def test_what_the_hub_would_refuse_is_refused_before_anything_is_created(hub, tmp_path, given, message):
    ravan_model().save_pretrained(tmp_path)
    for adapter in (tmp_path, ravan_model()):
        with pytest.raises(ValueError, match=message):
            push_to_hub(adapter, **{"repo_id": REPO, **given})
    assert hub.requests == []


def test_a_license_in_an_earlier_card_is_checked_too(hub, tmp_path):
    ravan_model().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: apache2\n---\n")
    with pytest.raises(ValueError, match="README.md: `license` must be .* Did you mean `apache-2.0`"):
        push_to_hub(tmp_path, REPO)
    assert not hub.repos


def test_offline_is_called_offline(hub, monkeypatch):
    model = ravan_model()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UploadError, match="HF_HUB_OFFLINE is set, so this process is offline") as raised:
        push_to_hub(model, REPO)
    assert "interrupted" not in str(raised.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf_api.api, "endpoint", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in (REPO, "ward-notes"):
        with pytest.raises(UploadError, match="there is no connection to http://127.0.0.1:9") as raised:
            push_to_hub(model, name)
        assert "interrupted" not in str(raised.value) and raised.value.__cause__ is not None
    assert hub.requests == []


def test_an_adapter_that_lora_cannot_express_is_uploaded_without_a_twin(hub, tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=2), torch.nn.Flatten())
    model = get_peft_model(model, RavanConfig(r=2, num_heads=1, target_modules=["0"]))
    with pytest.warns(UserWarning, match="uploaded without its LoRA twin"):
        push_to_hub(model, REPO)
    assert "adapter_model.safetensors" in hub.files(REPO) and "lora/adapter_config.json" not in hub.files(REPO)
    assert json.loads(hub.files(REPO)["adapter_config.json"])["peft_type"] == "RAVAN"


# ---- Both layouts of a repository ------------------------------------------------------


@pytest.mark.parametrize("layout", [{}, {"ravan_at_root": True}, {"lora_twin": False}], ids=lambda layout: str(layout))
def test_the_ravan_adapter_is_found_in_every_layout(hub, tmp_path, layout):
    model = ravan_model()
    push_to_hub(model, REPO, **layout)
    folder = find_adapter(REPO)
    assert inspect_adapter(folder).config.peft_type == "RAVAN"
    assert inspect_adapter(folder).targets.keys() == inspect_adapter(model).targets.keys()
    assert to_lora(folder, tmp_path / "twin").r == 6
    merged = merge_adapters(MergeRequest([REPO, str(folder)]), tmp_path / "merged")
    assert merged.config.peft_type == "RAVAN" and merged.config.r == 3
    push_to_hub(folder, "tester/again")
    assert {"adapter_config.json", "ravan/adapter_config.json"} <= hub.files("tester/again").keys()


def test_an_adapter_that_is_named_ravan_is_not_taken_for_another_form(tmp_path):
    model = ravan_model()
    model.add_adapter("ravan", RavanConfig(r=2, num_heads=3, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    assert inspect_adapter(tmp_path).config.r == 3 and inspect_adapter(tmp_path / "ravan").config.r == 2
    assert "two forms" not in card_of_folder(tmp_path).text


# ---- The card ----------------------------------------------------------------------------


def federated_folder(folder: Path, **facts) -> Path:
    ravan_model().save_pretrained(folder)
    (folder / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in HISTORY))
    facts = {"num_clients": 20, "facts": {"Clients": 20, "Seed": 7}, "versions": {"peft": "0.1"}, **facts}
    (folder / "federation.json").write_text(json.dumps(facts))
    return folder


def test_the_metadata_are_what_the_hub_understands(hub, tmp_path):
    folder = federated_folder(tmp_path, best_round=1)
    push_to_hub(
        folder, REPO, base_model="google/bert-tiny", datasets=["clinc/clinc_oos"], dataset_name="CLINC 150",
        dataset_config="plus", dataset_split="validation", license="mit", language="en", tags=["medical"],
    )  # fmt: skip
    data = card_of(hub).data
    assert ModelCard(f"---\n{data.to_yaml()}\n---\n").data.to_dict() == data.to_dict()
    assert data.base_model == "google/bert-tiny" and data.library_name == "peft" and data.license == "mit"
    assert data.tags == ["ravan", "lora", "peft-ravan", "federated-learning", "medical"]
    assert data.datasets == ["clinc/clinc_oos"] and data.pipeline_tag == "text-classification"
    [result] = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.5)
    assert (result.dataset_type, result.dataset_name) == ("clinc/clinc_oos", "CLINC 150")
    assert (result.dataset_config, result.dataset_split) == ("plus", "validation")
    assert data.to_dict()["model-index"][0]["name"] == data.model_name == "ward-notes"


def test_the_card_has_the_sha256_of_the_files(hub, tmp_path):
    push_to_hub(ravan_model(tiny_bert(num_layers=2)), REPO)
    for name in ("adapter_model.safetensors", "ravan/adapter_model.safetensors"):
        assert f"| `{name}` | 0.01 MB | `{sha256(hub.files(REPO)[name])}` |" in card_of(hub).text
        assert len(load(hub.files(REPO)[name]))


def test_the_card_of_a_federation_has_its_record(tmp_path):
    text = card_of_folder(federated_folder(tmp_path)).text
    assert "trained on data that nobody has named, by 20 clients" in text and "| Seed | 7 |" in text
    assert "| round | clients | train_loss | eval_accuracy | eval_loss | upload (MB) |" in text
    assert "| 1 | 2 | 1.5000 | 0.5000 | 1.2500 | 2.000 |" in text and "| 2 | 1 | 1.0000 |  |  | 0.000 |" in text
    assert "| accuracy | 0.5000 |" in text and "| loss | 1.2500 |" in text
    assert "The adapter was trained with\n\n- peft 0.1\n" in text
    assert "There is no picture of the rounds here." in text and "`rounds.jsonl` has a line" in text
    assert "Dr Smith" not in text and "/home/x" not in text


def test_the_card_of_an_adapter_says_what_it_does_not_know(tmp_path):
    ravan_model().save_pretrained(tmp_path)
    text = card_of_folder(tmp_path).text
    unknown = text[text.index("## What this card does not know") : text.index("## Versions")]
    for phrase in (
        "its configuration names none", "How the adapter was trained: there is no record", "What data the adapter was",
        "How good the adapter is", "With which versions", "fit for, its biases",
    ):  # fmt: skip
        assert phrase in unknown
    assert "This card was made with\n\n- peft-ravan" in text and "## Training" not in text


def test_results_without_a_single_data_set_stay_out_of_the_metadata(tmp_path):
    card = card_of_folder(federated_folder(tmp_path, best_round=1), datasets=["a/one", "b/two"])
    assert card.data.eval_results is None and "Which of the data sets" in card.text


def test_results_of_another_round_are_not_those_of_the_adapter(tmp_path):
    card = card_of_folder(federated_folder(tmp_path), datasets="a/b")  # round 2, which was not evaluated
    assert card.data.eval_results is None
    assert "After round 1, while this is the adapter of round 2:" in card.text
    assert "it was not evaluated after the round that it comes from" in card.text


def test_what_was_written_into_an_earlier_card_is_kept(tmp_path):
    ravan_model().save_pretrained(tmp_path)
    card_of_folder(tmp_path, license="mit", datasets="a/b", tags="medical", language="de").save(tmp_path / "README.md")
    data = card_of_folder(tmp_path, language="en").data
    assert (data.license, data.datasets, data.language) == ("mit", ["a/b"], "en") and "medical" in data.tags


def test_names_cannot_break_out_of_the_card(tmp_path):
    federated_folder(tmp_path, facts={"Data of the clients": "by | column\n\n# <b>x"}, best_round=1)
    card = card_of_folder(
        tmp_path, model_name='a"\n---\n# [x](y) `z`', datasets="a/b", dataset_name='d: "e"\n- f', tags=["t: u", "---"]
    )
    assert card.text.strip().splitlines()[0] == r'# a" --- \# \[x\](y) \`z\`'
    assert r"| Data of the clients | by \| column # &lt;b>x |" in card.text
    again = ModelCard(str(card)).data
    assert again.to_dict() == card.data.to_dict() and again.eval_results[0].dataset_name == 'd: "e"\n- f'


def test_the_card_of_another_method_needs_no_package(hub, tmp_path):
    model = get_peft_model(tiny_bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    push_to_hub(model, REPO)
    text = card_of(hub).text
    assert "This is a LORA adapter for [PEFT]" in text and "import peft_ravan" not in text and "KeyError" not in text
    assert not [name for name in hub.files(REPO) if name.startswith("lora/")]


# ---- Links -------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """The folder of an adapter, next to a file that must not be shared."""
    ravan_model().save_pretrained(tmp_path / "adapter")
    (tmp_path / "secret").write_text('{"token": "hf_1234"}')
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "name", ["README.md", "tokenizer.json", "federation.json", "rounds.jsonl", "rounds.png", "vocab.txt"]
)
@pytest.mark.parametrize("target", ["../secret", "/etc/hostname", "links/secret"])
def test_a_link_that_leads_outside_is_refused(hub, saved, name, target):
    (saved / "links").symlink_to("..")
    (saved / name).unlink(missing_ok=True)
    (saved / name).symlink_to(target)
    with pytest.raises(ValueError, match=f"{name}' is a link to '.*', outside of the folder, and is not uploaded"):
        push_to_hub(saved, REPO)
    assert not hub.repos


def test_a_folder_that_is_a_link_is_not_followed_either(hub, saved):
    (saved.parent / "templates").mkdir()
    (saved.parent / "templates" / "a.jinja").write_text("secret")
    (saved / "additional_chat_templates").symlink_to("../templates")
    with pytest.raises(ValueError, match="a.jinja' is a link to"):
        push_to_hub(saved, REPO)


def test_links_that_lead_nowhere_or_stay_inside_do_not_matter(hub, saved):
    (saved / "vocab.json").symlink_to("nowhere")
    (saved / "vocab.txt").symlink_to("vocab.real")
    (saved / "vocab.real").write_text("inside")
    (saved / "secret.txt").symlink_to("../secret")  # it would not be shared anyway
    (saved.parent / "link").symlink_to("adapter")
    push_to_hub(saved.parent / "link", REPO)
    assert hub.files(REPO)["vocab.txt"] == b"inside" and "vocab.json" not in hub.files(REPO)


def test_a_snapshot_in_the_cache_of_the_hub_can_be_pushed_on(hub, saved, tmp_path):
    push_to_hub(saved, REPO)
    snapshot = Path(snapshot_download(REPO, cache_dir=tmp_path / "cache"))
    weights = snapshot / "adapter_model.safetensors"
    assert weights.is_symlink() and not weights.resolve().is_relative_to(snapshot)
    push_to_hub(snapshot, "tester/again")
    for name in ("adapter_model.safetensors", "ravan/adapter_model.safetensors"):
        assert hub.files("tester/again")[name] == (snapshot / name).read_bytes()
    # but a folder that looks like a cache does not admit other files
    (snapshot / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="vocab.txt' is a link"):
        push_to_hub(snapshot, "tester/again")
    (snapshot / "vocab.txt").unlink()
    (snapshot / "vocab.txt").symlink_to("../../blobs/secret")
    (snapshot.parents[1] / "blobs" / "secret").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="vocab.txt' is a link"):
        push_to_hub(snapshot, "tester/again")
