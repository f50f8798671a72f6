"""TIES and task arithmetic: explicit numbers, their definitions, and PEFT's own TIES."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from peft.utils import merge_utils

from peft_ravan.merging import ClientUpdate, merge

from .reference import (
    CORES,
    TASK_HEAD,
    assert_same,
    client,
    few,
    lora_state,
    mean_tensor,
    normal,
    ravan_state,
    ties_delta,
    trained_some,
    weights_of,
)


A = "model.q.lora_A.weight"
CORE = next(iter(CORES))
MAKERS = {"ravan": ravan_state, "lora": lora_state}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(*rows: list[float], num_examples: tuple[int, ...] = ()) -> list[ClientUpdate]:
    return [
        ClientUpdate({A: torch.tensor([row])}, n, f"c{i}")
        for i, (row, n) in enumerate(zip(rows, num_examples or [1] * len(rows), strict=True))
    ]


def merged_row(start: list[float], updates: list[ClientUpdate], method: str, **options) -> list[float]:
    return merge({A: torch.tensor([start])}, updates, method, **options).state[A][0].tolist()


# ---------------------------------------------------------------- explicit numbers


def test_ties_trims_elects_and_averages_what_agrees():
    updates = rows([4.0, -1.0, 2.0, 0.5], [8.0, 5.0, -1.0, 0.5], [-6.0, 3.0, 1.0, 0.5])
    # each keeps two entries: [4, 0, 2, 0], [8, 5, 0, 0], [-6, 3, 0, 0]; elected + + + 0; the mean of those that agree
    assert merged_row([0.0] * 4, updates, "ties", density=0.5) == [6.0, 4.0, 2.0, 0.0]
    assert merged_row([0.0] * 4, updates, "ties", density=0.5, scale=2.0) == [12.0, 8.0, 4.0, 0.0]
    # density 1 keeps all: the second entry is elected + by 7
    assert merged_row([0.0] * 4, updates, "ties", density=1.0) == [6.0, 4.0, 1.5, 0.5]


def test_ties_takes_differences_from_the_global_state():
    updates = rows([11.0, 10.0], [13.0, 9.0])
    assert merged_row([10.0, 10.0], updates, "ties", density=0.5) == [12.0, 10.0]


def test_ties_elects_and_averages_by_examples():
    # 3 * 1 against 1 * -2: plus is elected although minus is larger
    assert merged_row([0.0], rows([1.0], [-2.0], num_examples=(3, 1)), "ties", density=1.0) == [1.0]
    assert merged_row([0.0], rows([1.0], [5.0], num_examples=(3, 1)), "ties", density=1.0) == [2.0]


def test_ties_keeps_at_least_one_entry():
    assert merged_row([0.0, 0.0], rows([1.0, 3.0]), "ties", density=1e-6) == [0.0, 3.0]


def test_signs_that_cancel_elect_plus():
    assert merged_row([7.0], rows([9.0], [5.0]), "ties", density=1.0) == [9.0]
    # 3 * 1 against 1 * -3, and thirds, which no float holds
    assert merged_row([0.0], rows([1.0], [-3.0], num_examples=(3, 1)), "ties", density=1.0) == [1.0]
    assert merged_row([0.0], rows([1.0], [1.0], [-2.0]), "ties", density=1.0) == [1.0]
    # nobody has moved
    assert merged_row([7.0], rows([7.0], [7.0]), "ties", density=1.0) == [7.0]


def test_task_arithmetic_multiplies_the_mean_update():
    updates = rows([2.0, 1.0], [6.0, 1.0], num_examples=(3, 1))  # mean [3, 1]
    assert merged_row([1.0, 1.0], updates, "task_arithmetic", scale=0.5) == [2.0, 1.0]
    assert merged_row([1.0, 1.0], updates, "task_arithmetic", scale=-1.0) == [-1.0, 1.0]
    assert merged_row([1.0, 1.0], updates, "task_arithmetic", scale=0.0) == [1.0, 1.0]


# ---------------------------------------------------------------- against the definitions


ROUNDS = dict(
    seed=st.integers(0, 2**20),
    num_examples=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    adapter=st.sampled_from(sorted(MAKERS)),
)


def random_round(seed, num_examples, adapter):
    generator = seeded(seed)
    make = MAKERS[adapter]
    return make(generator), [client(make(generator), n, i) for i, n in enumerate(num_examples)]


@few
@given(**ROUNDS, density=st.sampled_from([0.05, 0.2, 0.5, 1.0]), scale=st.sampled_from([1.0, 0.3]))
def test_ties_is_algorithm_1_matrix_by_matrix(seed, num_examples, adapter, density, scale):
    global_state, updates = random_round(seed, num_examples, adapter)
    weights = weights_of(updates)
    expected = {TASK_HEAD: mean_tensor(updates, TASK_HEAD)}
    for name, start in global_state.items():
        deltas = [update.state[name] - start for update in updates]
        if name in CORES:
            heads = [ties_delta([delta[i] for delta in deltas], weights, density) for i in range(len(start))]
            expected[name] = start + scale * torch.stack(heads)
        elif name != TASK_HEAD:
            expected[name] = start + scale * ties_delta(deltas, weights, density)
    assert_same(merge(global_state, updates, "ties", density=density, scale=scale).state, expected)


@few
@given(**ROUNDS, scale=st.floats(-3, 3))
def test_task_arithmetic_is_start_plus_scaled_mean(seed, num_examples, adapter, scale):
    global_state, updates = random_round(seed, num_examples, adapter)
    expected = {
        name: start + (1 if name == TASK_HEAD else scale) * (mean_tensor(updates, name) - start)
        for name, start in global_state.items()
    }
    assert_same(merge(global_state, updates, "task_arithmetic", scale=scale).state, expected)


@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
def test_ties_is_that_of_peft(density):
    generator = seeded()
    deltas = [normal(generator, 4, 10) for _ in range(5)]
    expected = merge_utils.ties(deltas, weights=torch.ones(5), density=density, majority_sign_method="total")
    merged = merge({A: torch.zeros_like(deltas[0])}, [client({A: d}, 7, i) for i, d in enumerate(deltas)], "ties", density=density)  # fmt: skip
    torch.testing.assert_close(merged.state[A], expected)


@few
@given(st.integers(0, 2**20), st.integers(2, 7))
def test_ties_is_that_of_peft_also_where_votes_are_equal(seed, num_clients):
    # small whole numbers, so that sums are often 0
    deltas = list(torch.randint(-3, 4, (num_clients, 8, 8), generator=seeded(seed)).float())
    expected = merge_utils.ties(deltas, weights=torch.ones(num_clients), density=1.0)
    updates = [client({A: delta}, 7, i) for i, delta in enumerate(deltas)]
    merged = merge({A: torch.zeros(8, 8)}, updates, "ties", density=1.0)
    torch.testing.assert_close(merged.state[A], expected)


def test_a_factor_of_one_is_fedavg_bit_for_bit():
    global_state, updates = random_round(1, [3, 1, 8], "lora")
    scaled, plain = (merge(global_state, updates, method).state for method in ("task_arithmetic", "fedavg"))
    assert all(torch.equal(scaled[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("method, options", [("ties", {"density": 1.0}), ("task_arithmetic", {"scale": 0.5})])
def test_a_head_is_merged_over_the_clients_that_trained_it(method, options):
    global_state, updates = random_round(2, [1, 2, 3], "ravan")
    masks = [[True, False, False], [True, True, False], [True, False, False]]
    some = [trained_some(update, {CORE: mask}) for update, mask in zip(updates, masks, strict=True)]
    all_heads = merge(global_state, updates, method, **options).state[CORE]
    only_second = merge(global_state, [updates[1]], method, **options).state[CORE]
    merged = merge(global_state, some, method, **options).state[CORE]
    torch.testing.assert_close(merged, torch.stack([all_heads[0], only_second[1], global_state[CORE][2]]))


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("ties", {"density": 0.0}, "`density` must be above 0 and at most 1, got 0.0"),
        ("ties", {"density": 1.1}, "`density` must be above 0 and at most 1, got 1.1"),
        ("ties", {"density": float("nan")}, "`density` must be above 0 and at most 1, got nan"),
        ("ties", {"scale": float("inf")}, "`scale` must be a finite number, got inf"),
        ("task_arithmetic", {"scale": float("nan")}, "`scale` must be a finite number, got nan"),
    ],
)
def test_options_out_of_range(method, options, message):
    with pytest.raises(ValueError, match=message):
        merged_row([0.0], rows([1.0]), method, **options)
