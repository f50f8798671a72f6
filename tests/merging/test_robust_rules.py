"""Median, trimmed mean, Krum and Multi-Krum: their definitions entry by entry, and clients with poisoned uploads."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from peft_ravan.merging import ClientUpdate, UpdateError, merge
from peft_ravan.merging.distances import squared_distances

from .reference import (
    CONFIG,
    CORES,
    LORA_SHAPES,
    TASK_HEAD,
    LoraRound,
    a_name,
    assert_same,
    b_name,
    best_of_rank,
    client,
    effective,
    entrywise,
    few,
    krum_scores,
    lora_rounds,
    lora_state,
    normal,
    ravan_state,
    regauged,
    trained_some,
    trimmed,
    weight_of,
)


CORE = next(iter(CORES))
seeds = st.integers(0, 2**20)
MAKERS = {"ravan": ravan_state, "lora": lora_state}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vector(round_: LoraRound, update: ClientUpdate) -> torch.Tensor:
    """All weights that a client changes, as one vector."""
    weights = effective(update.state, update.config or round_.config)
    return torch.cat([tensor.flatten() for tensor in weights.values()])


# ---------------------------------------------------------------- explicit numbers


def numbers(*values: float) -> list[ClientUpdate]:
    return [ClientUpdate({"w": torch.tensor([float(value)])}, 1, f"c{i}") for i, value in enumerate(values)]


def merged_number(method: str, *values: float, **options) -> float:
    return merge({"w": torch.tensor([100.0])}, numbers(*values), method, **options).state["w"].item()


def test_the_middle_of_an_even_number_of_clients_is_the_mean_of_both():
    assert merged_number("median", 1, 7, 3, 1000) == 5
    assert merged_number("median", 1, 7, -1000) == 1


def test_the_number_of_trimmed_clients_is_rounded_up():
    assert merged_number("trimmed_mean", 0, 1, 2, 30, trim=0.1) == 1.5
    assert merged_number("trimmed_mean", 0, 1, 2, 30, trim=0.25) == 1.5
    assert merged_number("trimmed_mean", 0, 1, 2, 30, trim=0) == 8.25
    # never more than all but one or two
    assert merged_number("trimmed_mean", 0, 1, 2, trim=0.4) == 1
    assert merged_number("trimmed_mean", 0, 4, trim=0.4) == 2


def test_krum_takes_the_client_whose_nearest_neighbours_are_nearest():
    # f = 1, so two neighbours each: 0: 1 + 9, 1: 1 + 4, 3: 4 + 9, 7: 16 + 36, 50: ...
    result = merge({"w": torch.tensor([100.0])}, numbers(0, 1, 3, 7, 50), "krum", num_bad_clients=1)
    assert result.state["w"].item() == 1 and result.diagnostics["chosen"] == ["c1"]
    assert list(result.diagnostics["scores"].values()) == pytest.approx([10, 5, 13, 52, 43**2 + 47**2])


def test_multi_krum_averages_the_clients_with_the_lowest_scores():
    assert merged_number("multi_krum", 0, 1, 3, 7, 50, num_bad_clients=1) == pytest.approx(11 / 4)
    assert merged_number("multi_krum", 0, 1, 3, 7, 50, num_bad_clients=1, num_chosen=2) == pytest.approx(0.5)
    assert merged_number("multi_krum", 0, 1, 3, 7, 50, num_bad_clients=1, num_chosen=5) == pytest.approx(61 / 5)


# ---------------------------------------------------------------- against the definitions


@few
@given(
    seed=seeds,
    num_clients=st.integers(1, 6),
    masks=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=6),
)
@pytest.mark.parametrize("method", ["median", "trimmed_mean"])
def test_every_entry_of_a_head_is_looked_at_over_the_clients_that_trained_it(method, seed, num_clients, masks):
    generator = seeded(seed)
    global_state, states = ravan_state(generator), [ravan_state(generator) for _ in range(num_clients)]
    updates = [trained_some(client(s, 1, i), {CORE: m}) for i, (s, m) in enumerate(zip(states, masks, strict=False))]
    merged = merge(global_state, updates, method, **({"trim": 0.3} if method == "trimmed_mean" else {})).state

    def rule(tensors):
        count = len(tensors)
        num_trimmed = (count - 1) // 2 if method == "median" else min(-(-3 * count // 10), (count - 1) // 2)
        return entrywise(trimmed(num_trimmed), tensors)

    expected = {name: rule([state[name] for state in states]) for name in global_state if name != CORE}
    for head in range(3):
        values = [state[CORE][head] for state, mask in zip(states, masks, strict=False) if mask[head]]
        torch.testing.assert_close(merged.get(CORE)[head], rule(values) if values else global_state[CORE][head])
    assert_same({name: tensor for name, tensor in merged.items() if name != CORE}, expected)


@few
@given(lora_rounds(max_clients=5, different_ranks=True))
@pytest.mark.parametrize("method, num_trimmed", [("median", [0, 0, 0, 1, 1, 2]), ("trimmed_mean", [0, 0, 0, 1, 1, 1])])
def test_for_lora_the_entries_are_those_of_the_products(method, num_trimmed, round_):
    result = merge(round_.global_state, round_.updates, method, config=round_.config)
    rule = trimmed(num_trimmed[len(round_.updates)])
    for module in LORA_SHAPES:
        dense = [weight_of(update.state, module, update.config or round_.config) for update in round_.updates]
        expected = best_of_rank(entrywise(rule, dense), len(round_.global_state[a_name(module)]))
        torch.testing.assert_close(weight_of(result.state, module, round_.config), expected, atol=1e-8, rtol=1e-8)
    expected = entrywise(rule, [update.state[TASK_HEAD] for update in round_.updates])
    torch.testing.assert_close(result.state[TASK_HEAD], expected)


@few
@given(lora_rounds(min_clients=5, max_clients=7, different_ranks=True), st.integers(0, 1))
def test_krum_measures_distances_between_dense_weights(round_, num_bad_clients):
    options = dict(config=round_.config, num_bad_clients=num_bad_clients)
    result = merge(round_.global_state, round_.updates, "krum", **options)
    scores = krum_scores([vector(round_, update) for update in round_.updates], num_bad_clients)
    assert list(result.diagnostics["scores"].values()) == pytest.approx(scores, rel=1e-9)
    best = round_.updates[scores.index(min(scores))]
    assert result.diagnostics["chosen"] == [best.client_id]
    for module in LORA_SHAPES:
        rank = len(round_.global_state[a_name(module)])
        expected = best_of_rank(weight_of(best.state, module, best.config or round_.config), rank)
        torch.testing.assert_close(weight_of(result.state, module, round_.config), expected, atol=1e-8, rtol=1e-8)

    chosen = sorted(range(len(scores)), key=scores.__getitem__)[: len(scores) - num_bad_clients]
    equal = [replace(round_.updates[i], num_examples=1) for i in sorted(chosen)]
    result = merge(round_.global_state, round_.updates, "multi_krum", **options)
    assert result.diagnostics["chosen"] == [update.client_id for update in equal]
    mean = LoraRound(round_.config, round_.global_state, equal)
    for module in LORA_SHAPES:
        expected = best_of_rank(mean.mean_weight(module), len(round_.global_state[a_name(module)]))
        torch.testing.assert_close(weight_of(result.state, module, round_.config), expected, atol=1e-8, rtol=1e-8)


def test_the_nearest_are_found_where_all_have_moved_far():
    # float64 cannot tell (1e8 + 1) ** 2 from 1e16 + 2e8
    moved = [1e8 + offset for offset in (-2.0, 2.0, 3.0, -3.0, 0.5)]
    updates = [
        ClientUpdate({"w": torch.tensor([value], dtype=torch.float64)}, 1, f"c{i}") for i, value in enumerate(moved)
    ]
    result = merge({"w": torch.zeros(1, dtype=torch.float64)}, updates, "krum", num_bad_clients=1)
    assert list(result.diagnostics["scores"].values()) == [1 + 6.25, 1 + 2.25, 1 + 6.25, 1 + 12.25, 2.25 + 6.25]


@few
@given(seeds, st.sampled_from(["lora", "ravan"]), st.sampled_from([1e3, 1e6]), st.booleans())
def test_distances_do_not_lose_what_clients_differ_by(seed, adapter, far, attacked):
    generator, make = seeded(seed), MAKERS[adapter]
    common = {name: far * tensor for name, tensor in make(generator).items()}
    updates = [
        client({name: tensor + 1e-3 * normal(generator, *tensor.shape) for name, tensor in common.items()}, 1, i)
        for i in range(6)
    ]
    if attacked:
        updates[2] = client({name: 1e4 * tensor for name, tensor in common.items()}, 1, 2)
    if adapter == "lora":
        # the same updates in other factors, which differ much
        updates = [regauged(update, generator) for update in updates]
    start = make(generator)
    # as precise as the products themselves are in float64
    weights = [torch.cat([t.flatten() for t in effective(update.state).values()]) for update in updates]
    rounding = 1e-13 * weights[0].norm().item()
    expected = torch.cdist(*[torch.stack(weights)] * 2, compute_mode="donot_use_mm_for_euclid_dist")
    actual = squared_distances(start, updates, CONFIG).sqrt()
    torch.testing.assert_close(actual[:2, :2], expected[:2, :2], atol=rounding, rtol=1e-6)
    torch.testing.assert_close(actual, expected, atol=1e4 * rounding if attacked else rounding, rtol=1e-6)


# ---------------------------------------------------------------- poison


ROBUST = {"median": {}, "trimmed_mean": {"trim": 1 / 3}, "krum": {}, "multi_krum": {}}


def poisoned(state: dict[str, torch.Tensor], kind: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The poisoned version of an honest update. For LoRA, changing B alone changes the weight update."""
    changed = {name: tensor for name, tensor in state.items() if ".lora_A." not in name}
    factor = {"scaled": 100.0, "flipped": -10.0}.get(kind)
    if factor is not None:
        return state | {name: factor * tensor for name, tensor in changed.items()}
    return state | {name: 30 * normal(generator, *tensor.shape) for name, tensor in changed.items()}


def round_with_poison(adapter: str, kind: str, num_bad: int, examples_of_bad: int = 1):
    """Nine clients around a common state, some of them poisoned. Returns global state, updates and honest mean."""
    generator = seeded(3)
    make = MAKERS[adapter]
    center = make(generator)
    honest = [
        {name: t + 0.1 * noise for (name, t), noise in zip(center.items(), make(generator).values(), strict=True)}
        for _ in range(9)
    ]
    effects = [effective(state) for state in honest[: 9 - num_bad]]
    mean = {name: sum(effect[name] for effect in effects) / len(effects) for name in effects[0]}
    states = [poisoned(state, kind, generator) if i >= 9 - num_bad else state for i, state in enumerate(honest)]
    updates = [client(s, examples_of_bad if i >= 9 - num_bad else 1, i) for i, s in enumerate(states)]
    return make(generator), updates, mean


def distance(state: dict[str, torch.Tensor], mean: dict[str, torch.Tensor]) -> float:
    """The distance to the honest mean, relative to its norm."""
    effect = effective(state)
    return (
        (
            sum((effect[name] - tensor).square().sum() for name, tensor in mean.items())
            / sum(tensor.square().sum() for tensor in mean.values())
        )
        .sqrt()
        .item()
    )


@pytest.mark.parametrize("num_bad", [1, 3])
@pytest.mark.parametrize("kind", ["scaled", "flipped", "noise"])
@pytest.mark.parametrize("adapter", MAKERS)
@pytest.mark.parametrize("method", ROBUST)
def test_poison_moves_fedavg_far_and_robust_rules_hardly(method, adapter, kind, num_bad):
    global_state, updates, mean = round_with_poison(adapter, kind, num_bad)
    assert distance(merge(global_state, updates, method, **ROBUST[method]).state, mean) < 0.25
    assert distance(merge(global_state, updates, "fedavg").state, mean) > 1.0


@pytest.mark.parametrize("adapter", MAKERS)
@pytest.mark.parametrize("method", ["krum", "multi_krum"])
def test_krum_does_not_choose_poison(method, adapter):
    global_state, updates, _ = round_with_poison(adapter, "flipped", 3)
    chosen = merge(global_state, updates, method).diagnostics["chosen"]
    assert chosen and not {"client_6", "client_7", "client_8"} & set(chosen)


@pytest.mark.parametrize("adapter", MAKERS)
@pytest.mark.parametrize("method", ROBUST)
def test_a_client_gains_nothing_by_claiming_many_examples(method, adapter):
    honest = round_with_poison(adapter, "flipped", 2)
    liars = round_with_poison(adapter, "flipped", 2, examples_of_bad=10**9)
    modest = merge(*honest[:2], method, **ROBUST[method]).state
    greedy = merge(*liars[:2], method, **ROBUST[method]).state
    assert all(torch.equal(greedy[name], tensor) for name, tensor in modest.items())


@pytest.mark.parametrize("method", ["median", "trimmed_mean", "krum", "multi_krum"])
def test_the_largest_entries_that_are_taken_do_not_break_a_robust_rule(method):
    state = {a_name("m"): torch.ones(1, 2), b_name("m"): torch.ones(2, 1)}
    huge = {name: torch.full_like(tensor, 1.8e16) for name, tensor in state.items()}
    mixed = {name: tensor * torch.tensor([1.0, -1.0]).reshape(-1, 1)[: len(tensor)] for name, tensor in huge.items()}
    updates = [client(s, 1, i) for i, s in enumerate([huge, state, state, mixed, state, state, state])]
    options = {"trim": 0.3} if method == "trimmed_mean" else {}
    merged = merge(state, updates, method, **options).state
    torch.testing.assert_close(merged[b_name("m")] @ merged[a_name("m")], torch.ones(2, 2))


# ---------------------------------------------------------------- gauge


@few
@given(lora_rounds(min_clients=3, max_clients=5, different_ranks=True), seeds)
@pytest.mark.parametrize("method", ["median", "trimmed_mean", "krum", "multi_krum", "flexlora", "flora"])
def test_other_factors_of_the_same_update_give_the_same_merge(method, round_, seed):
    generator = seeded(seed)
    other = [regauged(update, generator) for update in round_.updates]
    results = [merge(round_.global_state, u, method, config=round_.config) for u in (round_.updates, other)]
    one, two = (effective(result.state, result.config or round_.config) for result in results)
    assert_same(two, one, tol=1e-7)


def test_averaging_a_and_b_apart_is_not_free_of_the_gauge():
    generator = seeded()
    updates = [client(lora_state(generator), 1, i) for i in range(3)]
    one = effective(merge(updates[0].state, updates, "fedit").state)
    two = effective(merge(updates[0].state, [regauged(u, generator) for u in updates], "fedit").state)
    assert any((one[module] - two[module]).abs().max() > 0.1 for module in LORA_SHAPES)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("method", ["krum", "multi_krum"])
@pytest.mark.parametrize("num_clients, f", [(4, 1), (6, 2), (2, None), (2, 0)])
def test_krum_needs_enough_clients(method, num_clients, f):
    with pytest.raises(
        UpdateError, match=f"needs 2 f . 3 clients or more.*got {num_clients} clients and f = {f or 0}"
    ):
        merged_number(method, *range(num_clients), num_bad_clients=f)


@pytest.mark.parametrize("method", ["krum", "multi_krum"])
def test_krum_withstands_no_negative_number_of_clients(method):
    with pytest.raises(ValueError, match="0 bad clients or more, got `num_bad_clients` = -1"):
        merged_number(method, *range(5), num_bad_clients=-1)


@pytest.mark.parametrize("num_chosen", [0, -1, 6])
def test_multi_krum_cannot_choose_more_clients_than_there_are(num_chosen):
    with pytest.raises(ValueError, match=f"`num_chosen` must be from 1 to 5 clients, got {num_chosen}"):
        merged_number("multi_krum", *range(5), num_chosen=num_chosen)


@pytest.mark.parametrize("trim", [-0.1, 0.5, 1.0, float("nan")])
def test_not_everything_can_be_trimmed(trim):
    with pytest.raises(ValueError, match="`trim` must be at least 0 and below 0.5"):
        merged_number("trimmed_mean", 1, 2, 3, trim=trim)


@pytest.mark.parametrize("method", ["krum", "multi_krum"])
def test_krum_needs_all_heads_of_every_client(method):
    updates = [client(ravan_state(seeded(i)), 1, i) for i in range(5)]
    updates[2] = trained_some(updates[2], {CORE: [True, False, True]})
    with pytest.raises(ValueError, match=f"client 'client_2', tensor '{CORE}': only some heads were trained"):
        merge(ravan_state(seeded()), updates, method)


def test_lora_needs_a_configuration_only_where_ranks_differ():
    updates = [client(lora_state(seeded(i)), 1, i) for i in range(5)]
    without, with_ = (merge(lora_state(seeded()), updates, "median", **o).state for o in ({}, {"config": CONFIG}))
    assert all(torch.equal(without[name], tensor) for name, tensor in with_.items())
