"""
Untrusted adapters: whatever their files contain, the result is an adapter, or an error that says what is wrong.

Nothing else may happen with a file that somebody else has written: no unexpected Python error, no endless search, and
no memory allocation of a size that a number in the file demands.
"""

import json
import shutil
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peft_ravan import RavanConfig, card_of_folder, inspect_adapter, to_lora
from peft_ravan.sharing import reading
from peft_ravan.sharing.federation_record import FederationRecord, public_history, read_history
from peft_ravan.sharing.hub import stage_files
from peft_ravan.trainers.commands import MergeRequest, draw_rounds, merge_adapters

from .conftest import randomize_adapter, tiny_bert
from .markdown import code_blocks
from .properties import examples


FACTS = {
    "num_clients": 2, "facts": {"Clients": 2, "Merge method": "[FedAvg](https://arxiv.org/abs/1602.05629)"},
    "versions": {"peft": "0.21"}, "best_round": 1,
}  # fmt: skip
RECORD = {
    "round": 1, "clients": ["north", "south"], "failed_clients": [{"client": "west", "reason": "OSError: no network"}],
    "attempts": 1, "num_examples": 8, "upload_bytes": 10, "download_bytes": 20, "train_loss": 1.5, "learning_rate": 0.1,
    "round_seconds": 2.5, "eval_accuracy": 0.5, "eval_loss": 1.0, "eval_clients_worst_decile_accuracy": 0.25,
}  # fmt: skip
METADATA = {"license": "mit", "language": "en", "datasets": ["a/b"], "tags": ["medical"], "pipeline_tag": "x"}

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
# mostly values that look plausible, and numbers of all sizes
TELLING = st.sampled_from(
    [
        -1, 0, 1, 10**9, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "ravan", "LORA", "(((", "..", "/etc/passwd",
        "[x](javascript:y)", "a|b\n# c", "```", "---", "<img src=x>", "![x](https://tracker/x.png)", [], {}, [[]], [None], [{}],
        {"": None}, {"client": 1}, ["client"], [1, "a"], "query", ["query"], {".*": 10**9}, True, False, "SEQ_CLS",
    ]
)  # fmt: skip
JSON = TELLING | st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
MISSING = object()
PATIENT = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]  # files are written for each example


def save_adapter(folder: Path, config: PeftConfig) -> None:
    model = get_peft_model(tiny_bert(), config)
    randomize_adapter(model)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Folders of complete adapters. Tests copy them."""
    folder = tmp_path_factory.mktemp("saved")
    options = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    for name, config in {
        "ravan": RavanConfig(r=2, num_heads=3, **options),
        "small": RavanConfig(r=2, num_heads=3, save_projection=False, **options),
        "lora": LoraConfig(r=2, rank_pattern={"query": 1}, **options),
    }.items():
        save_adapter(folder / name, config)
        (folder / name / "federation.json").write_text(json.dumps(FACTS))
        (folder / name / "rounds.jsonl").write_text(json.dumps(RECORD) + "\n")
        (folder / name / "README.md").write_text(f"---\n{yaml.safe_dump(METADATA)}---\n# Mine\n")
    return folder


@pytest.fixture(params=["ravan", "small", "lora"])
def adapter(request, saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved / request.param, tmp_path / request.param))


def copy_of(folder: Path, scratch: Path) -> str:
    return str(shutil.copytree(folder, scratch / "copy"))


ACTIONS = {
    "push": stage_files,
    "card": lambda folder, scratch: ModelCard(str(card_of_folder(folder))),
    "draw": lambda folder, scratch: draw_rounds(folder),
    "inspect": lambda folder, scratch: str(inspect_adapter(folder)) and inspect_adapter(folder).to_dict(),
    "twin": lambda folder, scratch: to_lora(folder, scratch),
    "smaller twin": lambda folder, scratch: to_lora(folder, scratch, rank=1),
    "merge": lambda folder, scratch: merge_adapters(
        MergeRequest([str(folder), copy_of(folder, scratch)]), scratch / "m"
    ),
}


def use(folder: Path, names: str, *actions: str) -> list[str]:
    """Everything that can be done with somebody else's adapter. Errors must say what is wrong."""
    scratch, worked = folder.parent / "scratch", []
    for action in actions:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            ACTIONS[action](folder, scratch)
        except (ValueError, FileNotFoundError) as error:
            # not those of Python and of libraries, which say nothing to anybody
            assert type(error) in (ValueError, FileNotFoundError) or type(error).__module__.startswith("peft_ravan"), (
                error
            )
            assert any(
                word in str(error) for word in (names, folder.name, "adapter", "tensor", "Tensor", "bases of")
            ), error
        else:
            worked.append(action)
    return worked


def changed(given: dict, field: str, value: object) -> dict:
    return {name: entry for name, entry in {**given, field: value}.items() if entry is not MISSING}


def test_these_adapters_are_whole(adapter):
    works = [action for action in ACTIONS if adapter.name != "lora" or "twin" not in action]
    assert use(adapter, "", *ACTIONS) == works
    text = card_of_folder(adapter).text
    assert "| Merge method | [FedAvg](https://arxiv.org/abs/1602.05629) |" in text and "| 1 | 2 | 1.5000 |" in text


@pytest.mark.filterwarnings("ignore")
@examples(15, deep=2000, suppress_health_check=PATIENT)
@given(field=st.sampled_from([*FACTS, "history", "more"]), value=JSON | st.just(MISSING))
def test_facts(saved, tmp_path_factory, field, value):
    folder = Path(shutil.copytree(saved / "lora", tmp_path_factory.mktemp("facts") / "adapter"))
    (folder / "federation.json").write_text(json.dumps(changed(FACTS, field, value)))
    use(folder, "federation.json", "push", "card")


@pytest.mark.filterwarnings("ignore")
@examples(15, deep=2000, suppress_health_check=PATIENT)
@given(
    field=st.sampled_from([*RECORD, "num_clients", "heads_trained", "epsilon", "more"]),
    value=JSON | st.just(MISSING),
    data=st.data(),
)
def test_rounds(saved, tmp_path_factory, field, value, data):
    folder = Path(shutil.copytree(saved / "lora", tmp_path_factory.mktemp("rounds") / "adapter"))
    records = [RECORD, changed(RECORD, field, value), {**RECORD, "round": 3}]
    # a plot takes longer than everything else
    drawn = ["draw"] if data.draw(st.integers(0, 39)) == 0 else []
    (folder / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    use(folder, "rounds.jsonl", "push", "card", *drawn)


@pytest.mark.filterwarnings("ignore")
@examples(15, deep=2000, suppress_health_check=PATIENT)
@given(field=st.sampled_from([*METADATA, "base_model", "model-index", "more"]), value=JSON | st.just(MISSING))
def test_metadata(saved, tmp_path_factory, field, value):
    folder = Path(shutil.copytree(saved / "lora", tmp_path_factory.mktemp("metadata") / "adapter"))
    header = yaml.safe_dump(changed(METADATA, field, value))
    (folder / "README.md").write_text(f"---\n{header}---\n# Mine\n", encoding="utf-8")
    use(folder, "README.md", "push", "card")


@pytest.mark.filterwarnings("ignore")
@examples(15, deep=2000, suppress_health_check=PATIENT)
@given(labels=JSON | st.dictionaries(st.sampled_from(["0", "1", "2"]), TELLING | st.text(max_size=8), max_size=3))
def test_labels(saved, tmp_path_factory, labels):
    folder = Path(shutil.copytree(saved / "ravan", tmp_path_factory.mktemp("labels") / "adapter"))
    (folder / "id2label.json").write_text(json.dumps(labels))
    if "card" in use(folder, "id2label.json", "push", "card", "twin", "merge"):
        for code in code_blocks(card_of_folder(folder).text):
            names = [line for line in code.splitlines() if line.startswith("id2label = ")]
            scope = {}
            exec("\n".join(names), scope)
            assert scope["id2label"] == {int(number): name for number, name in labels.items()}


@pytest.mark.filterwarnings("ignore")
@examples(40, deep=5000, suppress_health_check=PATIENT)
@given(kind=st.sampled_from(["ravan", "small", "lora"]), value=JSON | st.just(MISSING), data=st.data())
def test_configurations(saved, tmp_path_factory, kind, value, data):
    folder = Path(shutil.copytree(saved / kind, tmp_path_factory.mktemp("config") / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    field = data.draw(st.sampled_from(sorted(config)))
    (folder / "adapter_config.json").write_text(json.dumps(changed(config, field, value)))
    use(folder, "adapter_config.json", "card", "inspect", "twin", "merge")


@pytest.mark.filterwarnings("ignore")
@examples(15, deep=2000, suppress_health_check=PATIENT)
@given(
    name=st.sampled_from(["federation.json", "rounds.jsonl", "README.md", "adapter_config.json"]),
    content=JSON.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=40)
    | st.sampled_from([b"[" * 10**5, b"\xff"]),
    end=st.sampled_from([b"", b"\n"]),
)
def test_whole_files(saved, tmp_path_factory, name, content, end):
    folder = Path(shutil.copytree(saved / "lora", tmp_path_factory.mktemp("files") / "adapter"))
    (folder / name).write_bytes((b"---\n" + content + b"\n---\n" if name == "README.md" else content) + end)
    use(folder, name, "push", "card", "inspect")


TENSORS = st.sampled_from(
    [
        MISSING, torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.zeros(3, 2, 2), torch.zeros(3, 0, 0),
        torch.zeros(6, 32), torch.zeros(32, 6), torch.zeros(1, 1, 1), torch.full((3, 2, 2), float("nan")), torch.zeros(3, 8),
        torch.zeros(3, 7), torch.full((3,), float("inf")), torch.ones(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool),
        torch.tensor([0, 32, 32]), torch.tensor([0, 2**40, 2**40]), torch.tensor([0, -1, 32]), torch.tensor([99, 32, 32]),
        torch.tensor([2, 32, 8, 2, 2]), torch.tensor([2**62, 32, 32]), torch.tensor([0, 2**62, 2**62]), torch.tensor([1, 32, 32]),
        torch.zeros(3, 2, 2, dtype=torch.float16), torch.zeros(0, 32), torch.zeros(5, 32), torch.tensor([3, 32, 32]),
    ]
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@examples(40, deep=5000, suppress_health_check=PATIENT)
@given(
    kind=st.sampled_from(["ravan", "small", "lora"]),
    tensor=TENSORS,
    more=st.sampled_from(
        [None, "x", "x.ravan_s", "x.ravan_H", "ravan_H", "base_model.model.x.ravan_A", "x.lora_A.weight"]
    ),
    data=st.data(),
)
def test_tensors(saved, tmp_path_factory, kind, tensor, more, data):
    folder = Path(shutil.copytree(saved / kind, tmp_path_factory.mktemp("tensors") / "adapter"))
    state = load_file(folder / "adapter_model.safetensors")
    name = more or data.draw(st.sampled_from(sorted(state)))
    save_file(changed(state, name, tensor), folder / "adapter_model.safetensors")
    use(folder, "adapter_model.safetensors", "card", "inspect", "twin", "smaller twin", "merge")


# ---- What the errors say -----------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "federation.json must be a JSON object, got list"),
        ("{", "federation.json is not valid JSON: "),
        ('{"num_clients": "many"}', "federation.json: `num_clients` must be a number of clients or null, got 'many'"),
        ('{"facts": []}', r"federation.json: `facts` must be an object, got \[\]"),
        ('{"best_round": -1}', "federation.json: `best_round` must be the number of a round or null, got -1"),
    ],
)
def test_malformed_facts_are_named(adapter, content, message):
    (adapter / "federation.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        FederationRecord.from_folder(adapter)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("5", "rounds.jsonl, line 2 must be a JSON object, got int"),
        ("{'round': 1}", "rounds.jsonl, line 2 is not valid JSON"),
        ('{"round": "one"}', "line 2: `round` must be the number of a round, got 'one'"),
        ('{"round": 1, "clients": "north"}', "line 2: `clients` must be a list of names, got 'north'"),
        ('{"round": 1, "failed_clients": ["west"]}', 'line 2: `failed_clients` must be a list of objects .* "client"'),
        ('{"round": 1, "upload_bytes": null}', "line 2: `upload_bytes` must be a number of bytes, got None"),
    ],
)
def test_malformed_rounds_are_named(adapter, line, message):
    (adapter / "rounds.jsonl").write_text(f"{json.dumps(RECORD)}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_history(adapter)


def test_what_a_later_version_may_add_does_not_matter(adapter):
    (adapter / "federation.json").write_text(json.dumps({**FACTS, "more": 1}))
    (adapter / "rounds.jsonl").write_text(json.dumps({**RECORD, "eval_confusion": [[1, 2], [3, 4]]}) + "\n")
    assert "| Clients | 2 |" in card_of_folder(adapter).text
    assert public_history(read_history(adapter))[0]["eval_confusion"] == [[1, 2], [3, 4]]
    draw_rounds(adapter)
    assert (adapter / "rounds.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("tags:\n- 5", r"README.md: `tags` must be a text or a list of texts, got \[5\]"),
        ("pipeline_tag:\n- x", r"README.md: `pipeline_tag` must be a text, got \['x'\]"),
        ("language: no", "README.md: `language` must be a text or a list of texts, got False"),
        ("- x", "The metadata of .*README.md cannot be read"),
    ],
)
def test_malformed_metadata_are_named(adapter, metadata, message):
    (adapter / "README.md").write_text(f"---\n{metadata}\n---\n")
    with pytest.raises(ValueError, match=message):
        card_of_folder(adapter)


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"0": 1}', '{"1": "one"}', '{"0": "one", "x": "two"}'])
def test_malformed_names_of_labels_are_named(adapter, content):
    (adapter / "id2label.json").write_text(content)
    with pytest.raises(ValueError, match="id2label.json (must|is not valid JSON)"):
        card_of_folder(adapter)


@pytest.mark.parametrize("content", ["[]", "{"])
def test_a_malformed_image_processor_is_named_where_it_is_used(adapter, content):
    (adapter / "preprocessor_config.json").write_text(content)
    card_of_folder(adapter)
    (adapter / "README.md").write_text("---\npipeline_tag: image-classification\n---\n")
    with pytest.raises(ValueError, match="preprocessor_config.json (must|is not valid JSON)"):
        card_of_folder(adapter)


@pytest.mark.parametrize("value", ["[0.5]", "[0.5, 0.5, 0.5]", "0.5", "null", '"x"'])
def test_images_are_converted_to_the_channels_of_the_image_processor(adapter, value):
    (adapter / "README.md").write_text("---\npipeline_tag: image-classification\n---\n")
    (adapter / "preprocessor_config.json").write_text(f'{{"image_mean": {value}}}')
    mode = "L" if value == "[0.5]" else "RGB"
    assert f'.convert("{mode}")' in str(card_of_folder(adapter))


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"peft_type": "RAVAN", "r": 0}'])
def test_a_malformed_second_form_is_named(saved, tmp_path, content):
    folder = Path(shutil.copytree(saved / "lora", tmp_path / "adapter"))
    shutil.copytree(saved / "ravan", folder / "ravan")
    (folder / "ravan" / "adapter_config.json").write_text(content)
    if "RAVAN" not in content:  # then it is no form of this adapter
        assert inspect_adapter(folder).config.peft_type == "LORA" and "two forms" not in card_of_folder(folder).text
        return
    for use_it in (inspect_adapter, card_of_folder):
        with pytest.raises(ValueError, match="ravan/adapter_config.json is not the configuration"):
            use_it(folder)


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
def test_no_pattern_may_be_null(saved, tmp_path, field):
    folder = Path(shutil.copytree(saved / "lora", tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, field: None}))
    assert inspect_adapter(folder).targets


@pytest.mark.parametrize("name", ["ravan_s", "ravan_A"])
def test_a_missing_tensor_is_named(saved, tmp_path, name):
    folder = shutil.copytree(saved / "ravan", tmp_path / "adapter")
    path = Path(folder, "adapter_model.safetensors")
    state = load_file(path)
    missing = next(key for key in state if key.endswith(name))
    save_file({key: tensor for key, tensor in state.items() if key != missing}, path)
    target = missing.rpartition(".")[0]
    for use_it in (inspect_adapter, lambda folder: to_lora(folder, tmp_path / "twin"), reading.read_adapter):
        with pytest.raises(ValueError, match=rf"adapter_model.safetensors: .*{target}"):
            use_it(folder)


@pytest.mark.parametrize("size", [2**40, 2**62, 2**20])
def test_a_record_of_a_layer_beyond_all_memory_is_refused(saved, tmp_path, monkeypatch, size):
    folder = shutil.copytree(saved / "small", tmp_path / "adapter")
    path = Path(folder, "adapter_model.safetensors")
    state = load_file(path)
    name = next(key for key in state if key.endswith("ravan_layer"))
    save_file({**state, name: torch.tensor([0, size, size])}, path)
    if size == 2**20:  # on a machine with 50 MB
        monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 50_000_000}))
    for use_it in (inspect_adapter, lambda folder: to_lora(folder, tmp_path / "twin")):
        with pytest.raises(ValueError, match=f"d_in = {size} and d_out = {size}: .* 3 heads of rank 2 takes .* GB"):
            use_it(folder)


def test_a_pattern_that_does_not_end_is_refused(adapter, monkeypatch):
    monkeypatch.setattr("peft_ravan.tuner.patterns.LIMIT_IN_SECONDS", 1.0)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["rank_pattern"] = {r"([\w.]+)+X": 1}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for use_it in (inspect_adapter, lambda folder: merge_adapters(MergeRequest([str(folder)] * 2), "nowhere")):
        with pytest.raises(ValueError, match=r"adapter_config.json: `rank_pattern` has .* longer than 1 s"):
            use_it(adapter)


# ---- The card ------------------------------------------------------------------------


def test_what_strangers_write_means_nothing_to_markdown(adapter):
    evil = "![x](https://t/x.png) | <script> **b** `c` [d](javascript:e)\n\n# title"
    (adapter / "federation.json").write_text(json.dumps({**FACTS, "facts": {evil: evil}, "versions": {evil: evil}}))
    (adapter / "rounds.jsonl").write_text(json.dumps({**RECORD, f"eval_{evil}": 0.5}) + "\n")
    text = card_of_folder(adapter).text
    for line in text.splitlines():
        assert "<script" not in line and not line.startswith("# title")
        assert "![x](" not in line.replace(r"\![x](", "") and "](javascript" not in line.replace(r"\](javascript", "")
        assert "**b**" not in line and "`c`" not in line.replace(r"\`c\`", "")
    assert text.count(r"\![x](https://t/x.png) \| &lt;script> \*\*b\*\* \`c\` \[d\](javascript:e) # title") >= 5


def test_no_code_of_a_stranger_gets_into_what_people_copy(saved, tmp_path):
    folder = Path(shutil.copytree(saved / "lora", tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["task_type"] = None
    evil = 'AutoModel\nimport os; os.system("x")'
    config["auto_mapping"] = {"parent_library": "transformers.models", "base_model_class": evil}
    config["base_model_name_or_path"] = 'x")\nimport os'
    (folder / "adapter_config.json").write_text(json.dumps(config))
    text = card_of_folder(folder).text
    assert "from transformers import AutoModel\n" in text and "import os" not in text.split("```json")[0]
