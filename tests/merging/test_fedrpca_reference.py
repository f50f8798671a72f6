"""FedRPCA compared with principal component pursuit by plain ADMM in float64, and on the products of LoRA."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from peft_ravan.merging import merge, robust_pca

from .reference import (
    CONFIG,
    LORA_SHAPES,
    TASK_HEAD,
    assert_same,
    best_of_rank,
    client,
    effective,
    few,
    lora_state,
    mean_tensor,
    normal,
    pursue_principal_components,
    ravan_state,
    regauged,
    weight_of,
    weights_of,
)


A = "base_model.model.q.lora_A.weight"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def round_of(M: torch.Tensor):
    """A round whose updates are the columns of M `[n, C]`, around a global state that is not zero."""
    start = normal(seeded(99), len(M), 1)
    updates = [client({A: start + M[:, c, None]}, 3 * c + 1, c) for c in range(M.shape[1])]
    return {A: start}, updates, torch.tensor(weights_of(updates), dtype=torch.float64)


def planted(n: int, num_clients: int, seed: int = 0) -> torch.Tensor:
    generator = seeded(seed)
    L = normal(generator, n, 1) * (1 + 0.3 * normal(generator, 1, num_clients))
    own = torch.rand(n, num_clients, generator=generator) < 0.05
    return L + torch.where(own, 5 * normal(generator, n, num_clients).sign(), 0.0)


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("n, num_clients", [(300, 20), (12, 20)])
def test_the_merge_is_mean_l_plus_beta_times_mean_s(n, num_clients, beta):
    M = planted(n, num_clients)
    L, S = pursue_principal_components(M, max(n, num_clients) ** -0.5)
    global_state, updates, weights = round_of(M)
    merged = merge(global_state, updates, "fedrpca", beta=beta, sparse_limit=None).state[A] - global_state[A]
    expected = (L @ weights + beta * (S @ weights))[:, None]
    # beta = 1 is the mean and does not depend on the solver
    tolerance = 1e-9 if beta == 1.0 else 1e-2
    assert (merged - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("limit", [0.5, 1.0, 3.0])
def test_sparse_parts_are_amplified_up_to_a_multiple_of_the_median_one(limit):
    M = planted(300, 20)
    M[7, 0] += 200.0  # a spike that one client adds
    _, S = pursue_principal_components(M, max(M.shape) ** -0.5)
    norms = [column.norm().item() for column in S.T]
    largest = limit * sorted(norms)[9]  # the lower of the two in the middle
    within = torch.tensor([min(1.0, largest / norm) for norm in norms], dtype=torch.float64)
    global_state, updates, weights = round_of(M)
    result = merge(global_state, updates, "fedrpca", beta=3.0, sparse_limit=limit)
    expected = (M @ weights + 2 * (S @ (within * weights)))[:, None]
    assert (result.state[A] - global_state[A] - expected).norm() <= 1e-2 * expected.norm()
    figures = result.diagnostics["matrices"][A]
    assert figures["num_limited"] == sum(norm > largest for norm in norms) >= 1


@pytest.mark.parametrize("spike", [1.0, 3.0, 10.0, 100.0])
def test_one_client_gains_no_more_by_the_amplification_than_a_multiple_of_the_median(spike):
    """A change of one client's update moves the merge by its share and, amplified, by at most 3 times the median."""
    M = planted(300, 20)
    M[:, 0] = M[:, 1]
    attacked = M.clone()
    attacked[[5, 17, 33, 60], 0] += spike
    states = []
    for columns in (M, attacked):
        global_state, updates, weights = round_of(columns)
        states.append(merge(global_state, updates, "fedrpca", beta=5.0).state[A])
    _, S = pursue_principal_components(attacked, max(M.shape) ** -0.5)
    median = sorted(column.norm().item() for column in S.T)[9]
    moved, share = (states[1] - states[0]).norm(), weights[0] * 2 * spike
    assert moved <= 1.05 * (share + 4 * weights[0] * 2 * 3 * median)


@pytest.mark.parametrize("lambda_", [0.05, 0.1, 0.5])
def test_lambda_is_the_weight_of_the_sparse_part(lambda_):
    M = planted(300, 20)
    L, S = pursue_principal_components(M, lambda_)
    global_state, updates, weights = round_of(M)
    result = merge(global_state, updates, "fedrpca", beta=2.0, lambda_=lambda_)
    expected = (L @ weights + 2 * (S @ weights))[:, None]
    assert (result.state[A] - global_state[A] - expected).norm() <= 2e-2 * expected.norm()
    share = ((S @ weights).norm() / (M @ weights).norm()).item()
    assert result.diagnostics["matrices"][A]["sparse_share"] == pytest.approx(share, abs=2e-2)


@few
@given(
    seed=st.integers(0, 2**20),
    n=st.integers(4, 40),
    num_clients=st.integers(2, 6),
    lambda_=st.sampled_from([None, 0.02, 0.3]),
)
def test_on_updates_without_any_structure_the_solver_comes_near_the_optimum(seed, n, num_clients, lambda_):
    # its penalty grows, so it may stop a little early: where the optimum is flat, L and S differ by more than
    # the objective does
    M = normal(seeded(seed), n, num_clients)
    weight = lambda_ or max(n, num_clients) ** -0.5

    def objective(L: torch.Tensor, S: torch.Tensor) -> float:
        torch.testing.assert_close(L + S, M, atol=1e-5, rtol=1e-5)
        return (torch.linalg.svdvals(L).sum() + weight * S.abs().sum()).item()

    optimum = objective(*pursue_principal_components(M, weight))
    L, S, _ = robust_pca(M, lambda_)
    assert optimum * (1 - 1e-5) <= objective(L.double(), S.double()) <= 1.02 * optimum


def test_what_all_clients_have_in_common_is_not_amplified():
    # no entry stands out, so nothing is sparse
    common = torch.where(torch.rand(50, 1, generator=seeded()) < 0.5, -1.0, 1.0).double()
    global_state, updates, _ = round_of(common.expand(50, 8))
    result = merge(global_state, updates, "fedrpca", beta=5.0)
    torch.testing.assert_close(result.state[A] - global_state[A], common, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- products of LoRA


@few
@given(seed=st.integers(0, 2**20), num_clients=st.integers(1, 5))
def test_products_are_free_of_the_gauge(seed, num_clients):
    generator = seeded(seed)
    global_state = lora_state(generator)
    updates = [client(lora_state(generator), i + 1, i) for i in range(num_clients)]
    other = [regauged(update, generator) for update in updates]
    options = dict(lora="products", beta=2.0, config=CONFIG)
    one, two = (effective(merge(global_state, u, "fedrpca", **options).state) for u in (updates, other))
    assert_same(two, one, tol=1e-4)


def test_products_with_beta_one_are_flexlora():
    generator = seeded()
    global_state, updates = lora_state(generator), [client(lora_state(generator), i + 1, i) for i in range(4)]
    merged = merge(global_state, updates, "fedrpca", lora="products", beta=1.0).state
    assert_same(effective(merged), effective(merge(global_state, updates, "flexlora").state), tol=1e-9)


def test_products_are_decomposed_as_differences_of_weights():
    generator = seeded()
    global_state, updates = lora_state(generator), [client(lora_state(generator), i + 1, i) for i in range(4)]
    weights = torch.tensor(weights_of(updates), dtype=torch.float64)
    result = merge(global_state, updates, "fedrpca", lora="products", beta=2.0, sparse_limit=None)
    for module in LORA_SHAPES:
        start = weight_of(global_state, module, CONFIG) / 2  # alpha / r = 2
        M = torch.stack([(weight_of(u.state, module, CONFIG) / 2 - start).flatten() for u in updates], dim=1)
        _, S = pursue_principal_components(M, max(M.shape) ** -0.5)
        dense = (M @ weights + S @ weights).reshape(start.shape) + start
        expected = best_of_rank(dense, 3)
        actual = weight_of(result.state, module, CONFIG) / 2
        assert (actual - expected).norm() <= 0.1 * expected.norm()
        assert 0 < result.diagnostics["matrices"][module]["kept_energy"] <= 1 + 1e-9
    torch.testing.assert_close(result.state[TASK_HEAD], mean_tensor(updates, TASK_HEAD))


def test_for_ravan_both_ways_are_the_same():
    generator = seeded()
    global_state, updates = ravan_state(generator), [client(ravan_state(generator), 1, i) for i in range(4)]
    one, two = (merge(global_state, updates, "fedrpca", lora=lora).state for lora in ("factors", "products"))
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())


def test_there_are_two_ways_to_take_lora():
    with pytest.raises(ValueError, match="`lora` must be 'factors' or 'products', got 'both'"):
        merge(lora_state(seeded()), [client(lora_state(seeded()))], "fedrpca", lora="both")
