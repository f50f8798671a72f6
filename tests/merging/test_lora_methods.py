"""The methods for LoRA against dense weights: alpha / r, rsLoRA, patterns, clients with other ranks and alphas."""

import pytest
import torch
from hypothesis import given
from peft import LoraConfig

from peft_ravan.merging import ClientUpdate, UpdateError, lora_state_for_client, merge

from .reference import (
    CONFIG,
    LORA_SHAPES,
    PREFIX,
    TASK_HEAD,
    LoraRound,
    a_name,
    assert_same,
    b_name,
    best_of_rank,
    client,
    few,
    lora_rounds,
    lora_state,
    mean_tensor,
    modules_of,
    ranks_of,
    scaling_of,
    weight_of,
)


Q = f"{PREFIX}.0.q"
A, B = a_name(Q), b_name(Q)


def state_1x1(a: float, b: float) -> dict[str, torch.Tensor]:
    return {A: torch.tensor([[a]]), B: torch.tensor([[b]])}


def rank_1(value_a: list[float], value_b: list[float]) -> dict[str, torch.Tensor]:
    """A of [r, 1] and B of [1, r]."""
    return {A: torch.tensor(value_a)[:, None], B: torch.tensor(value_b)[None]}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def without(update: ClientUpdate, part: str) -> ClientUpdate:
    state = {name: tensor for name, tensor in update.state.items() if part not in name}
    return ClientUpdate(state, update.num_examples, update.client_id)


# ---------------------------------------------------------------- explicit numbers


def test_averaging_a_and_b_apart_is_not_the_mean_of_the_products():
    updates = [client(state_1x1(1.0, 2.0), 1, 0), client(state_1x1(3.0, 4.0), 3, 1)]
    config = LoraConfig(r=1, lora_alpha=10)
    merged = merge(state_1x1(0.0, 0.0), updates, "fedit")
    assert (merged.state[A].item(), merged.state[B].item()) == (2.5, 3.5)
    # mean of the products 10 * (2 + 3 * 12) / 4 = 95, product of the means 10 * 2.5 * 3.5 = 87.5
    fedex = merge(state_1x1(0.0, 0.0), updates, "fedex_lora", config=config)
    assert (fedex.state[A].item(), fedex.state[B].item()) == (2.5, 3.5)
    assert fedex.base_deltas[Q].dense().item() == 7.5
    flora = merge(state_1x1(0.0, 0.0), updates, "flora", config=config)
    assert flora.state[A].tolist() == [[1.0], [3.0]] and flora.state[B].tolist() == [[0.5, 3.0]]
    assert (flora.config.r, flora.config.lora_alpha) == (2, 20)
    flexlora = merge(state_1x1(1.0, 0.0), updates, "flexlora").state
    assert (flexlora[B] @ flexlora[A]).item() == pytest.approx(9.5)


def test_hetlora_pads_with_zeros_and_weighs_by_the_norm_of_the_weight_update():
    config, own = LoraConfig(r=2, lora_alpha=2), LoraConfig(r=1, lora_alpha=1)  # all scalings are 1
    # norms 3 * 1 and |0.6 * 5 + 0.8 * 5| = 7
    updates = [
        client(rank_1([1.0], [3.0]), 100, 0, config=own),
        client(rank_1([5.0, 5.0], [0.6, 0.8]), 1, 1, config=config),
    ]
    result = merge(rank_1([1.0, 1.0], [0.0, 0.0]), updates, "hetlora", config=config)
    assert result.diagnostics["client_weights"] == pytest.approx([0.3, 0.7])
    torch.testing.assert_close(result.state[A], torch.tensor([[0.3 + 3.5], [3.5]]))
    torch.testing.assert_close(result.state[B], torch.tensor([[0.9 + 0.42, 0.56]]))
    by_examples = merge(rank_1([1.0, 1.0], [0.0, 0.0]), updates, "hetlora", config=config, weight_by="examples")
    assert by_examples.diagnostics["client_weights"] == pytest.approx([100 / 101, 1 / 101])


# ---------------------------------------------------------------- against dense weights


@few
@given(lora_rounds())
def test_fedit_averages_every_tensor(round_: LoraRound):
    merged = merge(round_.global_state, round_.updates, "fedit", config=None).state
    assert_same(merged, {name: mean_tensor(round_.updates, name) for name in merged})


@few
@given(lora_rounds())
def test_ffa_lora_is_exact_and_keeps_a(round_: LoraRound):
    frozen = {name: tensor for name, tensor in round_.global_state.items() if ".lora_A." in name}
    updates = [client({**update.state, **frozen}, update.num_examples, i) for i, update in enumerate(round_.updates)]
    exact = LoraRound(round_.config, round_.global_state, updates)
    merged = merge(round_.global_state, updates, "ffa_lora").state
    for module in LORA_SHAPES:
        assert torch.equal(merged[a_name(module)], round_.global_state[a_name(module)])
        torch.testing.assert_close(weight_of(merged, module, round_.config), exact.mean_weight(module))
    # A need not be sent
    slim = merge(round_.global_state, [without(update, ".lora_A.") for update in updates], "ffa_lora").state
    assert all(torch.equal(slim[name], tensor) for name, tensor in merged.items())


@few
@given(lora_rounds())
def test_fedsa_lora_averages_a_and_keeps_the_global_b(round_: LoraRound):
    updates = [without(update, ".lora_B.") for update in round_.updates]
    merged = merge(round_.global_state, updates, "fedsa_lora").state
    for name, tensor in merged.items():
        expected = round_.global_state[name] if ".lora_B." in name else mean_tensor(updates, name)
        torch.testing.assert_close(tensor, expected)


@few
@given(lora_rounds())
def test_fedex_lora_is_exact_with_what_it_adds_to_the_base_weight(round_: LoraRound):
    result = merge(round_.global_state, round_.updates, "fedex_lora", config=round_.config)
    fedit = merge(round_.global_state, round_.updates, "fedit").state
    assert all(torch.equal(result.state[name], tensor) for name, tensor in fedit.items())
    for module in LORA_SHAPES:
        weight = weight_of(result.state, module, round_.config) + result.base_deltas[module].dense()
        torch.testing.assert_close(weight, round_.mean_weight(module), atol=1e-9, rtol=1e-9)


@few
@given(lora_rounds(different_ranks=True))
def test_flora_is_exact_for_any_ranks_and_alphas(round_: LoraRound):
    result = merge(round_.global_state, round_.updates, "flora", config=round_.config)
    assert result.diagnostics["ranks"] == {
        module: sum(len(update.state[a_name(module)]) for update in round_.updates) for module in LORA_SHAPES
    }
    assert result.diagnostics["ranks"] == ranks_of(result.config)
    for module in LORA_SHAPES:
        # in the returned configuration, with its own alpha / r
        torch.testing.assert_close(weight_of(result.state, module, result.config), round_.mean_weight(module))
    torch.testing.assert_close(result.state[TASK_HEAD], mean_tensor(round_.updates, TASK_HEAD))


@few
@given(lora_rounds(different_ranks=True))
def test_flexlora_is_the_best_approximation_of_the_mean_weight(round_: LoraRound):
    result = merge(round_.global_state, round_.updates, "flexlora", config=round_.config)
    for module in LORA_SHAPES:
        mean, merged = round_.mean_weight(module), weight_of(result.state, module, round_.config)
        best = best_of_rank(mean, len(round_.global_state[a_name(module)]))
        torch.testing.assert_close(merged, best, atol=1e-9, rtol=1e-9)
        kept = best.square().sum() / mean.square().sum()
        assert result.diagnostics["kept_energy"][module] == pytest.approx(kept.item())


@few
@given(lora_rounds(different_ranks=True, max_client_rank=1))
def test_hetlora_is_the_padded_mean(round_: LoraRound):
    result = merge(round_.global_state, round_.updates, "hetlora", config=round_.config)
    norms = [
        sum(weight_of(u.state, m, u.config or round_.config).square().sum() for m in LORA_SHAPES).sqrt().item()
        for u in round_.updates
    ]
    shares = [norm / sum(norms) for norm in norms]
    assert result.diagnostics["client_weights"] == pytest.approx(shares)
    for module in LORA_SHAPES:
        global_A = round_.global_state[a_name(module)]
        mean_A, mean_B = torch.zeros_like(global_A), torch.zeros_like(round_.global_state[b_name(module)])
        for update, share in zip(round_.updates, shares, strict=True):
            client_A, client_B = update.state[a_name(module)], update.state[b_name(module)]
            rank = len(client_A)
            factor = scaling_of(update.config or round_.config, module, rank) / scaling_of(
                round_.config, module, len(global_A)
            )
            mean_A[:rank] += share * client_A
            mean_B[:, :rank] += share * factor * client_B
        torch.testing.assert_close(result.state[b_name(module)], mean_B)
        trained = mean_B.abs().sum(dim=0) > 0
        torch.testing.assert_close(result.state[a_name(module)][trained], mean_A[trained])


def test_the_configuration_of_flora_tells_modules_apart_whose_names_end_alike():
    # the key "q" of a pattern also fits "layers.0.q"
    short = "base_model.model.q"
    shapes = {short: (4, 5), Q: (4, 5)}
    config = LoraConfig(r=2, lora_alpha=8, rank_pattern={r"layers\.0\.q": 3}, alpha_pattern={r"layers\.0\.q": 1})
    updates = [client(lora_state(seeded(i), {short: 2, Q: 3}, shapes=shapes), 1, i) for i in range(2)]
    result = merge(updates[0].state, updates, "flora", config=config)
    for module, rank in ((short, 4), (Q, 6)):
        assert len(result.state[a_name(module)]) == rank
        mean = sum(weight_of(update.state, module, config) for update in updates) / 2
        torch.testing.assert_close(weight_of(result.state, module, result.config), mean)


@pytest.mark.parametrize("method", ["ffa_lora", "fedex_lora", "flora"])
def test_exact_methods_are_exact_to_a_millionth_in_float32(method):
    generator = seeded()
    shapes = {Q: (48, 32)}
    global_state = lora_state(generator, 4, torch.float32, shapes)
    states = [lora_state(generator, 4, torch.float32, shapes) for _ in range(7)]
    if method == "ffa_lora":
        states = [{**state, A: global_state[A]} for state in states]
    updates = [client(state, 3 * i + 1, i) for i, state in enumerate(states)]
    result = merge(global_state, updates, method, **({} if method == "ffa_lora" else {"config": CONFIG}))
    weight = weight_of(result.state, Q, result.config or CONFIG)
    if result.base_deltas:
        weight = weight + result.base_deltas[Q].dense().double()
    mean = LoraRound(CONFIG, global_state, updates).mean_weight(Q)
    assert (weight - mean).norm() <= 1e-6 * mean.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fedex_lora_also_adds_what_rounding_the_means_to_half_precision_has_lost(dtype):
    generator = seeded()
    updates = [client(lora_state(generator, 3, dtype), i + 1, i) for i in range(4)]
    round_ = LoraRound(CONFIG, lora_state(generator, 3, dtype), updates)
    result = merge(round_.global_state, updates, "fedex_lora", config=CONFIG)
    for module in LORA_SHAPES:
        weight = weight_of(result.state, module, CONFIG) + result.base_deltas[module].dense().double()
        torch.testing.assert_close(weight, round_.mean_weight(module), atol=1e-5, rtol=1e-5)


def test_residuals_stay_factors_where_these_are_smaller():
    generator = seeded()
    shapes = {Q: (60, 50), f"{PREFIX}.0.tiny": (2, 3)}
    updates = [client(lora_state(generator, 2, shapes=shapes), 1, i) for i in range(3)]
    deltas = merge(lora_state(generator, 2, shapes=shapes), updates, "fedex_lora", config=CONFIG).base_deltas
    assert deltas[Q].left.shape[1] == deltas[Q].right.shape[0] <= (3 + 1) * 2
    assert deltas[f"{PREFIX}.0.tiny"].right is None


# ---------------------------------------------------------------- directions that can still be trained


def dead_directions(state: dict[str, torch.Tensor]) -> int:
    """The directions in which A and B are both zero, which never get a gradient again."""
    return sum(
        int(((state[a_name(m)] == 0).all(dim=1) & (state[b_name(m)] == 0).all(dim=0)).sum()) for m in modules_of(state)
    )


@pytest.mark.parametrize("frozen_at_zero", ["A", "B"])
@pytest.mark.parametrize("method", ["flexlora", "hetlora", "median", "trimmed_mean", "krum", "multi_krum"])
def test_ranks_that_nobody_used_can_still_be_trained(method, frozen_at_zero):
    # Linear layers start with B = 0, embeddings with A = 0; rank 6 is above d of some modules, and clients have rank 1
    generator = seeded()
    config, own = LoraConfig(r=6, lora_alpha=6), LoraConfig(r=1, lora_alpha=1)
    global_state = lora_state(generator, 6)
    for module in LORA_SHAPES:
        global_state[(a_name if frozen_at_zero == "A" else b_name)(module)].zero_()
    updates = [client(lora_state(generator, 1), 1, i, config=own) for i in range(3)]
    merged = merge(global_state, updates, method, config=config).state
    assert dead_directions(merged) == 0
    assert {name: tensor.shape for name, tensor in merged.items()} == {n: t.shape for n, t in global_state.items()}
    # and they add nothing yet: the mean of three clients of rank 1 has rank 3
    for module in LORA_SHAPES if method not in ("median", "trimmed_mean") else ():
        assert torch.linalg.matrix_rank(weight_of(merged, module, config)) <= 3


@pytest.mark.parametrize("method", ["flexlora", "hetlora", "median", "krum"])
def test_clients_that_did_not_move_from_the_start_leave_an_adapter_that_can_be_trained(method):
    global_state = lora_state(seeded(), 6)
    for module in LORA_SHAPES:
        global_state[b_name(module)].zero_()
    merged = merge(global_state, [client(global_state, 2, i) for i in range(3)], method).state
    assert dead_directions(merged) == 0
    assert all(weight_of(merged, module, CONFIG).abs().max() == 0 for module in LORA_SHAPES)


def test_hetlora_withstands_clients_whose_update_is_zero():
    updates = [client(state_1x1(1.0, 0.0), 9, 0), client(state_1x1(2.0, 3.0), 1, 1), client(state_1x1(5.0, 0.0), 9, 2)]
    result = merge(state_1x1(1.0, 0.0), updates, "hetlora")
    assert result.diagnostics["client_weights"] == [0.0, 1.0, 0.0]
    assert (result.state[A].item(), result.state[B].item()) == (2.0, 3.0)


# ---------------------------------------------------------------- what clients get


@few
@given(lora_rounds(), lora_rounds())
def test_a_client_of_lower_rank_gets_the_best_approximation_in_its_own_scaling(round_, other):
    merged = merge(round_.global_state, round_.updates, "flexlora", config=round_.config).state
    # ranks up to those of the global adapter, alphas of the client's own
    ranks = {m: min(r, len(merged[a_name(m)])) for m, r in ranks_of(other.config).items()}
    own = LoraConfig(
        r=1,
        rank_pattern={module.removeprefix("base_model.model."): rank for module, rank in ranks.items()},
        lora_alpha=other.config.lora_alpha,
        alpha_pattern=other.config.alpha_pattern,
        use_rslora=other.config.use_rslora,
    )
    sent = lora_state_for_client(merged, round_.config, own)
    for module, rank in ranks.items():
        assert sent[a_name(module)].shape[0] == sent[b_name(module)].shape[1] == rank
        best = best_of_rank(round_.mean_weight(module), rank)
        torch.testing.assert_close(weight_of(sent, module, own), best, atol=1e-9, rtol=1e-9)
    assert torch.equal(sent[TASK_HEAD], merged[TASK_HEAD])


def test_a_client_cannot_get_more_than_the_global_rank():
    with pytest.raises(ValueError, match=f"Module '{Q}': the client's rank 4 is above the rank 3"):
        lora_state_for_client(lora_state(seeded(), 3), CONFIG, LoraConfig(r=4))


def test_a_bias_of_b_does_not_go_to_a_client_of_another_scaling():
    # the bias is in the layer times alpha / r: what is right for one scaling is wrong for the other
    state = {**lora_state(seeded(), 3), f"{Q}.lora_B.bias": torch.ones(9)}
    assert torch.equal(
        lora_state_for_client(state, CONFIG, LoraConfig(r=2, lora_alpha=4))[f"{Q}.lora_B.bias"], torch.ones(9)
    )
    with pytest.raises(ValueError, match=f"Module '{Q}': with `lora_bias`"):
        lora_state_for_client(state, CONFIG, LoraConfig(r=2, lora_alpha=5))


@pytest.mark.parametrize("method", ["flexlora", "flora", "hetlora", "median", "krum"])
def test_a_bias_of_b_needs_the_same_scaling_on_all_clients(method):
    bias = f"{Q}.lora_B.bias"
    states = [{**lora_state(seeded(i), 3), bias: torch.full((9,), float(i))} for i in range(4)]
    updates = [client(state, 1, i) for i, state in enumerate(states[1:])]
    # mean, median, or one of the clients
    assert merge(states[0], updates, method, config=CONFIG).state[bias][0] in (1.0, 2.0, 3.0)
    # a rank alone also means another alpha / r, if the client has the alpha of the global adapter
    other_rank = client({**lora_state(seeded(), 2), bias: states[1][bias]}, 1, 3)
    with pytest.raises(UpdateError, match="client 'client_3', tensor .*scaling alpha / r is 3, .* 2, .*bias of B"):
        merge(states[0], [*updates, other_rank], method, config=CONFIG)
    updates.append(client(states[1], 1, 3, config=LoraConfig(r=3, lora_alpha=5)))
    with pytest.raises(
        UpdateError, match="client 'client_3', tensor .*scaling alpha / r is 1.66667, .* 2, .*bias of B"
    ):
        merge(states[0], updates, method, config=CONFIG)
