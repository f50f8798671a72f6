"""`train_scaling=False`: the cores are trained, and the scalings stay what they are, whatever PEFT switches on."""

import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

from peft_ravan import RavanConfig, RavanLayer, optimizer_parameter_groups, ravan_config_for_budget
from peft_ravan.sharing.conversion import to_lora

from ..conftest import randomize_adapter


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 20, 12))

    def forward(self, x):
        return (x @ self.up.transpose(1, 2)).sum(dim=0)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.value = nn.Linear(24, 24), nn.Linear(24, 12)
        self.experts = Experts()

    def forward(self, x):
        return self.experts(self.value(torch.tanh(self.query(x))))


def config(train_scaling=False, **kwargs) -> RavanConfig:
    defaults = {"r": 3, "num_heads": 2, "target_modules": ["query", "value"], "target_parameters": ["experts.up"]}
    return RavanConfig(train_scaling=train_scaling, **{**defaults, **kwargs})


def adapted(**kwargs) -> PeftModel:
    return get_peft_model(Model(), config(**kwargs))


def trained(model: nn.Module) -> set[tuple[str, str]]:
    """The kinds of trained parameters, with their adapters."""
    return {tuple(name.split(".")[-2:]) for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(model: nn.Module, steps: int = 2) -> None:
    """Train whatever is trainable, with a weight decay that would move the scalings even without a gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.5)
    for step in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(5, 24, generator=torch.Generator().manual_seed(step))) - 1).square().mean().backward()
        optimizer.step()


def scalings(model: nn.Module, adapter_name: str = "default") -> list[torch.Tensor]:
    layers = [module for module in model.modules() if isinstance(module, RavanLayer)]
    return [layer.adapter_tensors(adapter_name)[3] for layer in layers if adapter_name in layer.ravan_s]


def are_one(model: nn.Module, adapter_name: str = "default") -> bool:
    found = scalings(model, adapter_name)
    return bool(found) and all(torch.equal(scaling, torch.ones_like(scaling)) for scaling in found)


def test_only_the_cores_are_trained():
    model = adapted()
    assert trained(model) == {("ravan_H", "default")}
    # two layers, and three experts with heads of their own
    assert model.get_nb_trainable_parameters()[0] == (1 + 1 + 3) * 2 * 3**2
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model)
    changed = {name.split(".")[-2] for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {"ravan_H"} and are_one(model)


def test_the_default_trains_the_scalings():
    model = get_peft_model(Model(), RavanConfig(r=3, num_heads=2, target_modules=["query"]))
    train(model)
    assert not are_one(model)


def set_heads(model):
    model.set_trained_heads({"query": [True, False], "value": [False, False]})


def set_and_reset_heads(model):
    set_heads(model)
    train(model)
    model.set_trained_heads(None)


def merge_and_unmerge(model):
    model.merge_adapter()
    model.unmerge_adapter()


def disable_and_enable(model):
    with model.disable_adapter():
        model(torch.randn(2, 24))


def add_and_delete_another(model):
    model.add_adapter("other", config())
    model.set_adapter("other")
    model.set_adapter("default")
    model.delete_adapter("other")


def delete_the_active_one(model):
    model.add_adapter("other", config())
    model.set_adapter("other")
    model.delete_adapter("other")
    model.set_adapter("default")


@pytest.mark.parametrize(
    "action",
    [
        lambda model: model.set_adapter("default"),
        lambda model: model.set_requires_grad("default"),
        lambda model: (model.set_requires_grad("default", False), model.set_requires_grad(["default"])),
        lambda model: model.base_model.set_adapter(["default"]),
        lambda model: (model.base_model.disable_adapter_layers(), model.base_model.enable_adapter_layers()),
        lambda model: model.half().float(),
        set_heads,
        set_and_reset_heads,
        merge_and_unmerge,
        disable_and_enable,
        add_and_delete_another,
        delete_the_active_one,
    ],
)
def test_nothing_that_activates_an_adapter_trains_its_scalings(action):
    model = adapted()
    action(model)
    assert trained(model) == {("ravan_H", "default")}
    train(model)
    assert are_one(model)
    assert sum(name.endswith("ravan_s") for name in get_peft_model_state_dict(model)) == 3


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("save_projection", [True, False])
def test_a_loaded_adapter_is_trained_on_without_scalings(tmp_path, save_projection, low_cpu_mem_usage):
    model = adapted(save_projection=save_projection)
    train(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], torch.ones_like(saved[name])) for name in saved if name.endswith("ravan_s"))
    loaded = PeftModel.from_pretrained(Model(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    x = torch.randn(5, 24)
    assert torch.equal(loaded(x), model(x))
    assert trained(loaded) == {("ravan_H", "default")}
    train(loaded)
    assert are_one(loaded) and not torch.equal(loaded(x), model(x))


def test_adapters_of_one_model_may_differ():
    model = adapted()
    model.add_adapter("with", config(train_scaling=True, r=2))
    assert trained(model) == {("ravan_H", "default")}
    for _ in range(2):
        model.set_adapter("with")
        assert trained(model) == {("ravan_H", "with"), ("ravan_s", "with")}
        train(model)
        model.set_adapter("default")
        assert trained(model) == {("ravan_H", "default")}
        train(model)
    assert are_one(model) and not are_one(model, "with")
    model.base_model.set_adapter(["default", "with"])
    assert trained(model) == {("ravan_H", "default"), ("ravan_H", "with"), ("ravan_s", "with")}


def test_a_name_can_be_used_again_with_another_value():
    model = adapted()
    for train_scaling in (True, False):
        model.add_adapter("other", config(train_scaling=train_scaling))
        model.set_adapter("other")
        assert (("ravan_s", "other") in trained(model)) is train_scaling
        model.delete_adapter("other")
        model.set_adapter("default")


def test_an_adapter_in_a_plain_model():
    model = inject_adapter_in_model(config(), Model())
    assert trained(model) == {("ravan_H", "default")}
    train(model)
    assert are_one(model)


def test_scalings_that_were_trained_before_keep_their_values(tmp_path):
    model = adapted(train_scaling=True)
    randomize_adapter(model)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "train_scaling": False}))
    loaded = PeftModel.from_pretrained(Model(), tmp_path, is_trainable=True)
    assert torch.equal(loaded(torch.ones(1, 24)), model(torch.ones(1, 24)))
    train(loaded)
    for scaling, expected in zip(scalings(loaded), scalings(model), strict=True):
        assert torch.equal(scaling, expected)


def test_the_lora_twin(tmp_path):
    model = get_peft_model(Model(), config(target_parameters=None))
    train(model)
    to_lora(model, tmp_path)
    x = torch.randn(5, 24)
    torch.testing.assert_close(PeftModel.from_pretrained(Model(), tmp_path)(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("combination_type", ["linear", "cat"])
def test_a_combined_adapter_has_scalings_of_one(combination_type):
    fields = {"target_modules": ["query"], "target_parameters": None}
    model = adapted(**fields)
    model.add_adapter("other", config(train_scaling=True, **fields))
    for seed, name in enumerate(("default", "other")):
        model.set_adapter(name)
        randomize_adapter(model, seed)
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "both", combination_type=combination_type)
    layer = model.base_model.model.query
    expected = 0.5 * layer.get_delta_weight("default") - 2.0 * layer.get_delta_weight("other")
    torch.testing.assert_close(layer.get_delta_weight("both"), expected, atol=1e-5, rtol=1e-5)
    model.set_adapter("both")
    assert trained(model) == {("ravan_H", "both")} and are_one(model, "both")


def test_the_budget_counts_no_scalings():
    model = nn.Sequential(nn.Linear(18, 18))
    # 2 heads, and 2 * 36 = 72 parameters: 2 * 6**2 without scalings, one rank less with them
    fields = {"lora_rank": 2, "num_heads": 2, "target_modules": ["0"]}
    assert ravan_config_for_budget(model, **fields).r == 5
    without = ravan_config_for_budget(model, train_scaling=False, **fields)
    assert without.r == 6
    assert get_peft_model(model, without).get_nb_trainable_parameters()[0] == 2 * 2 * 18


def test_parameter_groups_have_no_scalings():
    groups = optimizer_parameter_groups(adapted(), 1e-3, scaling_learning_rate=1e-4)
    assert {group["name"]: len(group["params"]) for group in groups} == {"cores": 3}


def test_the_configuration(tmp_path):
    config().save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).train_scaling is False
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    del fields["train_scaling"]  # a file from before there was a choice
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    assert PeftConfig.from_pretrained(tmp_path).train_scaling is True
    assert RavanConfig().parameters_per_head(3) == 10 and config().parameters_per_head(3) == 9
