import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_ravan import RavanConfig, optimizer_parameter_groups, ravan_config_for_budget

from ..conftest import tiny_bert


def trained(model) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ("ravan_" in n or "lora_" in n))


@pytest.mark.parametrize("lora_rank", [2, 8])
@pytest.mark.parametrize("target_modules", [None, "all-linear", ["query", "intermediate.dense"]], ids=str)
def test_an_adapter_has_the_parameters_of_a_lora_rank(lora_rank, target_modules):
    fields = {"target_modules": target_modules, "task_type": "SEQ_CLS"}
    lora = trained(get_peft_model(tiny_bert(), LoraConfig(r=lora_rank, **fields)))
    config = ravan_config_for_budget(tiny_bert(), lora_rank=lora_rank, num_heads=2, init_bases="normal", **fields)
    ravan = trained(get_peft_model(tiny_bert(), config))
    # one more rank would be too much: the budget is used but for 2 r + 1 a head
    assert 0.75 * lora < ravan <= lora


def test_print_trainable_parameters_agrees(capsys):
    model = nn.Sequential(nn.Linear(768, 768))
    config = ravan_config_for_budget(model, lora_rank=8, num_heads=4, target_modules=["0"])
    assert config.r == 55 and not config.rank_pattern  # 4 * (55**2 + 1) = 12,104 of 8 * 1,536 = 12,288
    get_peft_model(model, config).print_trainable_parameters()
    assert "trainable params: 12,104" in capsys.readouterr().out


def test_targets_of_other_sizes_get_ranks_of_their_own():
    model = nn.ModuleDict({"query": nn.Linear(64, 64), "key": nn.Linear(64, 64), "fc": nn.Linear(64, 256)})
    config = ravan_config_for_budget(model, lora_rank=4, num_heads=2, target_modules=["query", "key", "fc"])
    assert config.r == 15 and config.size_of("query") == (15, 2) and config.size_of("fc") == (25, 2)


def test_a_budget_that_is_too_small_is_reported():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="'0' .4 x 4. has a budget of 8 parameters.*too little for num_heads=8"):
        ravan_config_for_budget(model, lora_rank=1, num_heads=8, target_modules=["0"])


def test_parameter_groups():
    model = get_peft_model(tiny_bert(), RavanConfig(r=2, num_heads=2, task_type="SEQ_CLS"))
    groups = optimizer_parameter_groups(
        model, 1e-3, core_learning_rate=1e-2, scaling_learning_rate=1e-4, weight_decay=0.1
    )
    found = {group["name"]: (group["lr"], group["weight_decay"], len(group["params"])) for group in groups}
    assert found == {
        "cores": (1e-2, 0.1, 2),
        "scalings": (1e-4, 0.0, 2),  # never decayed
        "weights": (1e-3, 0.1, 1),
        "biases": (1e-3, 0.0, 1),
    }
    in_groups = {id(parameter) for group in groups for parameter in group["params"]}
    assert in_groups == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    torch.optim.AdamW(groups)
