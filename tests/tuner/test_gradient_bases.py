"""Bases from gradients: planted gradients are found, and gradients of batches are those of the weights."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_ravan import GradientSketch, RavanConfig, initialize_bases_from_gradient
from peft_ravan.tuner.bases import BasesShape, make_bases

from ..conftest import classification_dataset, tiny_bert


def adapted(model, **kwargs):
    defaults = {"r": 2, "num_heads": 3, "init_bases": "gradient_svd"}
    return get_peft_model(model, RavanConfig(**{**defaults, **kwargs}))


def captured(A, B, gradient) -> float:
    """The share of a gradient's norm that lies in the span of the bases."""
    return (torch.linalg.norm(B.T @ gradient @ A.T) / torch.linalg.norm(gradient)).item()


def test_planted_directions_are_found_in_the_order_of_their_strength():
    U, V = torch.linalg.qr(torch.randn(80, 6)).Q, torch.linalg.qr(torch.randn(100, 6)).Q
    strengths = torch.tensor([32.0, 16.0, 8.0, 4.0, 2.0, 1.0])
    model = adapted(nn.Sequential(nn.Linear(100, 80)), target_modules=["0"], bases_scale="paper")
    initialize_bases_from_gradient(model, {"0": (U * strengths) @ V.T})
    layer = model.base_model.model[0]
    torch.testing.assert_close((layer.ravan_B["default"].T @ U).abs(), torch.eye(6), atol=1e-4, rtol=0)
    torch.testing.assert_close((layer.ravan_A["default"] @ V).abs(), torch.eye(6), atol=1e-4, rtol=0)


def test_a_sketch_of_noise_and_signal_holds_the_signal():
    signal = 30 * torch.randn(300, 1) @ torch.randn(1, 200) / 250
    gradient = signal + 0.05 * torch.randn(300, 200)
    sketch = GradientSketch(BasesShape(200, 300, 2, 3), seed=0, device="cpu")
    sketch.add_gradient(gradient)
    assert sketch.columns.numel() + sketch.rows.numel() < 0.25 * gradient.numel()
    A, B = make_bases("gradient_svd", sketch.shape, 0, "layer", sketch.low_rank())
    assert captured(A[:1], B[:, :1], signal) > 0.95


def test_the_mean_of_sketches_is_the_sketch_of_the_mean():
    gradients = torch.randn(3, 30, 20)
    shape = BasesShape(20, 30, 2, 2)
    sketches = [GradientSketch(shape, 0, "cpu") for _ in range(4)]
    for sketch, gradient in zip(sketches, [*gradients, gradients.sum(0)], strict=True):
        sketch.add_gradient(gradient)
    *parts, whole = sketches
    torch.testing.assert_close(sum(part.columns for part in parts), whole.columns, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sum(part.rows for part in parts), whole.rows, atol=1e-4, rtol=1e-4)


def test_a_sketch_gives_the_same_gradient_whatever_lies_in_free_memory():
    sketch = GradientSketch(BasesShape(300, 300, 16, 6), seed=0, device="cpu")
    sketch.add_gradient(torch.randn(300, 300))
    expected = sketch.low_rank()
    for size in range(20, 80):
        freed = torch.randint(-(2**62), 2**62, (size,))  # of the size of the pivots of a solver
        del freed
        assert torch.equal(sketch.low_rank(), expected)


def batches():
    dataset = classification_dataset(32).with_format("torch")
    return [dataset[start : start + 8] for start in range(0, 32, 8)]


def test_batches_give_the_directions_of_the_averaged_gradient():
    reference = tiny_bert().eval()
    weight = reference.bert.encoder.layer[0].attention.self.value.weight
    sum(reference(**batch).loss for batch in batches()).backward()

    model = adapted(tiny_bert(), task_type="SEQ_CLS", r=3, num_heads=2, bases_scale="paper")
    initialize_bases_from_gradient(model, batches())
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.value
    A, B = layer.ravan_A["default"], layer.ravan_B["default"]
    best = torch.linalg.svdvals(weight.grad)[:6].norm() / weight.grad.norm()
    assert captured(A, B, weight.grad) > 0.99 * best
    random_bases = torch.linalg.qr(torch.randn(32, 6)).Q
    assert captured(random_bases.T, random_bases, weight.grad) < 0.5 * best


def test_nothing_else_of_the_model_changes(input_ids):
    model = adapted(tiny_bert(), task_type="SEQ_CLS").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    initialize_bases_from_gradient(model, batches(), num_batches=2)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(".ravan_A." in name or ".ravan_B." in name for name in changed)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model.eval()(input_ids).logits, tiny_bert().eval()(input_ids).logits)


def test_the_bases_are_saved_with_the_adapter(tmp_path, input_ids):
    model = adapted(tiny_bert(), task_type="SEQ_CLS", init_weights=True).eval()
    initialize_bases_from_gradient(model, batches())
    for name, parameter in model.named_parameters():
        if "ravan_H" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_an_adapter_that_was_trained_keeps_its_bases():
    model = adapted(nn.Sequential(nn.Linear(10, 10)), target_modules=["0"], init_weights=False)
    with pytest.raises(ValueError, match="was trained already .its core at '0' is not zero."):
        initialize_bases_from_gradient(model, {"0": torch.randn(10, 10)})


@pytest.mark.parametrize(
    "gradients, message",
    [
        ({}, "no gradient for the target '0'"),
        ({"0": torch.randn(10, 8)}, r"target '0' must have shape \(10, 10\), got \(10, 8\)"),
        ({"0": torch.zeros(10, 10)}, "target '0' got a gradient of zero"),
        ([], "at least one batch, got none"),
    ],
)
def test_gradients_that_do_not_fit(gradients, message):
    model = adapted(nn.Sequential(nn.Linear(10, 10)), target_modules=["0"])
    bases = model.base_model.model[0].ravan_A["default"].clone()
    with pytest.raises(ValueError, match=message):
        initialize_bases_from_gradient(model, gradients)
    assert torch.equal(model.base_model.model[0].ravan_A["default"], bases)


def test_other_adapters_are_refused():
    model = adapted(nn.Sequential(nn.Linear(10, 10)), target_modules=["0"], init_bases="normal")
    with pytest.raises(ValueError, match="was not made for bases from a gradient"):
        initialize_bases_from_gradient(model, {"0": torch.randn(10, 10)})
    model = adapted(nn.Sequential(nn.Embedding(10, 10)), target_modules=["0"])
    with pytest.raises(TypeError, match="the target '0' is a Embedding"):
        initialize_bases_from_gradient(model, {"0": torch.randn(10, 10)})


def test_they_must_be_saved():
    with pytest.raises(ValueError, match="`init_bases='gradient_svd'` needs `save_projection=True`"):
        RavanConfig(init_bases="gradient_svd", save_projection=False)
