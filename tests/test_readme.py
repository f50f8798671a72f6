"""The code on the README's first screen runs as printed."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

from peft_ravan import RavanConfig
from peft_ravan.trainers.demo.digits import make_image_processor

from .commands.conftest import run as command
from .conftest import classification_dataset, make_model, randomize_adapter
from .markdown import code_blocks


README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def run(code: str, **given) -> dict:
    namespace = {
        "train_dataset": classification_dataset(400),
        "eval_dataset": classification_dataset(40, seed=1),
        **given,
    }
    exec(compile(code, str(README), "exec"), namespace)
    return namespace


def test_the_first_screen_has_both_uses():
    first_screen = "\n".join(README.read_text().splitlines()[:50])
    assert [snippet in first_screen for snippet in SNIPPETS[:2]] == [True, True]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tmp_path


def loss_of(model) -> float:
    """The mean loss over other examples than those of the training."""
    batch = classification_dataset(200, seed=1).with_format("torch")[:]
    with torch.no_grad():
        return model.eval()(**batch).loss.item()


def test_tuner_and_trainer(folder):
    before = loss_of(make_model())
    namespace = run(SNIPPETS[0], model=make_model(), train_dataset=classification_dataset(800))
    assert loss_of(namespace["model"]) < 0.9 * before
    assert (folder / "ravan-adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "num_rounds, at_most", [(8, 0.97), pytest.param(30, 0.5, marks=pytest.mark.deep, id="as printed")]
)
def test_federated_trainer(folder, num_rounds, at_most):
    tuned = run(SNIPPETS[0].split("trainer =")[0], model=make_model())
    before = loss_of(tuned["model"])
    assert SNIPPETS[1].count("num_rounds=30") == 1
    namespace = run(SNIPPETS[1].replace("num_rounds=30", f"num_rounds={num_rounds}"), model=tuned["model"])
    assert loss_of(tuned["model"]) < at_most * before
    history = namespace["trainer"].state.log_history
    assert len([record for record in history if "round" in record]) == num_rounds
    assert (folder / "federated-adapter" / "adapter_model.safetensors").exists()
    assert torch.isfinite(torch.tensor(history[-1]["train_loss"]))


def test_merging_without_a_trainer():
    [snippet] = [snippet for snippet in SNIPPETS if "import ClientUpdate" in snippet]
    namespace = run(snippet)
    assert namespace["result"].diagnostics["method"] == "fedrpca"


def test_from_the_demo_to_an_adapter_that_others_load(folder, hub, capsys):
    base_dir = folder / "outputs" / "digits" / "base_model"
    digits = [str(digit) for digit in range(10)]
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, id2label=dict(enumerate(digits)), label2id={digit: int(digit) for digit in digits},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(base_dir)
    base_model = ViTForImageClassification.from_pretrained(base_dir)
    adapter = RavanConfig(r=4, num_heads=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    model = get_peft_model(base_model, adapter).eval()
    randomize_adapter(model, scale=0.1)
    model.save_pretrained("outputs/digits/adapter")
    make_image_processor().save_pretrained("outputs/digits/adapter")

    commands = re.findall(r"^\.venv/bin/peft-ravan (.*)$", README.read_text(), flags=re.MULTILINE)
    for line in commands:
        ended = command(*line.split())
        assert ended.code == 0, ended
    assert (folder / "outputs" / "digits" / "heads.png").exists()
    assert {"adapter_model.safetensors", "ravan/adapter_model.safetensors"} <= hub.files("your-name/digits").keys()

    # what a stranger does: the README's lines, and the code of the card as printed
    shutil.rmtree("outputs")
    [snippet] = [snippet for snippet in SNIPPETS if "your-name/digits" in snippet]
    card = hub.files("your-name/digits")["README.md"].decode()
    images = load_digits().images[:1]
    Image.fromarray(images[0].astype("uint8")).convert("RGB").save("image.png")  # as most files are
    inputs = torch.from_numpy(images[None] / 8 - 1).float()
    with torch.no_grad():
        expected = model(inputs).logits
    capsys.readouterr()
    for code in (snippet, *code_blocks(card)):
        loaded = run(code)["model"].eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(inputs).logits, expected, atol=1e-5, rtol=0)
    assert capsys.readouterr().out.split() == [digits[expected.argmax()]]
