"""LoRA-FAIR, FedRot-LoRA and FLoRA-NA: A and B of the global rank with a product nearer to the mean product."""

import itertools

import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_ravan.merging import merge
from peft_ravan.merging.methods.fedrot_lora import rotated_onto

from .reference import (
    LoraRound,
    a_name,
    assert_same,
    b_name,
    client,
    few,
    lora_rounds,
    modules_of,
    normal,
    weights_of,
)


A, B = "m.lora_A.weight", "m.lora_B.weight"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def product(state, module="m"):
    return state[b_name(module)].double() @ state[a_name(module)].double()


def mean_product(updates, module="m"):
    return sum(w * product(u.state, module) for w, u in zip(weights_of(updates), updates, strict=True))


def mean_of(updates, name):
    return sum(w * u.state[name] for w, u in zip(weights_of(updates), updates, strict=True))


def error(state, updates, module="m"):
    return (product(state, module) - mean_product(updates, module)).norm().item()


def orthogonal(generator, size):
    return torch.linalg.qr(normal(generator, size, size)).Q


def factors(generator, d_out=6, d_in=9, rank=3):
    return {A: normal(generator, rank, d_in), B: normal(generator, d_out, rank)}


@pytest.mark.parametrize("method, option", [("lora_fair", "lambda_"), ("flora_na", "num_steps")])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), -0.5])
def test_options_out_of_range_are_refused(method, option, value):
    state = factors(seeded())
    with pytest.raises(ValueError, match=f"{method}: `{option}` must be .* 0 or more, got {value!r}"):
        merge(state, [client(state)], method, **{option: value})


# ---------------------------------------------------------------- LoRA-FAIR


def test_lora_fair_in_numbers():
    """The mean of the products is [[1.5, 0], [0, 1]]; that of A is [0.75, 0.25], that of B [1.5, 1]."""
    start = {A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[0.0], [0.0]])}
    updates = [
        client({A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[2.0], [0.0]])}, 3, 0),
        client({A: torch.tensor([[0.0, 1.0]]), B: torch.tensor([[0.0], [4.0]])}, 1, 1),
    ]
    state = merge(start, updates, "lora_fair", lambda_=0.0).state
    torch.testing.assert_close(state[A], torch.tensor([[0.75, 0.25]]))
    # B is then the projection of the product on A, [1.5 * 0.75, 0.25] / 0.625
    torch.testing.assert_close(state[B], torch.tensor([[1.8], [0.4]]))
    # with a weight of 0.625 half of the way from the mean
    state = merge(start, updates, "lora_fair", lambda_=0.625).state
    torch.testing.assert_close(state[B], torch.tensor([[1.65], [0.7]]))


@few
@given(round_=lora_rounds(min_clients=2), lambda_=st.sampled_from([1e-3, 0.01, 1.0]))
def test_lora_fair_minimises_the_dense_ridge_objective(round_: LoraRound, lambda_):
    state = merge(round_.global_state, round_.updates, "lora_fair", config=round_.config, lambda_=lambda_).state
    for module in modules_of(state):
        mean_A, mean_B = (mean_of(round_.updates, name(module)) for name in (a_name, b_name))
        torch.testing.assert_close(state[a_name(module)], mean_A)
        # the gradient of the objective with respect to the correction, by autograd
        correction = (state[b_name(module)] - mean_B).requires_grad_()
        distance = (mean_product(round_.updates, module) - (mean_B + correction) @ mean_A).square().sum()
        (distance + lambda_ * correction.square().sum()).backward()
        assert correction.grad.norm() <= 1e-8 * (1 + mean_product(round_.updates, module).norm())


@few
@given(round_=lora_rounds(min_clients=2))
def test_lora_fair_without_a_weight_is_the_nearest_product_with_the_mean_of_a(round_: LoraRound):
    result = merge(round_.global_state, round_.updates, "lora_fair", config=round_.config, lambda_=0.0)
    for module in modules_of(round_.global_state):
        mean_A = mean_of(round_.updates, a_name(module))
        dense = mean_product(round_.updates, module)
        expected = dense @ torch.linalg.pinv(mean_A) @ mean_A
        torch.testing.assert_close(product(result.state, module), expected, atol=1e-8, rtol=1e-8)
        means = mean_of(round_.updates, b_name(module)) @ mean_A
        before, after = (dense - means).norm(), (dense - expected).norm()
        assert result.diagnostics["remaining_error"][module] == pytest.approx((after / before).item(), abs=1e-6)


def test_lora_fair_with_a_large_weight_is_fedit():
    updates = [client(factors(seeded(seed)), seed, seed) for seed in (1, 2, 3)]
    start = factors(seeded())
    state = merge(start, updates, "lora_fair", lambda_=1e12).state
    assert_same(state, merge(start, updates, "fedit").state)


def test_lora_fair_on_an_embedding_corrects_a():
    names = A.replace("lora_A.weight", "lora_embedding_A"), B.replace("lora_B.weight", "lora_embedding_B")
    updates = [client(dict(zip(names, factors(seeded(s)).values(), strict=True)), s, s) for s in (1, 2)]
    state = merge(updates[0].state, updates, "lora_fair", lambda_=0.0).state
    mean_B = mean_of(updates, names[1])
    torch.testing.assert_close(state[names[1]], mean_B)
    dense = sum(w * u.state[names[1]] @ u.state[names[0]] for w, u in zip(weights_of(updates), updates, strict=True))
    torch.testing.assert_close(state[names[0]], torch.linalg.pinv(mean_B) @ dense)


# ---------------------------------------------------------------- FedRot-LoRA


def test_fedrot_lora_turns_signs_that_would_cancel():
    start = {A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[0.0], [0.0]])}
    updates = [
        client({A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[2.0], [0.0]])}, 1, 0),
        client({A: torch.tensor([[-1.0, 0.0]]), B: torch.tensor([[-6.0], [0.0]])}, 3, 1),
    ]
    state = merge(start, updates, "fedrot_lora").state
    assert state[A].tolist() == [[1.0, 0.0]] and state[B].tolist() == [[5.0], [0.0]]


@few
@given(seed=st.integers(0, 2**20), rank=st.integers(1, 6), scale=st.sampled_from([0.0, 1e-3, 1.0]))
def test_a_rotation_keeps_the_product_and_is_the_nearest(seed, rank, scale):
    generator = seeded(seed)
    start, own = factors(generator, rank=rank), factors(generator, rank=rank)
    start[B] = scale * start[B]
    new_B, new_A = rotated_onto(start[B], start[A], own[B], own[A])
    torch.testing.assert_close(new_B @ new_A, product(own))
    torch.testing.assert_close(new_A.T @ new_A, own[A].T @ own[A])  # no more than a rotation

    # A and B side by side, and another implementation
    both, own_both = (torch.cat([state[A].T, state[B]]).numpy() for state in (start, own))
    rotation = torch.from_numpy(scipy.linalg.orthogonal_procrustes(own_both, both)[0].T)
    torch.testing.assert_close(new_A, rotation @ own[A])
    torch.testing.assert_close(new_B, own[B] @ rotation.T)


@few
@given(seed=st.integers(0, 2**20), num_clients=st.integers(1, 5))
def test_planted_rotations_are_undone(seed, num_clients):
    """Clients that differ only by rotations are merged into the global adapter; FedIT loses most of it."""
    generator = seeded(seed)
    start = factors(generator)
    rotations = [orthogonal(generator, 3) for _ in range(num_clients)]
    updates = [
        client({A: rotation @ start[A], B: start[B] @ rotation.T}, index + 1, index)
        for index, rotation in enumerate(rotations)
    ]
    state = merge(start, updates, "fedrot_lora").state
    assert_same(state, start)
    assert error(state, updates) <= 1e-9 <= error(merge(start, updates, "fedit").state, updates) + 1e-8


def test_rotated_clients_that_have_learned_are_nearer_to_the_mean_of_their_products_than_with_fedit():
    for seed in range(20):
        generator = seeded(seed)
        start, updates = factors(generator), []
        for index in range(4):
            rotation = orthogonal(generator, 3)
            moved = {name: tensor + 0.2 * normal(generator, *tensor.shape) for name, tensor in start.items()}
            updates.append(client({A: rotation @ moved[A], B: moved[B] @ rotation.T}, index + 1, index))
        rotated, means = (merge(start, updates, name).state for name in ("fedrot_lora", "fedit"))
        assert error(rotated, updates) < 0.2 * error(means, updates)


# ---------------------------------------------------------------- FLoRA-NA


def steps(start, updates, num_steps):
    result = merge(start, updates, "flora_na", num_steps=num_steps)
    return result.state, result.diagnostics["relative_error"]["m"]


@few
@given(round_=lora_rounds(min_clients=2))
def test_flora_na_is_never_farther_than_the_means_and_says_how_far(round_: LoraRound):
    result = merge(round_.global_state, round_.updates, "flora_na", config=round_.config)
    means = merge(round_.global_state, round_.updates, "fedit").state
    for module in modules_of(means):
        norm = mean_product(round_.updates, module).norm().item()
        assert error(result.state, round_.updates, module) <= error(means, round_.updates, module) + 1e-7 * norm
        figures = result.diagnostics["relative_error"], result.diagnostics["relative_error_of_means"]
        for figure, state in zip(figures, (result.state, means), strict=True):
            assert figure[module] * norm == pytest.approx(error(state, round_.updates, module), abs=1e-6 * norm)


def test_every_step_of_flora_na_comes_nearer_and_none_is_fedit():
    for seed in range(10):
        start, updates = factors(seeded()), [client(factors(seeded(10 * seed + i)), i, i) for i in (1, 2, 3, 4)]
        assert_same(steps(start, updates, 0)[0], merge(start, updates, "fedit").state)
        errors = [error(steps(start, updates, count)[0], updates) for count in range(6)]
        assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors))
        assert errors[1] < 0.999 * errors[0]


@pytest.mark.parametrize("num_steps", [1, 2, 10])
@few
@given(seed=st.integers(0, 2**20))
def test_flora_na_has_the_dense_least_squares_weights(num_steps, seed):
    """The last half of a step in explicit form: the products B A_c as columns, fitted to the mean of the products."""
    updates = [client(factors(seeded(seed + i)), i, i) for i in (1, 2, 3)]
    state, _ = steps(factors(seeded(seed)), updates, num_steps)
    columns = torch.stack([(state[B] @ update.state[A]).flatten() for update in updates], dim=1)
    p = torch.linalg.lstsq(columns, mean_product(updates).flatten()[:, None]).solution[:, 0]
    expected = sum(weight * update.state[A] for weight, update in zip(p, updates, strict=True))
    torch.testing.assert_close(state[A], expected, atol=1e-8, rtol=1e-8)
    # B is a combination, too
    stacked = torch.stack([update.state[B].flatten() for update in updates], dim=1)
    q = torch.linalg.lstsq(stacked, state[B].flatten()[:, None]).solution
    torch.testing.assert_close(stacked @ q, state[B].flatten()[:, None])


@pytest.mark.parametrize("own, other", [(A, B), (B, A)])
def test_flora_na_is_exact_where_combinations_can_be(own, other):
    """Clients share one factor up to scale, so that the means are wrong and a combination is exact."""
    common, updates = factors(seeded())[other], []
    for index, scale in enumerate((1.0, -0.5, 3.0)):
        state = {own: factors(seeded(index + 1))[own], other: scale * common}
        updates.append(client(state, index + 1, index))
    start = factors(seeded())
    norm = mean_product(updates).norm().item()
    assert error(merge(start, updates, "fedit").state, updates) > 0.1 * norm
    assert error(steps(start, updates, 10)[0], updates) < 1e-7 * norm


def test_flora_na_leaves_identical_clients_as_they_are():
    """All combinations with the sum 1 are then equal; the shares of the examples are kept."""
    start, same = factors(seeded()), factors(seeded(1))
    state, relative_error = steps(start, [client(same, i + 1, i) for i in range(3)], 10)
    assert_same(state, same)
    assert relative_error < 1e-7


@pytest.mark.parametrize("method", ["lora_fair", "flora_na"])
def test_products_that_cancel_leave_a_product_of_zero_that_can_be_trained(method):
    state = factors(seeded())
    updates = [client(state, 1, 0), client({A: state[A], B: -state[B]}, 1, 1)]
    merged = merge(state, updates, method).state
    assert product(merged).norm() < 1e-9
    assert merged[A].norm() > 0.1
