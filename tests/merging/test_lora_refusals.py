"""The refusals of the methods for LoRA, and their messages."""

import pytest
import torch
from peft import LoraConfig

from peft_ravan import RavanConfig
from peft_ravan.merging import ClientUpdate, UpdateError, merge

from .reference import (
    CONFIG,
    LORA_SHAPES,
    PREFIX,
    a_name,
    assert_same,
    b_name,
    client,
    effective,
    lora_state,
    normal,
    ravan_state,
)


Q = f"{PREFIX}.0.q"
A, B = a_name(Q), b_name(Q)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("method", ["fedit", "ffa_lora", "fedsa_lora", "fedex_lora", "flora", "flexlora", "hetlora"])
def test_methods_for_lora_refuse_adapters_without_lora(method):
    state = ravan_state(seeded())
    with pytest.raises(ValueError, match="merges LoRA adapters, but the global state has no LoRA matrices.*'ravan'"):
        merge(state, [client(state)], method)


@pytest.mark.parametrize("method", ["fedit", "ffa_lora", "fedsa_lora", "fedex_lora", "flora", "flexlora", "hetlora",
                                    "median", "trimmed_mean", "krum", "multi_krum"])  # fmt: skip
@pytest.mark.parametrize("other", ["lora_magnitude_vector.weight", "lora_E"])
def test_dora_and_adalora_are_refused_where_products_are_merged(method, other):
    state = {**lora_state(seeded()), f"{Q}.{other}": torch.ones(9)}
    update = client({n: t for n, t in state.items() if method != "fedsa_lora" or ".lora_B." not in n})
    with pytest.raises(ValueError, match=f"Tensor '{Q}.{other}': with DoRA or AdaLoRA.*'fedavg'"):
        merge(state, [update], method)


@pytest.mark.parametrize("method", ["fedex_lora", "flora"])
def test_methods_that_need_alpha_over_r_say_so(method):
    with pytest.raises(ValueError, match="needs `config`, the LoraConfig of the adapter"):
        merge(lora_state(seeded()), [client(lora_state(seeded(1)))], method)


@pytest.mark.parametrize("method", ["flexlora", "hetlora", "median", "krum"])
def test_other_ranks_need_the_configuration_of_the_global_adapter(method):
    updates = [client(lora_state(seeded(i), 2), 1, i) for i in range(3)]
    with pytest.raises(ValueError, match="client 'client_0'.*its rank is 2.*global adapter 3.*Give `config`"):
        merge(lora_state(seeded()), updates, method)


@pytest.mark.parametrize("method", ["fedex_lora", "flora", "flexlora", "hetlora", "median", "krum", "fedrpca"])
def test_a_configuration_that_is_not_of_lora_is_reported(method):
    updates = [client(lora_state(seeded(i)), 1, i) for i in range(3)]
    options = {"lora": "products"} if method == "fedrpca" else {}
    with pytest.raises(ValueError, match="`config` must be a LoraConfig, since the adapter is LoRA, got RavanConfig"):
        merge(lora_state(seeded()), updates, method, config=RavanConfig(), **options)


@pytest.mark.parametrize("method", ["fedit", "flexlora", "median"])
def test_a_configuration_of_a_client_that_is_not_of_lora_is_reported(method):
    with pytest.raises(UpdateError, match="client 'client_0'.*config must be a LoraConfig.*RavanConfig"):
        merge(lora_state(seeded()), [client(lora_state(seeded(1)), config=RavanConfig())], method, config=CONFIG)


@pytest.mark.parametrize("method", ["median", "krum"])
def test_a_ravan_adapter_of_parameters_is_merged_whatever_its_configuration(method):
    state = ravan_state(seeded())
    config = RavanConfig(target_parameters=["experts.gate_up_proj"])
    merged = merge(state, [client(state, 1, i) for i in range(3)], method, config=config).state
    assert_same(merged, state)


def test_lora_on_parameters_has_no_products():
    config = LoraConfig(r=3, target_parameters=["experts.gate_up_proj"])
    with pytest.raises(ValueError, match="With `target_parameters` A and B hold many matrices each"):
        merge(lora_state(seeded()), [client(lora_state(seeded(1)))], "flexlora", config=config)


def test_a_grouped_convolution_has_no_product():
    state = {A: torch.ones(4, 6, 3, 3), B: torch.ones(8, 2, 1, 1)}
    with pytest.raises(ValueError, match=f"Tensor '{B}': its rank is 2, but that of A is 4. Grouped convolutions"):
        merge(state, [client(state)], "fedex_lora", config=CONFIG)
    with pytest.raises(ValueError, match="Grouped convolutions"):
        merge(state, [client(state)], "flexlora", config=CONFIG)


def test_a_client_whose_a_and_b_do_not_belong_together_is_reported():
    state = lora_state(seeded(1), 2) | {B: normal(seeded(), 9, 3)}
    with pytest.raises(UpdateError, match=f"client 'client_0', tensor '{A}': its rank is 2, .* matching B is 3"):
        merge(lora_state(seeded()), [client(state)], "flexlora", config=CONFIG)


def test_hetlora_drops_a_client_whose_rank_is_above_the_global_one():
    global_state = lora_state(seeded(), 3)
    good, large = client(lora_state(seeded(1), 3), 1, 0), client(lora_state(seeded(2), 4), 1, 1)
    with pytest.raises(UpdateError, match=f"client 'client_1', tensor '{A}': its rank 4 is above the rank 3"):
        merge(global_state, [good, large], "hetlora", config=CONFIG)
    result = merge(global_state, [good, large], "hetlora", config=CONFIG, on_bad_update="drop")
    assert [entry["client"] for entry in result.diagnostics["dropped"]] == ["client_1"]
    assert_same(effective(result.state), effective(good.state))


@pytest.mark.parametrize("method", ["fedit", "fedavg", "fedex_lora", "ffa_lora"])
def test_a_client_with_another_scaling_is_refused_where_a_and_b_are_averaged(method):
    # its B A stands for another update: averaged as it is, the merge would be silently wrong
    global_state = lora_state(seeded(), 3)
    own = LoraConfig(r=3, lora_alpha=12)
    update = client(
        {**lora_state(seeded(1), 3), **{a_name(m): global_state[a_name(m)] for m in LORA_SHAPES}}, config=own
    )
    with pytest.raises(UpdateError, match="client 'client_0', tensor .*scaling.* 4.* 2"):
        merge(global_state, [update], method, config=CONFIG)
    merge(global_state, [ClientUpdate(update.state, 1, "same", config=CONFIG)], method, config=CONFIG)


def test_an_a_that_was_trained_is_refused_by_ffa_lora_and_a_b_by_fedsa_lora():
    global_state = lora_state(seeded(), 3)
    with pytest.raises(UpdateError, match=f"client 'client_0', tensor '{A}': differs from the global one.*frozen"):
        merge(global_state, [client(lora_state(seeded(1), 3))], "ffa_lora")
    with pytest.raises(UpdateError, match=f"client 'client_0', tensor '{B}': .*it stays with its client"):
        merge(global_state, [client(lora_state(seeded(1), 3))], "fedsa_lora")
