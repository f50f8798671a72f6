"""Budgets of clients and the selection of heads, as pure functions."""

from decimal import ROUND_HALF_UP, Decimal

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from peft_ravan.trainers.client.head_selection import head_scores, select_heads
from peft_ravan.trainers.exchange import HEAD_ALLOCATIONS
from peft_ravan.trainers.server.budgets import BUDGET_DISTRIBUTIONS, draw_client_budgets, parse_client_budgets

from ..properties import examples


CLIENTS = [f"client_{index}" for index in range(400)]

SCORES = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4),
    # few values, so that many are equal
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=6).map(torch.tensor),
    min_size=1,
    max_size=6,
)
SHARES = st.integers(1, 1000).map(lambda thousandths: thousandths / 1000)
SEEDS = st.integers(0, 2**32 - 1)


def count(masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def as_lists(masks) -> dict[str, list[bool]]:
    return {name: mask.tolist() for name, mask in masks.items()}


# ---- Budgets -------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", BUDGET_DISTRIBUTIONS)
def test_budgets_are_shares_that_depend_on_the_seed_and_the_client_only(distribution):
    budgets = draw_client_budgets(CLIENTS, distribution, seed=3)
    assert all(0 < share <= 1 for share in budgets.values())
    assert budgets == {**draw_client_budgets(reversed(CLIENTS), distribution, seed=3)}
    assert draw_client_budgets(CLIENTS[5:6], distribution, seed=3) == {CLIENTS[5]: budgets[CLIENTS[5]]}
    assert budgets != draw_client_budgets(CLIENTS, distribution, seed=4)


def test_the_distributions_have_their_shapes():
    shares = {
        name: torch.tensor(list(draw_client_budgets(CLIENTS, name, seed=0).values())) for name in BUDGET_DISTRIBUTIONS
    }
    for name, mean in (("uniform", 1 / 2), ("bell", 1 / 2), ("right_skewed", 2 / 7)):
        assert shares[name].mean() == pytest.approx(mean, abs=0.05)
    near_half = {name: ((values - 0.5).abs() < 0.2).float().mean() for name, values in shares.items()}
    assert near_half["bell"] > 0.75 > 0.5 > near_half["uniform"] > 0.3
    skewness = {name: ((values - values.mean()) ** 3).mean() / values.std() ** 3 for name, values in shares.items()}
    assert skewness["right_skewed"] > 0.35 > max(abs(skewness["uniform"]), abs(skewness["bell"]))


def test_an_unknown_distribution_is_reported():
    with pytest.raises(ValueError, match="one of uniform, bell, right_skewed, got 'normal'"):
        draw_client_budgets(CLIENTS, "normal", seed=0)


@pytest.mark.parametrize(
    "given, expected",
    [
        (None, None), (0.5, 0.5), (1, 1.0), ("0.25", 0.25), ("bell", "bell"),
        ({"a": 0.5}, {"a": 0.5}), ('{"a": 0.5, "b": 1}', {"a": 0.5, "b": 1.0}), ({3: 0.5}, {"3": 0.5}), ({}, {}),
    ],
)  # fmt: skip
def test_budgets_are_read(given, expected):
    assert parse_client_budgets(given) == expected


@pytest.mark.parametrize(
    "given, found",
    [
        (0, "share is 0."), (1.5, "share is 1.5."), (True, "share is True"), (float("nan"), "share is nan"),
        ("normal", "share is 'normal'"), ({"a": 0.5, "b": "0.5"}, "share of client 'b' is '0.5'"), ("[0.5]", "0.5"),
    ],
)  # fmt: skip
def test_budgets_out_of_range_are_reported(given, found):
    with pytest.raises(
        ValueError, match="above 0 and up to 1, a dict of client names to shares, or one of uniform"
    ) as info:
        parse_client_budgets(given)
    assert found in str(info.value)


# ---- Heads ---------------------------------------------------------------------------


# shares of 1/8 to 8/8: half a head is rounded up, and one at least is trained
HEADS_FOR_EIGHTHS = {
    2: [1, 1, 1, 1, 1, 2, 2, 2],
    3: [1, 1, 1, 2, 2, 2, 3, 3],
    4: [1, 1, 2, 2, 3, 3, 4, 4],
    5: [1, 1, 2, 3, 3, 4, 4, 5],
    6: [1, 2, 2, 3, 4, 5, 5, 6],
    7: [1, 2, 3, 4, 4, 5, 6, 7],
    8: [1, 2, 3, 4, 5, 6, 7, 8],
}


@pytest.mark.parametrize("allocation", HEAD_ALLOCATIONS)
@pytest.mark.parametrize("num_heads, expected", HEADS_FOR_EIGHTHS.items())
def test_half_a_head_is_rounded_up(num_heads, expected, allocation):
    scores = {"layer": torch.ones(num_heads)}
    assert [count(select_heads(scores, eighths / 8, 0, allocation)) for eighths in range(1, 9)] == expected


def test_half_a_head_is_rounded_up_where_a_float_is_just_below():
    assert 0.29 * 50 < 14.5
    assert count(select_heads({"layer": torch.ones(50)}, 0.29, 0)) == 15


def test_a_larger_share_never_trains_fewer_heads():
    for num_heads in range(2, 9):
        scores = {"layer": torch.ones(num_heads)}
        counts = [count(select_heads(scores, share / 200, 0)) for share in range(1, 201)]
        assert counts == sorted(counts) and set(counts) == set(range(1, num_heads + 1))


def half_up(share: float, num_heads: int) -> int:
    return max(1, int((Decimal(str(share)) * num_heads).quantize(Decimal(1), ROUND_HALF_UP)))


@examples(60)
@given(scores=SCORES, share=SHARES, seed=SEEDS)
def test_every_layer_trains_its_share_of_the_best_heads(scores, share, seed):
    masks = select_heads(scores, share, seed)
    assert masks.keys() == scores.keys()
    for name, mask in masks.items():
        assert mask.dtype == torch.bool and mask.shape == scores[name].shape
        assert mask.sum() == half_up(share, len(mask))
        if not mask.all():
            assert scores[name][mask].min() >= scores[name][~mask].max()


@examples(60)
@given(scores=SCORES, share=SHARES, seed=SEEDS)
def test_a_global_budget_is_spent_on_the_best_heads_of_all(scores, share, seed):
    masks = select_heads(scores, share, seed, "global")
    total = sum(map(len, scores.values()))
    assert count(masks) == half_up(share, total)
    chosen = torch.cat([scores[name][mask] for name, mask in masks.items()])
    others = torch.cat([scores[name][~mask] for name, mask in masks.items()])
    assert not len(others) or chosen.min() >= others.max()


@examples(60)
@given(scores=SCORES, share=SHARES, seed=SEEDS, data=st.data())
def test_heads_of_different_sizes_fit_into_the_share_of_all_parameters(scores, share, seed, data):
    sizes = {name: data.draw(st.integers(1, 30)) for name in scores}
    masks = select_heads(scores, share, seed, "global", sizes)
    budget = share * sum(sizes[name] * len(heads) for name, heads in scores.items())
    used = sum(sizes[name] * int(mask.sum()) for name, mask in masks.items())
    assert count(masks) >= 1
    if len(set(sizes.values())) > 1 and count(masks) > 1:
        assert used <= budget
        left = [sizes[name] for name, mask in masks.items() if not mask.all()]
        assert not left or budget - used < min(left)  # no other head would have fitted


@examples(60)
@given(scores=SCORES, share=SHARES, seed=SEEDS, allocation=st.sampled_from(HEAD_ALLOCATIONS), data=st.data())
def test_the_choice_depends_on_nothing_but_scores_and_seed(scores, share, seed, allocation, data):
    shuffled = {name: scores[name] for name in data.draw(st.permutations(list(scores)))}
    torch.manual_seed(data.draw(SEEDS))
    first, second = (select_heads(given, share, seed, allocation) for given in (scores, shuffled))
    assert as_lists(first) == as_lists(second)


@pytest.mark.parametrize("allocation", HEAD_ALLOCATIONS)
def test_the_whole_budget_is_all_heads(allocation):
    scores = {"a": torch.zeros(4), "b": torch.tensor([float("nan"), 1.0])}
    assert all(mask.all() for mask in select_heads(scores, 1.0, 0, allocation, {"a": 3, "b": 7}).values())


def test_planted_heads_are_found():
    scores = {"a": torch.tensor([0.1, 5.0, 0.2, 4.0]), "b": torch.tensor([0.3, 0.2, 0.1, 0.4])}
    assert as_lists(select_heads(scores, 0.5, 0)) == {
        "a": [False, True, False, True],
        "b": [True, False, False, True],
    }
    # over all targets together, the one with low scores gets what the other leaves
    assert as_lists(select_heads(scores, 0.25, 0, "global")) == {"a": [False, True, False, True], "b": [False] * 4}
    assert as_lists(select_heads(scores, 0.01, 0, "global")) == {"a": [False, True, False, False], "b": [False] * 4}
    # a head of "a" costs 10 of 44 parameters: one of them fits into half of these, and all of "b"
    assert as_lists(select_heads(scores, 0.5, 0, "global", {"a": 10, "b": 1})) == {
        "a": [False, True, False, True],
        "b": [True, False, False, True],
    }
    assert as_lists(select_heads(scores, 0.3, 0, "global", {"a": 10, "b": 1})) == {
        "a": [False, True, False, False],
        "b": [True, True, False, True],
    }


@pytest.mark.parametrize("allocation", HEAD_ALLOCATIONS)
def test_equal_scores_are_a_random_choice_in_which_every_head_is_as_likely(allocation):
    scores = {"a": torch.zeros(4), "b": torch.zeros(4)}
    chosen = sum(
        torch.stack(list(select_heads(scores, 0.25, seed, allocation).values())).float() for seed in range(400)
    )
    assert chosen.sum() == 800 and ((chosen - 100).abs() < 40).all()


def test_an_undefined_score_does_not_disturb_the_others():
    scores = {"a": torch.tensor([float("nan"), 3.0, 1.0, 2.0])}
    assert as_lists(select_heads(scores, 0.5, 0)) == {"a": [False, True, False, True]}


def test_norms_order_the_heads_of_a_target_as_frobenius_does_and_do_not_grow_with_the_rank():
    cores = {"a": torch.randn(5, 3, 3), "b": torch.ones(2, 8, 8, dtype=torch.bfloat16)}
    scores = head_scores(cores)
    assert torch.equal(scores["a"].argsort(), cores["a"].flatten(1).norm(dim=1).argsort())
    torch.testing.assert_close(scores["a"], cores["a"].flatten(1).norm(dim=1) / 3)
    assert torch.equal(scores["b"], torch.ones(2))


@pytest.mark.parametrize(
    "share, allocation, message",
    [
        (0.0, "layer", "share of heads must be above 0 and up to 1, got 0.0"),
        (0.5, "target", "one of layer, global, got"),
    ],
)
def test_what_is_out_of_range_is_reported(share, allocation, message):
    with pytest.raises(ValueError, match=message):
        select_heads({"a": torch.zeros(2)}, share, 0, allocation)
