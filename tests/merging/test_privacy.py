"""Differential privacy: a bound on one client's influence on the mean, and noise with the stated variance."""

import json
import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from scipy.stats import chi2, kstest

from peft_ravan.merging import (
    MERGE_METHODS,
    ClientUpdate,
    GaussianMechanism,
    ServerStep,
    clip_change,
    get_merge_method,
    merge,
)
from peft_ravan.merging.privacy import gaussian_noise

from ..properties import examples
from .reference import CASES, CONFIG, CORES, assert_same, client, random_round, ravan_state, trained_some


PRIVATE_CASES = [case for case in CASES if get_merge_method(case[0]).plain_mean]
OTHER_METHODS = [name for name, method in MERGE_METHODS.items() if not method.plain_mean]
every_private_case = pytest.mark.parametrize(
    "method, adapter", PRIVATE_CASES, ids=["-".join(c) for c in PRIVATE_CASES]
)


def mechanism(num_clients=5, clip_norm=1.0, noise_multiplier=0.0, seed=0) -> GaussianMechanism:
    return GaussianMechanism(clip_norm, noise_multiplier, num_clients, seed)


def merge_clipped(method, global_state, updates, **kwargs):
    return merge(global_state, updates, method, config=CONFIG, on_bad_update="drop", mechanism=mechanism(**kwargs))


def distance(first, second) -> float:
    return math.sqrt(sum((first[name].double() - second[name].double()).square().sum().item() for name in first))


# ---------------------------------------------------------------- without clipping and noise


@every_private_case
def test_without_noise_and_clipping_it_is_the_mean_with_uniform_weights(method, adapter):
    global_state, updates = random_round(method, adapter)
    assert len({update.num_examples for update in updates}) == len(updates)
    private = merge_clipped(method, global_state, updates, clip_norm=math.inf)
    uniform = [replace(update, num_examples=1) for update in updates]
    assert_same(private.state, merge(global_state, uniform, method, config=CONFIG).state, 1e-12)


def test_what_is_private_is_plain_mean():
    methods = {method for method, _ in PRIVATE_CASES}
    assert methods == {"fedavg", "ravan", "fedit", "ffa_lora", "rolora", "fedsa_lora", "fed_sb"}


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_methods_for_which_it_proves_nothing_are_refused_before_a_client_is_asked(method):
    def updates():
        raise AssertionError("a client was asked")
        yield

    with pytest.raises(
        ValueError, match=f"plain mean.* For '{method}' it would prove nothing. Choose one of: 'fedavg'"
    ):
        merge({"w": torch.zeros(2)}, updates(), method, mechanism=mechanism())


# ---------------------------------------------------------------- the bound


FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


def pair(entries, num_examples=1, index=0) -> ClientUpdate:
    return client({"a": torch.tensor(entries[:2]), "b": torch.tensor(entries[2:]).reshape(1, 2)}, num_examples, index)


@examples(200)
@given(
    st.lists(FLOATS, min_size=4, max_size=4),
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4),
    st.integers(-3, 10**9),
    st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_whatever_a_client_uploads_moves_the_mean_by_no_more_than_the_bound(entries, start, num_examples, clip_norm):
    """By clip_norm / C compared with the client's absence, and so by twice that compared with another upload."""
    global_state = dict(pair(start).state)
    others = [pair([1.0, -2.0, 3.0, index], 10, index) for index in range(1, 4)]
    options = {"num_clients": 4, "clip_norm": clip_norm}
    # changes rather than states, which would round them
    zeros = {name: torch.zeros_like(tensor) for name, tensor in global_state.items()}
    change, norm = clip_change(pair(entries), global_state, clip_norm)
    if all(map(math.isfinite, entries)):
        assert distance(change, zeros) <= clip_norm * (1 + 1e-6)
        assert norm <= clip_norm or distance(change, zeros) == pytest.approx(clip_norm, rel=1e-5)
    without, with_it = (
        merge_clipped("fedavg", zeros, updates, **options).state
        for updates in (others, [pair(entries, num_examples), *others])
    )
    assert distance(without, with_it) <= clip_norm / 4 * (1 + 1e-5)


def test_one_norm_is_taken_over_all_tensors():
    global_state = {"a": torch.tensor([1.0]), "b": torch.tensor([[10.0]])}
    update = ClientUpdate({"a": torch.tensor([4.0]), "b": torch.tensor([[14.0]])}, 7)
    change, norm = clip_change(update, global_state, 1.0)
    assert norm == 5.0
    assert change["a"].tolist() == pytest.approx([0.6]) and change["b"].tolist() == [[pytest.approx(0.8)]]
    assert clip_change(update, global_state, 5.0)[0]["b"].tolist() == [[4.0]]


def test_a_large_global_state_does_not_round_the_change():
    """In float32 1e6 + 1e-3 is 1e6: the bound must hold for the change, not for its sum with a weight."""
    global_state = {"a": torch.full((4,), 1e6)}
    updates = [ClientUpdate({"a": torch.full((4,), -1e6)}, 1, "x"), ClientUpdate({"a": torch.full((4,), 2e6)}, 1, "y")]
    changes = [clip_change(update, global_state, 1e-3)[0]["a"] for update in updates]
    assert [change.norm().item() for change in changes] == pytest.approx([1e-3, 1e-3], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_largest_numbers_of_a_dtype_are_clipped(dtype):
    largest = torch.finfo(dtype).max
    global_state = {"a": torch.full((3,), -largest, dtype=dtype), "b": torch.zeros(2, dtype=dtype)}
    update = ClientUpdate({"a": torch.full((3,), largest, dtype=dtype), "b": torch.ones(2, dtype=dtype)}, 1)
    change, _ = clip_change(update, global_state, 1.0)
    norm = math.sqrt(sum(tensor.double().square().sum().item() for tensor in change.values()))
    assert norm <= 1 + 1e-6 and all(torch.isfinite(tensor).all() for tensor in change.values())


def test_a_client_that_fails_counts_as_one_that_has_changed_nothing():
    global_state = {"a": torch.tensor([1.0])}
    updates = [client({"a": torch.tensor([5.0])}, index=1), client({"a": torch.tensor([torch.nan])}, index=2)]
    result = merge_clipped("fedavg", global_state, updates, num_clients=4, clip_norm=10.0)
    # (4 + 0 + 0 + 0) / 4: one is dropped, and two have sent nothing
    assert result.state["a"].item() == 2.0
    assert [dropped["client"] for dropped in result.diagnostics["dropped"]] == ["client_2"]
    assert result.diagnostics["num_clients"] == 1


def test_a_head_that_a_client_has_not_trained_is_not_changed_by_it():
    core = next(iter(CORES))
    global_state, updates = random_round("ravan", "ravan", num_clients=2)
    mask = [True, False, False]
    part = trained_some(updates[0], {core: mask})
    result = merge_clipped("ravan", global_state, [part, updates[1]], num_clients=2, clip_norm=math.inf)
    for head, trained in enumerate(mask):
        first = updates[0].state[core][head] if trained else global_state[core][head]
        torch.testing.assert_close(result.state[core][head], (first + updates[1].state[core][head]) / 2)


def test_more_updates_than_clients_are_refused():
    global_state = {"a": torch.zeros(1)}
    updates = [client({"a": torch.ones(1)}, index=index) for index in range(3)]
    with pytest.raises(ValueError, match="more updates than the 2 clients"):
        merge_clipped("fedavg", global_state, updates, num_clients=2)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"clip_norm": 0.0}, "`clip_norm` must be above 0, got 0.0"),
        ({"clip_norm": math.nan}, "`clip_norm` must be above 0, got nan"),
        ({"noise_multiplier": -1.0}, "`noise_multiplier` must be a finite number, 0 or more, got -1.0"),
        ({"clip_norm": math.inf, "noise_multiplier": 1.0}, "`clip_norm` is infinite, so no noise hides"),
        ({"num_clients": 0}, "`num_clients` must be 1 or more, got 0"),
    ],
)
def test_numbers_out_of_range_are_reported(fields, message):
    with pytest.raises(ValueError, match=message):
        mechanism(**fields)


# ---------------------------------------------------------------- the noise


def noise_of_merges(repeats: int, **kwargs) -> np.ndarray:
    """The differences of merges with noise, each with its own seed, from the merge without noise, `[repeats, n]`."""
    global_state = ravan_state(torch.Generator().manual_seed(0), dtype=torch.float32)
    states = [ravan_state(torch.Generator().manual_seed(index), dtype=torch.float32) for index in range(1, 4)]
    updates = [client(state, index + 1, index) for index, state in enumerate(states)]
    exact = merge_clipped("ravan", global_state, updates, num_clients=3, clip_norm=2.0).state
    rows = []
    for seed in range(repeats):
        state = merge_clipped("ravan", global_state, updates, num_clients=3, clip_norm=2.0, seed=seed, **kwargs).state
        rows.append(torch.cat([(state[name].double() - exact[name].double()).flatten() for name in state]).numpy())
    return np.stack(rows)


def test_the_noise_has_the_variance_that_is_said():
    noise = noise_of_merges(200, noise_multiplier=1.5)
    std = 1.5 * 2.0 / 3
    # a sum of squares has a chi-squared distribution: that of all entries, and that of each in all merges
    squares = (noise / std) ** 2
    for sums, degrees in ((squares.sum(), noise.size), (squares.sum(axis=0), len(noise))):
        low, high = chi2.ppf([1e-7, 1 - 1e-7], degrees)
        assert np.all((low < sums) & (sums < high))
    assert kstest(noise.flatten() / std, "norm").pvalue > 1e-4


def test_the_noise_of_entries_tensors_and_rounds_is_independent():
    noise = noise_of_merges(200, noise_multiplier=1.5)
    correlations = np.corrcoef(noise.T)
    off_diagonal = correlations[~np.eye(len(correlations), dtype=bool)]
    assert np.abs(off_diagonal).max() < 6 / math.sqrt(len(noise))
    assert np.abs(noise.mean(axis=0)).max() < 6 / math.sqrt(len(noise))


def test_noise_is_repeated_by_its_seed_and_by_nothing_else():
    shapes = {"b": torch.Size([2, 3]), "a": torch.Size([])}

    def noise(seed, shapes=shapes):
        return {name: tensor.tolist() for name, tensor in gaussian_noise(shapes, 1.0, seed)}

    torch.manual_seed(0)
    assert noise([1, 2]) == noise([1, 2], dict(reversed(shapes.items())))
    assert noise([1, 2]) != noise([1, 3]) and noise(None) != noise(None)
    # seeds that agree in 32 bits are different ones
    assert noise(5) != noise(5 + 2**32)


@every_private_case
def test_what_is_frozen_or_personal_gets_no_noise(method, adapter):
    global_state, updates = random_round(method, adapter)
    left_out = get_merge_method(method).frozen_in(1) + get_merge_method(method).personal_parts
    state = merge_clipped(method, global_state, updates, noise_multiplier=1.0).state
    for name, tensor in global_state.items():
        assert torch.equal(state[name], tensor) == any(part in name for part in left_out), name


@pytest.mark.parametrize("round_number, frozen", [(1, ".lora_A."), (2, ".lora_B.")])
def test_noise_follows_what_is_trained_in_the_round(round_number, frozen):
    global_state = random_round("rolora", "lora")[0]
    state = merge(
        global_state, [], "rolora", mechanism=mechanism(noise_multiplier=1.0),
        server_step=ServerStep(round_number=round_number),
    ).state  # fmt: skip
    assert [name for name, tensor in global_state.items() if torch.equal(state[name], tensor)] == [
        name for name in global_state if frozen in name
    ]


def test_noise_is_added_also_if_nobody_succeeds():
    state = merge_clipped("fedavg", {"a": torch.zeros(3)}, [], noise_multiplier=1.0).state
    assert torch.isfinite(state["a"]).all() and state["a"].abs().min() > 0


def test_a_server_optimizer_sees_only_the_noisy_mean():
    global_state, updates = random_round("ravan", "ravan")
    noisy = merge(global_state, updates, "ravan", mechanism=mechanism(noise_multiplier=1.0))
    half = merge(
        global_state, updates, "ravan", mechanism=mechanism(noise_multiplier=1.0),
        server_step=ServerStep("fedavgm", {"learning_rate": 0.5, "momentum": 0.0}),
    )  # fmt: skip
    expected = {name: (noisy.state[name] + tensor) / 2 for name, tensor in global_state.items()}
    assert_same(half.state, expected)


def test_the_noise_is_not_lost_where_the_adapter_is_rounded():
    """A mean that is rounded before the noise is added could move by a whole step of bfloat16."""
    global_state = {"a": torch.full((64,), 256.0, dtype=torch.bfloat16)}  # in steps of 2
    update = ClientUpdate({"a": torch.full((64,), 258.0, dtype=torch.bfloat16)}, 1)
    options = {"num_clients": 1, "clip_norm": 4.0, "noise_multiplier": 0.1}
    states = torch.stack(
        [merge_clipped("fedavg", global_state, [update], seed=s, **options).state["a"] for s in range(40)]
    )
    # the mean is 256.5, and comes out as 256 or 258, which is nearer from 1.25 standard deviations on
    assert states.double().mean().item() - 256 == pytest.approx(2 * (1 - 0.8944), abs=0.05)


def test_the_diagnostics_are_plain():
    global_state, updates = random_round("ravan", "ravan")
    result = merge(global_state, updates, "ravan", mechanism=mechanism(noise_multiplier=2.0, clip_norm=3.0))
    figures = json.loads(json.dumps(result.diagnostics))["privacy"]
    assert figures == {
        "clip_norm": 3.0, "noise_multiplier": 2.0, "noise_std": 1.2, "num_clients": 5, "clipped": 5,
    }  # fmt: skip
    assert "1234" not in repr(mechanism(seed=1234))
