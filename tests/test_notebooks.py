"""The notebooks run in a kernel of their own, as they are in the deep run, and are committed without outputs."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftConfig
from safetensors.torch import load_file

from peft_ravan.trainers import read_history

from .hub_server import serve_hub


nbformat = pytest.importorskip("nbformat", reason="the notebooks need the extra `notebooks`")
nbclient = pytest.importorskip("nbclient", reason="the notebooks need the extra `notebooks`")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(name: str):
    return nbformat.read(ROOT / "examples" / "notebooks" / f"{name}.ipynb", as_version=4)


# with these numbers, nothing but what is learned is different
FEWER_STEPS = {
    "five_minute_federation": {"num_epochs=12": "num_epochs=2", "num_rounds=12": "num_rounds=3", "max_steps=8": "max_steps=2"},
    "share_and_load": {"num_epochs=6": "num_epochs=2", "max_steps=80": "max_steps=8", "max_steps=60": "max_steps=8"},
}  # fmt: skip
in_full_or_shortened = pytest.mark.parametrize(
    "in_full", [False, pytest.param(True, marks=pytest.mark.deep)], ids=["fewer steps", "as it is"]
)


def shortened(name: str, in_full: bool):
    notebook = read(name)
    for text, other in FEWER_STEPS[name].items() if not in_full else ():
        [cell] = [cell for cell in notebook.cells if text in cell.source]
        cell.source = cell.source.replace(text, other)
    return notebook


def run(notebook, folder: Path) -> list:
    """Run all cells in a folder, and return their outputs. An error in a cell is raised."""
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def printed(outputs: list) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def shown(outputs: list, kind: str) -> list[str]:
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def test_there_are_both():
    assert [path.stem for path in NOTEBOOKS] == ["five_minute_federation", "share_and_load"]


@each_notebook
def test_a_notebook_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert set(notebook.metadata) == {"kernelspec", "language_info"} and not any(
        cell.metadata for cell in notebook.cells
    )
    assert notebook.metadata.kernelspec.name == "python3"
    # each begins with a title, and no path of the machine where it was written is left in it
    assert re.match("# .+\n", notebook.cells[0].source)
    assert not re.search(r"/(home|root|tmp|Users|content|mnt)/|[A-Z]:\\", path.read_text())


@each_notebook
def test_a_notebook_is_found(path):
    place = f"examples/notebooks/{path.name}"
    assert f"]({place})" in (ROOT / "README.md").read_text()
    assert f"](../{place})" in (ROOT / "docs" / "examples.md").read_text()
    assert f"notebooks/{path.stem}.md" in str(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])


@in_full_or_shortened
def test_a_federation_in_five_minutes(tmp_path, monkeypatch, in_full):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    outputs = run(shortened("five_minute_federation", in_full), tmp_path)
    history = [record["eval_accuracy"] for record in read_history(tmp_path / "digits-adapter")]
    assert len(history) == (13 if in_full else 4)
    assert not in_full or history[-1] > history[0] + 0.2
    by_digit, by_round = shown(outputs, "text/html")[-2:]
    assert "client_9" in by_digit and "eval_accuracy" in by_round
    assert len(shown(outputs, "image/png")) == 1
    assert PeftConfig.from_pretrained(tmp_path / "digits-adapter").peft_type == "RAVAN"
    assert "predicted: " in printed(outputs)


@in_full_or_shortened
def test_share_and_load(tmp_path, monkeypatch, in_full):
    notebook = shortened("share_and_load", in_full)
    [cell] = [cell for cell in notebook.cells if "repo_id = None" in cell.source]
    cell.source = cell.source.replace("repo_id = None", 'repo_id = "clinics/digits"')
    with serve_hub() as hub:
        for name, value in {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_TOKEN": "hf_secret",
        }.items():
            monkeypatch.setenv(name, value)
        text = printed(run(notebook, tmp_path))
        files = hub.files("clinics/digits").keys()
    [difference] = re.findall(r"LORA, largest difference of the logits: (\S+)", text)
    assert float(difference) < 1e-4
    accuracy = {name: float(share) for name, share in re.findall(r"^(\w+) +([\d.]+)%$", text, flags=re.MULTILINE)}
    assert accuracy.keys() == {"adapter", "north", "south", "merged"}
    assert not in_full or min(accuracy.values()) > 30
    saved = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("north", "south", "merged")]
    bases = [name for name in saved[0] if "ravan_A" in name or "ravan_B" in name]
    assert bases and all(torch.equal(saved[0][name], other[name]) for name in bases for other in saved[1:])
    assert {"adapter_model.safetensors", "ravan/adapter_model.safetensors", "README.md"} <= files
    assert text.endswith("LORA RAVAN\n")
