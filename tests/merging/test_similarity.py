"""The cosine similarity of the clients' changes, in the diagnostics of every merge."""

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from peft import LoraConfig

from peft_ravan.merging import ClientUpdate, GaussianMechanism, UpdateLimits, merge
from peft_ravan.merging.changes import change_norm
from peft_ravan.merging.similarity import UpdateSimilarity

from ..properties import examples
from .reference import CONFIG, client, every_case, random_round


CORE = "base_model.model.layer.ravan_H"


def cosine(*vectors, start=0.0, method="fedavg", **kwargs) -> float | None:
    """The figure of a merge of clients whose changes are these vectors."""
    global_state = {"w": torch.full((len(vectors[0]),), start)}
    updates = [client({"w": torch.tensor(v, dtype=torch.float32) + start}, i + 1, i) for i, v in enumerate(vectors)]
    return merge(global_state, updates, method, **kwargs).diagnostics.get("update_cosine")


def changes_of(update: ClientUpdate, global_state) -> torch.Tensor:
    """The change as one vector, head by head where only some were trained."""
    parts = []
    for name, start in global_state.items():
        change = torch.zeros(start.shape, dtype=torch.float64)
        if name in update.state:
            mask = update.heads(name, len(start)) if name.endswith("ravan_H") else torch.ones(len(start)).bool()
            change[mask] = update.state[name].double() - start[mask].double()
        parts.append(change.flatten())
    return torch.cat(parts)


def mean_of_pairs(global_state, updates) -> float:
    """The definition: a loop over all pairs."""
    changes = [changes_of(update, global_state) for update in updates]
    pairs = [torch.cosine_similarity(a, b, dim=0).item() for a, b in itertools.combinations(changes, 2)]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize(
    "vectors, expected",
    [
        ([[1, 0], [5, 0]], 1.0),  # the length does not matter
        ([[1, 0], [0, 3]], 0.0),
        ([[1, 1], [-2, -2]], -1.0),
        ([[1, 0], [1, 1]], math.sqrt(0.5)),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]], 3 * math.sqrt(1 / 3) / 6),
        # three directions of the plane, as far apart as possible
        ([[1, 0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)]], -0.5),
    ],
)
@pytest.mark.parametrize("start", [0.0, 2.0])
def test_directions(vectors, expected, start):
    assert cosine(*vectors, start=start) == pytest.approx(expected, abs=2e-6)


def test_it_is_that_of_changes_and_not_of_uploads():
    assert cosine([1, 0], [0, 1], start=1000.0) == pytest.approx(0, abs=1e-3)


@every_case
def test_it_is_the_mean_over_all_pairs_whatever_the_method_and_the_order(method, adapter):
    global_state, updates = random_round(method, adapter)
    expected = mean_of_pairs(global_state, updates)
    for given_updates in (updates, updates[::-1], iter(updates)):
        found = merge(global_state, given_updates, method, config=CONFIG).diagnostics["update_cosine"]
        assert found == pytest.approx(expected, abs=3e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype(dtype):
    global_state, updates = random_round("ravan", "ravan", dtype=dtype)
    found = merge(global_state, updates).diagnostics["update_cosine"]
    assert found == pytest.approx(mean_of_pairs(global_state, updates), abs=3e-6)


@examples(40)
@given(seed=st.integers(0, 2**16), num_clients=st.integers(2, 6), num_heads=st.integers(1, 4))
def test_heads_that_were_not_trained_count_as_unchanged(seed, num_clients, num_heads):
    generator = torch.Generator().manual_seed(seed)
    global_state = {
        CORE: torch.randn(num_heads, 2, 2, generator=generator),
        "head": torch.randn(3, generator=generator),
    }
    updates = []
    for index in range(num_clients):
        mask = torch.rand(num_heads, generator=generator) < 0.5
        state = {
            CORE: torch.randn(int(mask.sum()), 2, 2, generator=generator),
            "head": torch.randn(3, generator=generator),
        }
        updates.append(ClientUpdate(state, 1, f"client_{index}", trained_heads={CORE: mask}))
    found = merge(global_state, updates).diagnostics["update_cosine"]
    assert found == pytest.approx(mean_of_pairs(global_state, updates), abs=3e-6)


def test_clients_that_train_different_heads_have_nothing_in_common():
    global_state = {CORE: torch.ones(2, 2, 2)}
    updates = [
        ClientUpdate({CORE: torch.full((1, 2, 2), 3.0)}, 1, f"client_{i}", {CORE: torch.tensor([i == 0, i == 1])})
        for i in range(2)
    ]
    assert merge(global_state, updates).diagnostics["update_cosine"] == 0


def test_it_is_left_out_where_there_is_no_pair():
    assert cosine([1, 2]) is None
    assert cosine([0, 0], [0, 0]) is None
    assert cosine([0, 0], [1, 2]) is None
    # two clients changed something
    assert cosine([0, 0], [1, 2], [2, 4]) == 1


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e10, 1e16])
def test_small_and_large_changes(scale):
    assert cosine([scale, 0], [scale, scale], [-scale, 0]) == pytest.approx((math.sqrt(0.5) - 1 - math.sqrt(0.5)) / 3)
    # the size of one client does not hide the others
    assert cosine([scale, 0], [0, 1.0], [0, 2.0]) == pytest.approx(1 / 3, abs=1e-6)


def test_numbers_of_examples_do_not_matter():
    global_state = {"w": torch.zeros(2)}
    updates = [
        client({"w": torch.tensor(v)}, n, n) for n, v in ((1, [1.0, 0.0]), (1000, [0.0, 1.0]), (10, [1.0, 0.0]))
    ]
    assert merge(global_state, updates, "fedavg").diagnostics["update_cosine"] == pytest.approx(1 / 3, abs=1e-6)


def test_only_updates_that_are_merged_count():
    assert cosine([1, 0], [1, 1], [math.nan, 0], on_bad_update="drop") == pytest.approx(math.sqrt(0.5), abs=1e-6)
    refusing = UpdateLimits(max_update_norm=2.0, large_updates="refuse")
    assert cosine([1, 0], [1, 1], [-5, 0], on_bad_update="drop", limits=refusing) == pytest.approx(math.sqrt(0.5))
    assert cosine([1, 0], [-5, 0], limits=UpdateLimits(max_update_norm=2.0)) == -1


def test_there_is_none_if_ranks_differ():
    A, B = "base_model.model.layer.lora_A.weight", "base_model.model.layer.lora_B.weight"
    state = {r: {A: torch.ones(r, 3), B: torch.ones(3, r)} for r in (1, 2)}
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["layer"])
    ranks = {
        (2, 2): True,
        (1, 2): False,
        (2, 1): False,
        (1, 1): False,
    }
    for (first, second), is_defined in ranks.items():
        configs = [LoraConfig(r=r, lora_alpha=2 * r, target_modules=["layer"]) for r in (first, second)]
        updates = [
            ClientUpdate(state[r], 1, str(i), config=c)
            for i, (r, c) in enumerate(zip((first, second), configs, strict=True))
        ]
        start = {A: torch.full((2, 3), 0.5), B: torch.zeros(3, 2)}
        for method in ("flexlora", "hetlora", "flora"):
            found = merge(start, updates, method, config=config).diagnostics
            assert ("update_cosine" in found) is is_defined


@pytest.mark.parametrize("noise_multiplier", [0.0, 1.0])
def test_noise_does_not_protect_it_so_it_is_not_computed(noise_multiplier, monkeypatch):
    monkeypatch.setattr(UpdateSimilarity, "add", lambda self, update: pytest.fail("an update was measured"))
    mechanism = GaussianMechanism(clip_norm=1.0, noise_multiplier=noise_multiplier, num_clients=2)
    assert cosine([1, 0], [0, 1], mechanism=mechanism) is None


def test_a_vector_is_what_the_norm_is_of():
    global_state, updates = random_round("ravan", "ravan")
    norms = [changes_of(update, global_state).norm().item() for update in updates]
    assert norms == pytest.approx([change_norm(update, global_state) for update in updates])
