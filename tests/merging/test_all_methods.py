"""Properties of every merge method, including those that will be added to the registry."""

import json
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from peft import LoraConfig

from peft_ravan.merging import MERGE_METHODS, SERVER_OPTIMIZERS, UpdateError, get_merge_method, merge, methods_table

from ..properties import examples
from .reference import (
    CASES,
    CONFIG,
    CORES,
    LORA_SHAPES,
    assert_same,
    b_name,
    client,
    effect_of,
    effective,
    every_case,
    lora_state,
    mean_tensor,
    mean_weight,
    merge_faithfully,
    modules_of,
    random_round,
    ravan_state,
    trained_some,
    upload,
)


# an iteration stops at a residual of 1e-7, relative to the matrix
TOLERANCE = 1e-5
CORE = next(iter(CORES))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_method_merges_some_adapter():
    assert {method for method, _ in CASES} == set(MERGE_METHODS)


# ---------------------------------------------------------------- rounds whose result is plain


@every_case
def test_one_client_comes_out_as_it_went_in(method, adapter):
    global_state, [update] = random_round(method, adapter, num_clients=1)
    result = merge_faithfully(method, global_state, [update])
    assert_same(effect_of(result), effective({**global_state, **update.state}), TOLERANCE)


@every_case
def test_identical_clients_come_out_as_they_went_in(method, adapter):
    global_state, updates = random_round(method, adapter)
    same = [replace(update, state=updates[0].state) for update in updates]
    # with its default, robust PCA also finds a sparse part in updates that all have in common: where an entry stands
    # out by more than sqrt(C / n) of the norm
    options = {"lambda_": 1.0} if method == "fedrpca" else {}
    result = merge_faithfully(method, global_state, same, **options)
    assert_same(effect_of(result), effective({**global_state, **updates[0].state}), TOLERANCE)


@every_case
def test_clients_that_did_not_move_leave_the_weights_where_they_are(method, adapter):
    global_state, updates = random_round(method, adapter)
    still = upload(method, global_state, global_state)
    result = merge_faithfully(method, global_state, [replace(update, state=still) for update in updates])
    assert_same(effect_of(result), effective(global_state), TOLERANCE)
    # the same at the very start, where one factor of every product is zero
    zeros = {n: torch.zeros_like(t) if ".lora_A." not in n else t for n, t in global_state.items()}
    still = upload(method, zeros, zeros)
    result = merge_faithfully(method, zeros, [replace(update, state=still) for update in updates])
    assert_same(effect_of(result), effective(zeros), TOLERANCE)


@every_case
def test_one_client_among_others_may_have_an_update_of_zero(method, adapter):
    global_state, updates = random_round(method, adapter)
    zeros = {name: torch.zeros_like(t) for name, t in global_state.items()}
    updates[0] = replace(updates[0], state=upload(method, zeros, global_state))
    for order in (updates, updates[::-1]):
        result = merge_faithfully(method, global_state, order)
        assert all(torch.isfinite(tensor).all() for tensor in effect_of(result).values())


@examples(5)
@given(seed=st.integers(0, 2**20), order=st.permutations(range(5)), num_clients=st.integers(3, 5))
@every_case
def test_the_order_of_the_clients_does_not_matter(method, adapter, seed, order, num_clients):
    global_state, updates = random_round(method, adapter, num_clients, seed)
    shuffled = [updates[index] for index in order if index < num_clients]
    one, two = (merge_faithfully(method, global_state, u) for u in (updates, shuffled))
    assert_same(effect_of(two), effect_of(one), TOLERANCE)


@pytest.mark.parametrize(
    "method, adapter", [case for case in CASES if MERGE_METHODS[case[0]].exact in ("yes", "Ravan: yes, LoRA: no")]
)
def test_what_is_called_exact_is_the_mean_of_the_weights(method, adapter):
    if adapter == "lora" and "LoRA: no" in MERGE_METHODS[method].exact:
        return
    global_state, updates = random_round(method, adapter)
    states = [{**global_state, **update.state} for update in updates]
    whole = [replace(update, state=state) for update, state in zip(updates, states, strict=True)]
    expected = {module: mean_weight(whole, module, CONFIG) for module in modules_of(global_state)}
    expected |= {n: mean_tensor(whole, n) for n in effective(global_state) if n not in expected}
    if (method, adapter) == ("ravan", "lora"):
        expected = {n: mean_tensor(whole, n) for n in global_state}  # on LoRA it is FedAvg
        return assert_same(merge_faithfully(method, global_state, updates).state, expected)
    assert_same(effect_of(merge_faithfully(method, global_state, updates)), expected, 1e-9)


# ---------------------------------------------------------------- pure functions


@every_case
def test_nothing_that_goes_in_is_changed_or_shared(method, adapter):
    global_state, updates = random_round(method, adapter)
    parts = [global_state, *(update.state for update in updates)]
    copies = [{name: tensor.clone() for name, tensor in part.items()} for part in parts]
    for chosen in (updates, updates[:1]):
        result = merge_faithfully(method, global_state, chosen)
        inputs = {tensor.untyped_storage().data_ptr() for part in parts for tensor in part.values()}
        outputs = [*result.state.values(), *result.server_state.values()]
        outputs += [factor for d in result.base_deltas.values() for factor in (d.left, d.right) if factor is not None]
        assert not inputs & {tensor.untyped_storage().data_ptr() for tensor in outputs}
        assert not any(tensor.requires_grad for tensor in outputs)
    for part, copy in zip(parts, copies, strict=True):
        assert all(torch.equal(part[name], tensor) for name, tensor in copy.items())


@every_case
def test_the_same_round_gives_the_same_bits(method, adapter):
    global_state, updates = random_round(method, adapter)
    one, two = (merge_faithfully(method, global_state, updates) for _ in range(2))
    assert all(torch.equal(one.state[name], tensor) for name, tensor in two.state.items())
    assert one.diagnostics == two.diagnostics


@every_case
def test_states_that_are_being_trained_can_be_given_as_they_are(method, adapter):
    global_state, updates = random_round(method, adapter)
    expected = merge_faithfully(method, global_state, updates).state
    trained = {name: tensor.clone().requires_grad_() for name, tensor in global_state.items()}
    result = merge_faithfully(method, trained, updates).state
    assert all(
        torch.equal(result[name], tensor) and not result[name].requires_grad for name, tensor in expected.items()
    )


@every_case
def test_diagnostics_can_be_written_as_json(method, adapter):
    global_state, updates = random_round(method, adapter)
    diagnostics = merge_faithfully(method, global_state, updates).diagnostics
    assert json.loads(json.dumps(diagnostics, allow_nan=False)) == diagnostics
    assert diagnostics["method"] == method and diagnostics["dropped"] == []
    assert (diagnostics["num_clients"], diagnostics["num_examples"]) == (5, 1 + 4 + 7 + 10 + 13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@every_case
def test_names_shapes_and_dtypes_are_kept(method, adapter, dtype):
    global_state, updates = random_round(method, adapter, dtype=dtype)
    result = merge_faithfully(method, global_state, updates)
    assert list(result.state) == list(global_state)
    for name, tensor in global_state.items():
        assert result.state[name].dtype == dtype and result.state[name].is_contiguous()
        assert result.state[name].shape == tensor.shape or result.config is not None
    # the result for the states of this dtype, computed in float64
    precise = [{name: t.double() for name, t in part.items()} for part in (global_state, *(u.state for u in updates))]
    expected = merge_faithfully(
        method, precise[0], [replace(u, state=state) for u, state in zip(updates, precise[1:], strict=True)]
    )
    effect, expected = effect_of(result), effect_of(expected)
    factor = 100 if method == "fedrpca" else 20  # its solver stops a little above what rounding allows
    for name, tensor in expected.items():
        assert (effect[name] - tensor).norm() <= factor * torch.finfo(dtype).eps * tensor.norm() + TOLERANCE, name


# ---------------------------------------------------------------- Ravan: heads and whole checkpoints


RAVAN_METHODS = sorted({method for method, adapter in CASES if adapter == "ravan"})


@pytest.mark.parametrize("method", RAVAN_METHODS)
def test_heads_may_differ_where_the_registry_says_so(method):
    global_state, updates = random_round(method, "ravan")
    masks = [
        [True, False, False],
        [True, False, True],
        [False, False, False],
        [True, False, False],
        [True, False, False],
    ]
    some = [trained_some(update, {CORE: mask}) for update, mask in zip(updates, masks, strict=True)]
    if not MERGE_METHODS[method].different_heads:
        with pytest.raises(UpdateError, match=f"client 'client_0', tensor '{CORE}': only some heads.*method='ravan'"):
            merge_faithfully(method, global_state, some)
        return
    merged = merge_faithfully(method, global_state, some).state
    assert torch.equal(merged[CORE][1], global_state[CORE][1])  # nobody trained it
    torch.testing.assert_close(merged[CORE][2], updates[1].state[CORE][2])  # one client did
    trainers = [updates[index] for index in (0, 1, 3, 4)]
    only = merge_faithfully(method, global_state, trainers).state  # four clients did
    torch.testing.assert_close(merged[CORE][0], only[CORE][0], atol=1e-6, rtol=1e-6)
    whole = merge_faithfully(method, global_state, updates).state
    assert_same(
        {n: t for n, t in merged.items() if n != CORE}, {n: t for n, t in whole.items() if n != CORE}, TOLERANCE
    )


@pytest.mark.parametrize("method", RAVAN_METHODS)
def test_a_mask_of_all_heads_is_no_mask(method):
    global_state, updates = random_round(method, "ravan")
    masked = [trained_some(update, {CORE: [True] * 3}) for update in updates]
    masked[1] = replace(masked[1], trained_heads={CORE: None})
    one, two = (merge_faithfully(method, global_state, u).state for u in (updates, masked))
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())


@pytest.mark.parametrize("method", RAVAN_METHODS)
def test_a_whole_checkpoint_can_be_the_global_state(method):
    products, updates = random_round(method, "ravan")
    scaling, bases = CORE.replace("ravan_H", "ravan_s"), CORE.replace("ravan_H", "ravan_A")
    s = torch.tensor([2.0, -0.5, 4.0], dtype=torch.float64)
    checkpoint = {**products, CORE: products[CORE] / s[:, None, None], scaling: s, bases: torch.ones(12, 5)}
    merged = merge_faithfully(method, checkpoint, updates).state
    assert list(merged) == list(checkpoint)
    assert torch.equal(merged[scaling], torch.ones(3, dtype=torch.float64))
    assert torch.equal(merged[bases], checkpoint[bases])
    expected = merge_faithfully(method, products, updates).state
    assert_same({name: merged[name] for name in expected}, expected, TOLERANCE)


def test_fed_sb_refuses_adapters_with_more_heads_and_without():
    state = ravan_state(seeded())
    with pytest.raises(ValueError, match=f"tensor '{CORE}' has 3 heads.*num_heads=1"):
        merge(state, [client(state)], "fed_sb")
    with pytest.raises(ValueError, match="there are no cores"):
        merge(lora_state(seeded()), [client(lora_state(seeded()))], "fed_sb")


# ---------------------------------------------------------------- what the registry says


LORA_METHODS = sorted({method for method, adapter in CASES if adapter == "lora"})


@pytest.mark.parametrize("method", LORA_METHODS)
def test_ranks_may_differ_where_the_registry_says_so(method):
    global_state, updates = random_round(method, "lora")
    own = LoraConfig(r=2, lora_alpha=8)
    lower = upload(method, lora_state(seeded(9), 2), lora_state(seeded(9), 2))
    updates[2] = replace(updates[2], state=lower, config=own)
    if MERGE_METHODS[method].different_ranks:
        result = merge_faithfully(method, global_state, updates)
        assert all(torch.isfinite(tensor).all() for tensor in effect_of(result).values())
    else:
        with pytest.raises(UpdateError, match="client 'client_2', tensor '.*lora_.*': must have shape .* got .*"):
            merge_faithfully(method, global_state, updates)


@pytest.mark.parametrize("method, adapter", [case for case in CASES if MERGE_METHODS[case[0]].secure_aggregation])
def test_sums_over_clients_suffice_where_the_registry_says_so(method, adapter):
    # two clients are replaced by their mean, with the examples of both
    global_state, updates = random_round(method, adapter)
    both = updates[1:3]
    mean = upload(method, {name: mean_tensor(both, name) for name in both[0].state}, global_state)
    aggregate = client(mean, sum(update.num_examples for update in both), 9)
    one, two = (
        merge_faithfully(method, global_state, u) for u in (updates, [updates[0], aggregate, updates[3], updates[4]])
    )
    assert_same(effect_of(two), effect_of(one), 1e-9)


@pytest.mark.parametrize("described", [*MERGE_METHODS.values(), *SERVER_OPTIMIZERS.values()], ids=lambda d: d.name)
def test_every_option_has_a_default_and_a_line_of_help(described):
    assert set(described.options_help) == set(described.options)
    assert all(text and "  " not in text and "\n" not in text for text in described.options_help.values())
    assert not any(default is described.function for default in described.options.values())
    assert described.summary.endswith(".") and described.reference.startswith("https://") and described.pretty_name


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_a_method_is_found_by_its_name_and_has_its_row(name):
    method = get_merge_method(name)
    assert method.name == name
    [row] = [line for line in methods_table().splitlines() if f"`{name}`" in line]
    assert method.averages in row and method.cost in row and method.exact in row


def test_a_frozen_or_personal_part_is_one_of_a_lora_name():
    for method in MERGE_METHODS.values():
        for part in sum(method.frozen_cycle, method.frozen_parts + method.personal_parts):
            assert any(part in name for name in lora_state(seeded())) or "embedding" in part
    assert b_name(next(iter(LORA_SHAPES))) in lora_state(seeded())
