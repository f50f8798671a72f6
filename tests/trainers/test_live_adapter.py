"""What is sent between server and clients, and what must not leak from one client to the next."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from peft_ravan import RavanConfig
from peft_ravan.trainers.client.live_adapter import LiveAdapter

from ..conftest import randomize_adapter, tiny_bert, tiny_llama
from .helpers import WithStatistics, ravan_bert


def test_only_products_and_the_task_head_are_sent():
    state = LiveAdapter(ravan_bert()).read()
    kinds = {name.rsplit(".", 1)[1] if "ravan" in name else name for name in state}
    assert kinds == {"ravan_H", "base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert sum(name.endswith("ravan_H") for name in state) == 4


def test_products_are_read_and_come_back_with_scalings_at_one():
    model = ravan_bert()
    randomize_adapter(model)
    adapter = LiveAdapter(model)
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    H, s = layer.ravan_H["default"], layer.ravan_s["default"]
    product = (s[:, None, None] * H).detach().clone()
    weight = layer.get_delta_weight("default").detach().clone()
    state = adapter.read()
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.ravan_H"
    assert torch.equal(state[name], product)
    adapter.load(state)
    assert torch.equal(H, product) and torch.equal(s, torch.ones(2))
    torch.testing.assert_close(layer.get_delta_weight("default"), weight)  # the same adapter as before


def test_what_is_read_does_not_change_with_the_model():
    model = ravan_bert()
    adapter = LiveAdapter(model)
    before = adapter.read()
    copies = {name: tensor.clone() for name, tensor in before.items()}
    randomize_adapter(model)
    assert all(torch.equal(before[name], copies[name]) for name in before)
    adapter.load(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.read().items())


def test_lora_is_sent_unchanged():
    state = LiveAdapter(get_peft_model(tiny_llama(), LoraConfig(r=2, task_type="CAUSAL_LM"))).read()
    assert {".".join(name.rsplit(".", 2)[1:]) for name in state} == {"lora_A.weight", "lora_B.weight"}
    assert len(state) == 2 * 2 * 2


def test_statistics_of_the_head_are_sent_and_those_of_the_base_model_restored():
    model = get_peft_model(
        WithStatistics(), RavanConfig(r=2, num_heads=2, target_modules=["body"], modules_to_save=["head"])
    )
    adapter = LiveAdapter(model)
    start = adapter.read()
    assert "base_model.model.head.0.running_mean" in start
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()(torch.randn(16, 8) + 3)
    changed = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, buffers[name])}
    assert "base_model.model.norm.running_mean" in changed
    assert "base_model.model.head.modules_to_save.default.0.running_mean" in changed
    adapter.load(start)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_a_model_without_an_adapter_is_refused_with_advice():
    with pytest.raises(
        TypeError, match=r"BertForSequenceClassification without one. Wrap it first: .model = get_peft"
    ):
        LiveAdapter(tiny_bert())


def test_trained_parameters_outside_of_the_adapter_are_refused():
    model = ravan_bert()
    model.base_model.model.bert.pooler.dense.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="pooler.dense.weight' is trainable but not part of the adapter's checkpoint"):
        LiveAdapter(model)


def test_an_adapter_loaded_for_inference_is_refused():
    model = ravan_bert()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="No parameter of the model is trainable.*is_trainable=True"):
        LiveAdapter(model)


def test_several_active_adapters_are_refused():
    config = RavanConfig(r=3, num_heads=2)  # without a task there is no head, of which only one can be active
    model = get_peft_model(tiny_bert(), config)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="exactly one active adapter, got .'default', 'other'."):
        LiveAdapter(model)


def test_prompt_methods_are_refused():
    model = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="does not support PROMPT_TUNING"):
        LiveAdapter(model)
