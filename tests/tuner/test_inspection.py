"""The results of `inspect_adapter`, compared with explicit weight updates."""

import math
import sys

import pandas as pd
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_ravan import RavanConfig, bases_fingerprint, inspect_adapter, to_lora

from ..conftest import randomize_adapter, tiny_bert, tiny_llama


def adapted(base: nn.Module | None = None, **kwargs) -> PeftModel:
    base = nn.Sequential(nn.Linear(20, 14), nn.Linear(14, 10)) if base is None else base
    model = get_peft_model(base, RavanConfig(**{"r": 2, "num_heads": 3, "target_modules": ["0", "1"], **kwargs}))
    randomize_adapter(model)
    return model


def planted(*singular_values: list[float]) -> PeftModel:
    """An adapter whose updates have the given singular values, head by head."""
    model = adapted(rank_pattern={}, r=2, num_heads=2, bases_scale="paper")
    for layer, values in zip(model.base_model.model, singular_values, strict=True):
        layer.ravan_H["default"].data = torch.tensor(values).reshape(2, 2).diag_embed() / 2
        layer.ravan_s["default"].data = torch.tensor([2.0, -2.0])
    return model


def test_planted_heads():
    report = inspect_adapter(planted([3.0, 4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]))
    first, second = report.targets.values()
    torch.testing.assert_close(first.singular_values, torch.tensor([4.0, 3, 0, 0]).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(first.head_norms, torch.tensor([5.0, 0]).double(), atol=1e-5, rtol=0)
    assert first.scalings.tolist() == [2, -2] and first.rank == 4
    assert first.norm == pytest.approx(5) and second.norm == pytest.approx(2)
    assert second.effective_rank == pytest.approx(4)
    entropy = -(3 / 7 * math.log(3 / 7) + 4 / 7 * math.log(4 / 7))
    assert first.effective_rank == pytest.approx(math.exp(entropy), abs=1e-3)


@pytest.mark.parametrize("init_bases", ["gram_schmidt", "normal", "constant", "shared"])
def test_values_are_those_of_the_update(init_bases):
    model = adapted(init_bases=init_bases)
    report = inspect_adapter(model)
    for name, layer in zip("01", model.base_model.model, strict=True):
        update = layer.get_delta_weight("default").double()
        values, found = torch.linalg.svdvals(update), report.targets[name].singular_values
        torch.testing.assert_close(found, values[: len(found)], atol=1e-4, rtol=1e-4)
        A, B, H, s = layer.adapter_tensors("default")
        heads = [
            s[i] * B[:, 2 * i : 2 * i + 2] @ H[i] @ A[2 * i : 2 * i + 2] for i in range(3)
        ]  # fmt: skip
        norms = torch.stack([head.norm() for head in heads]).double()
        torch.testing.assert_close(report.targets[name].head_norms, norms, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("save_projection", [True, False])
def test_a_folder_tells_what_the_model_tells(tmp_path, save_projection):
    model = adapted(save_projection=save_projection)
    model.save_pretrained(tmp_path)
    of_model, of_folder = inspect_adapter(model).to_frame(), inspect_adapter(tmp_path).to_frame()
    pd.testing.assert_frame_equal(of_model.drop(columns="num_bytes"), of_folder.drop(columns="num_bytes"))
    file_size = (tmp_path / "adapter_model.safetensors").stat().st_size
    # the rest of the file is its header
    assert inspect_adapter(tmp_path).num_bytes == of_folder["num_bytes"].sum() == pytest.approx(file_size, abs=1200)


def test_lora_folders_with_their_scaling(tmp_path):
    model = get_peft_model(
        nn.Sequential(nn.Linear(20, 14), nn.Linear(14, 10)),
        LoraConfig(r=4, lora_alpha=12, target_modules=["0", "1"], rank_pattern={"1": 3}, alpha_pattern={"1": 6}),
    )
    randomize_adapter(model)
    model.save_pretrained(tmp_path)
    report = inspect_adapter(tmp_path)
    assert [target.rank for target in report.targets.values()] == [4, 3]
    for name, layer in zip("01", model.base_model.model, strict=True):
        values = torch.linalg.svdvals(layer.get_delta_weight("default").double())
        found = report.targets[name].singular_values
        torch.testing.assert_close(found, values[: len(found)], atol=1e-4, rtol=1e-4)
        assert report.targets[name].head_norms is None
    assert list(report.to_frame()) == ["rank", "effective_rank", "norm", "largest", "num_bytes"]


def test_a_twin_has_the_singular_values_of_its_adapter(tmp_path):
    model = adapted(tiny_bert(), target_modules=["query", "dense"], task_type="SEQ_CLS")
    to_lora(model, tmp_path)
    report, twin = inspect_adapter(model), inspect_adapter(tmp_path)
    assert report.targets.keys() == twin.targets.keys() and len(twin.targets) == 5
    for name, target in report.targets.items():
        torch.testing.assert_close(target.singular_values, twin.targets[name].singular_values, atol=1e-4, rtol=1e-4)


def test_experts_have_heads_of_their_own():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(5, 12, 10))

    base = nn.Sequential()
    base.experts = Experts()
    model = adapted(base, target_modules=None, target_parameters=["experts.up"], num_heads=2)
    [target] = inspect_adapter(model).targets.values()
    layer = model.base_model.model.experts
    update = layer.get_delta_weight("default").double()  # [E, d_out, d_in]
    assert target.head_norms.shape == target.scalings.shape == (10,)
    assert target.norm == pytest.approx(update.norm().item(), rel=1e-5)
    values = torch.linalg.svdvals(update)[:, :4].flatten().sort(descending=True).values
    torch.testing.assert_close(target.singular_values, values, atol=1e-5, rtol=1e-5)


def test_table():
    model = planted([3.0, 4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0])
    report = inspect_adapter(model)
    frame = report.to_frame()
    assert list(frame.index) == ["0", "1"] and frame.index.name == "target"
    assert frame["norm_of_head_0"].tolist() == pytest.approx([5, 2**0.5])
    first = bases_fingerprint(model)["0"][0]
    assert frame["fingerprint"]["0"] == f"{first[0]:+.3f} {first[1]:+.3f}"
    text = str(report)
    assert text.startswith("RAVAN: 2 targets, 0.00 MB\n\n") and "5 (2)  0 (-2)" in text
    assert max(map(len, str(inspect_adapter(adapted(num_heads=5, r=1, rank_pattern={}))).splitlines())) < 180


def test_many_heads_fit_on_a_line():
    base = nn.Sequential(nn.Linear(20, 14))
    text = str(inspect_adapter(adapted(base, target_modules=["0"], r=1, num_heads=12)))
    assert text.splitlines()[-1].endswith(" and 4 more")


def test_an_adapter_of_zeros():
    report = inspect_adapter(get_peft_model(tiny_llama(), RavanConfig(r=2, num_heads=2)))
    assert {(target.norm, target.effective_rank) for target in report.targets.values()} == {(0.0, 0.0)}
    report.plot()


def test_picture_of_heads(tmp_path):
    report = inspect_adapter(planted([3.0, 4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]))
    figure = report.plot(tmp_path / "heads.png")
    assert (tmp_path / "heads.png").read_bytes()[:4] == b"\x89PNG"
    [axes] = figure.axes
    [colours] = axes.child_axes
    [image] = axes.images
    red, green, blue, _ = image.cmap(image.norm([5.0, 2.5, 0.0])).T
    assert (red + green + blue).tolist() == sorted(red + green + blue, reverse=True)  # the largest is the brightest
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1"]
    assert figure.get_suptitle() == "Size of the heads of the RAVAN adapter at its 2 targets"
    assert image.get_array().filled(-1).flatten().tolist() == pytest.approx([5, 0, 2**0.5, 2**0.5], abs=1e-5)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1"]
    assert axes.get_xlabel() == "head" and "norm" in colours.get_ylabel()


def test_heads_that_a_target_does_not_have_are_black():
    report = inspect_adapter(adapted(heads_pattern={"1": 1}))
    values = report.plot().axes[0].images[0].get_array()
    assert values.mask.tolist() == [[False] * 3, [False, True, True]]


def test_picture_of_lora():
    model = get_peft_model(nn.Sequential(nn.Linear(80, 70)), LoraConfig(r=50, target_modules=["0"]))
    randomize_adapter(model)
    report = inspect_adapter(model)
    values = report.plot().axes[0].images[0].get_array()
    assert values.shape == (1, 32)
    assert values[0].tolist() == pytest.approx(report.targets["0"].singular_values[:32].tolist())


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'peft-ravan\[plot\]'"):
        inspect_adapter(adapted()).plot()


def test_what_is_not_known_is_refused():
    for config, message in (
        (IA3Config(target_modules=["0"], feedforward_modules=["0"]), "this one is of IA3"),
        (LoraConfig(target_modules=["0"], use_dora=True), "has `use_dora`"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect_adapter(get_peft_model(nn.Sequential(nn.Linear(20, 14)), config))
