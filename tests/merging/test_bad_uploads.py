"""Invalid uploads: they are refused with the client and the tensor, or dropped as if they had not been sent."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch

from peft_ravan.merging import MERGE_METHODS, ClientUpdate, UpdateError, merge

from .reference import CASES, CORES, TASK_HEAD, assert_same, effect_of, every_case, merge_faithfully, random_round


BAD = "client_2"
INDEX = 2
CORE = next(iter(CORES))


# All methods get their updates from one checker. These are tested with all kinds of bad uploads: a method that
# streams, one that waits for all updates, one that accepts other ranks, and one with frozen factors. The others are
# tested with one kind, which shows that they use the checker.
REPRESENTATIVES = [("ravan", "ravan"), ("fedrpca", "ravan"), ("hetlora", "lora"), ("ffa_lora", "lora")]


def on_all_cases(kinds: Iterable[str], of_others: str):
    """All kinds of uploads for the representatives, and one for each other method and adapter."""
    kinds = list(kinds)
    assert of_others in kinds and set(REPRESENTATIVES) <= set(CASES)
    cases = [(*case, kind) for case in REPRESENTATIVES for kind in kinds]
    cases += [(*case, of_others) for case in CASES if case not in REPRESENTATIVES]
    return pytest.mark.parametrize("method, adapter, kind", cases)


def with_tensor(update: ClientUpdate, name: str, tensor) -> ClientUpdate:
    return replace(update, state={**update.state, name: tensor})


def with_entries(*values: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[: len(values)] = torch.tensor(values, dtype=tensor.dtype)
        return changed

    return change


# a change of one tensor of the upload, and the message about it
BAD_TENSORS = {
    "nan": (with_entries(torch.nan), "NaN or infinite"),
    "inf": (with_entries(torch.inf), "NaN or infinite"),
    "minus-inf": (with_entries(-torch.inf), "NaN or infinite"),
    "infs-that-cancel": (with_entries(torch.inf, -torch.inf), "2 of .* entries are NaN or infinite"),
    "more-rows": (lambda t: torch.cat([t, t]), "must have shape|its rank"),
    "more-columns": (lambda t: torch.cat([t, t], dim=-1), "must have shape|its rank"),
    "transposed": (lambda t: t.new_zeros(*reversed(t.shape), 1), "must have shape"),
    "flat": (lambda t: t.flatten(), "must have shape"),
    "empty": (lambda t: t[:0], "must have shape"),
    "number": (lambda t: t.sum(), "must have shape"),
    "integers": (lambda t: t.long(), "must be a floating point tensor, got torch.int64"),
    "bools": (lambda t: t > 0, "must be a floating point tensor, got torch.bool"),
    "complex": (lambda t: t.to(torch.complex128), "must be a floating point tensor, got torch.complex128"),
    "half": (lambda t: t.half(), "must be torch.float64 as in the global state, got torch.float16"),
    "list": (lambda t: t.tolist(), "must be a floating point tensor, got list"),
    "none": (lambda t: None, "must be a floating point tensor, got NoneType"),
}
# the tensor that is changed: the first, and the last, which is the task head
PLACES = {"first": 0, "last": -1}

BAD_UPDATES = {
    "missing": (
        lambda u: replace(u, state={n: t for n, t in u.state.items() if n != TASK_HEAD}),
        f"tensor '{TASK_HEAD}': missing from the update",
    ),
    "empty": (lambda u: replace(u, state={}), "tensor '.*': missing from the update"),
    "extra": (lambda u: with_tensor(u, "extra.weight", torch.ones(1)), "tensor 'extra.weight': not expected"),
    "scalings": (lambda u: with_tensor(u, "q.ravan_s", torch.ones(1)), "tensor 'q.ravan_s': .* are never uploaded"),
    "no-examples": (lambda u: replace(u, num_examples=0), "num_examples must be an integer of 1 or more.*got 0"),
    "negative": (lambda u: replace(u, num_examples=-3), "num_examples must be an integer of 1 or more.*got -3"),
    "fraction": (lambda u: replace(u, num_examples=0.5), "num_examples must be an integer of 1 or more.*got 0.5"),
    "nan-examples": (lambda u: replace(u, num_examples=float("nan")), "num_examples must be an integer.*got nan"),
    "true-examples": (lambda u: replace(u, num_examples=True), "num_examples must be an integer.*got True"),
    "heads-of-no-core": (
        lambda u: replace(u, trained_heads={TASK_HEAD: torch.ones(3, dtype=torch.bool)}),
        f"tensor '{TASK_HEAD}': trained_heads names it, but it is not a core",
    ),
    "heads-of-nothing": (
        lambda u: replace(u, trained_heads={"x.ravan_H": torch.ones(3, dtype=torch.bool)}),
        "tensor 'x.ravan_H': trained_heads names it, but it is not a core",
    ),
}
BAD_MASKS = {
    "numbers": (lambda h: torch.ones(h), "trained_heads must be a bool tensor of shape"),
    "too-long": (lambda h: torch.ones(h + 1, dtype=torch.bool), "trained_heads must be a bool tensor of shape"),
    "too-short": (lambda h: torch.ones(0, dtype=torch.bool), "trained_heads must be a bool tensor of shape"),
    "matrix": (lambda h: torch.ones(h, 1, dtype=torch.bool), "trained_heads must be a bool tensor of shape"),
    "list": (lambda h: [True] * h, "trained_heads must be a bool tensor, got list"),
    "fewer-than-uploaded": (
        lambda h: torch.zeros(h, dtype=torch.bool),
        "must have shape|only some heads were trained",
    ),
}


def assert_refused_or_dropped(method: str, adapter: str, spoil: Callable[[ClientUpdate], ClientUpdate], message: str):
    global_state, updates = random_round(method, adapter)
    copies = {name: tensor.clone() for name, tensor in global_state.items()}
    bad = spoil(updates[INDEX])
    round_ = [*updates[:INDEX], bad, *updates[INDEX + 1 :]]
    with pytest.raises(UpdateError, match=f"client '{BAD}'.*({message})"):
        merge_faithfully(method, global_state, round_)
    result = merge_faithfully(method, global_state, round_, on_bad_update="drop")
    [dropped] = result.diagnostics["dropped"]
    assert dropped["client"] == BAD and f"client '{BAD}'" in dropped["reason"]
    assert result.diagnostics["num_clients"] == 4
    # as if the client had not been there
    expected = merge_faithfully(method, global_state, [u for u in updates if u.client_id != BAD])
    assert_same(effect_of(result), effect_of(expected), 0.0)
    assert all(torch.equal(global_state[name], tensor) for name, tensor in copies.items())


@pytest.mark.parametrize("place", PLACES)
@on_all_cases(BAD_TENSORS, of_others="nan")
def test_a_bad_tensor_is_refused_by_name_or_dropped(method, adapter, kind, place):
    change, message = BAD_TENSORS[kind]
    _, updates = random_round(method, adapter)
    name = list(updates[INDEX].state)[PLACES[place]]

    def spoil(update: ClientUpdate) -> ClientUpdate:
        return with_tensor(update, name, change(update.state[name]))

    frozen = "|differs from the global one" if ".lora_A." in name else ""
    assert_refused_or_dropped(method, adapter, spoil, f"tensor '{name}': .*({message}{frozen})")


@on_all_cases(BAD_UPDATES, of_others="missing")
def test_a_bad_update_is_refused_or_dropped(method, adapter, kind):
    assert_refused_or_dropped(method, adapter, *BAD_UPDATES[kind])


@pytest.mark.parametrize("kind", BAD_MASKS)
@pytest.mark.parametrize("method, adapter", [case for case in REPRESENTATIVES if case[1] != "lora"])
def test_a_bad_set_of_heads_is_refused_or_dropped(method, adapter, kind):
    make, message = BAD_MASKS[kind]

    def spoil(update: ClientUpdate) -> ClientUpdate:
        return replace(update, trained_heads={CORE: make(len(update.state[CORE]))})

    assert_refused_or_dropped(method, adapter, spoil, f"tensor '{CORE}': .*({message})")


@every_case
def test_a_client_counts_once(method, adapter):
    global_state, updates = random_round(method, adapter)
    twice = [*updates, replace(updates[0], client_id=BAD)]
    with pytest.raises(UpdateError, match=f"client '{BAD}': there are two updates of this client"):
        merge_faithfully(method, global_state, twice)
    result = merge_faithfully(method, global_state, twice, on_bad_update="drop")
    assert [entry["client"] for entry in result.diagnostics["dropped"]] == [BAD]
    assert_same(effect_of(result), effect_of(merge_faithfully(method, global_state, updates)), 0.0)


@every_case
def test_a_client_whose_first_upload_was_dropped_may_upload_again(method, adapter):
    global_state, updates = random_round(method, adapter)
    name = next(iter(updates[0].state))
    broken = with_tensor(updates[0], name, updates[0].state[name] * torch.nan)
    result = merge_faithfully(method, global_state, [broken, *updates], on_bad_update="drop")
    assert result.diagnostics["num_clients"] == 5
    assert_same(effect_of(result), effect_of(merge_faithfully(method, global_state, updates)), 0.0)


@every_case
def test_a_merge_of_bad_uploads_alone_says_what_was_wrong_with_each(method, adapter):
    global_state, updates = random_round(method, adapter)
    empty = [replace(update, state={}) for update in updates[:2]]
    with pytest.raises(UpdateError, match="at least one client update, got none.*'client_0'.*missing.*'client_1'"):
        merge_faithfully(method, global_state, empty, on_bad_update="drop")
    with pytest.raises(UpdateError, match="at least one client update, got none"):
        merge_faithfully(method, global_state, [])


def test_nameless_clients_are_reported_by_number():
    state = {"w": torch.ones(2)}
    nameless = [ClientUpdate(state, 1), ClientUpdate({"w": torch.tensor([1.0, torch.nan])}, 1), ClientUpdate(state, 1)]
    with pytest.raises(UpdateError, match="client number 1 .without a name., tensor 'w': 1 of 2 entries"):
        merge(state, nameless, "fedavg")
    assert merge(state, nameless, "fedavg", on_bad_update="drop").diagnostics["dropped"][0]["client"] == "1"


def test_a_sum_that_overflows_is_no_bad_upload():
    large = torch.full((4,), 60000.0, dtype=torch.float16)
    assert not torch.isfinite(large.sum())
    assert torch.equal(
        merge({"w": torch.zeros_like(large)}, [ClientUpdate({"w": large}, 1)], "fedavg").state["w"], large
    )


@pytest.mark.parametrize("value", [3e38, -3e38, 1e20])
@pytest.mark.parametrize("method, adapter", REPRESENTATIVES)
def test_entries_so_large_that_products_overflow_are_refused_or_dropped(method, adapter, value):
    global_state, updates = random_round(method, adapter, dtype=torch.float32)
    name = list(updates[INDEX].state)[-1]
    bad = with_tensor(updates[INDEX], name, with_entries(value)(updates[INDEX].state[name]))
    round_ = [*updates[:INDEX], bad, *updates[INDEX + 1 :]]
    with pytest.raises(UpdateError, match=f"client '{BAD}', tensor '{name}': has entries of .*, above 2e.16"):
        merge_faithfully(method, global_state, round_)
    result = merge_faithfully(method, global_state, round_, on_bad_update="drop")
    assert [dropped["client"] for dropped in result.diagnostics["dropped"]] == [BAD]


def test_the_largest_entries_that_are_taken_do_not_overflow():
    """No method produces infinite entries from clients that all go to the limit, each in its own direction."""
    for method, adapter in CASES:
        global_state, updates = random_round(method, adapter, dtype=torch.float32)
        large = [
            replace(
                update,
                state={
                    name: tensor
                    if any(part in name for part in MERGE_METHODS[method].frozen_in(1))
                    else tensor.sign() * 1.8e16
                    for name, tensor in update.state.items()
                },
            )
            for update in updates
        ]
        merge_faithfully(method, global_state, large)


def test_an_update_that_overflows_in_half_precision_is_reported_by_client():
    """A and B are in the range of half precision, but a factor that gets the whole norm is not."""
    large = {"m.lora_A.weight": torch.full((1, 4), 200.0).half(), "m.lora_B.weight": torch.full((4, 1), 200.0).half()}
    start = {name: torch.zeros_like(tensor) for name, tensor in large.items()}
    small = {name: tensor / 200 for name, tensor in large.items()}
    updates = [ClientUpdate(small, 1, "small"), ClientUpdate(large, 9, "large")]
    with pytest.raises(UpdateError, match="client 'large': the merge with it has entries that are NaN or infinite"):
        merge(start, updates, "flexlora")
    result = merge(start, updates, "flexlora", on_bad_update="drop")
    assert [dropped["client"] for dropped in result.diagnostics["dropped"]] == ["large"]
    assert (result.diagnostics["num_clients"], result.diagnostics["num_examples"]) == (1, 1)
    expected = merge(start, updates[:1], "flexlora")
    assert all(torch.equal(result.state[name], tensor) for name, tensor in expected.state.items())
    with pytest.raises(UpdateError, match="at least one client update, got none"):
        merge(start, updates[1:], "flexlora", on_bad_update="drop")


def test_a_global_state_that_is_broken_is_not_blamed_on_clients():
    updates = [ClientUpdate({"w": torch.ones(2)}, 1, "good")]
    with pytest.raises(
        ValueError, match="Tensor 'w': the global state has entries that are NaN or infinite"
    ) as caught:
        merge({"w": torch.tensor([1.0, torch.inf])}, updates, "fedavg", on_bad_update="drop")
    assert not isinstance(caught.value, UpdateError)


def test_a_factor_of_the_method_that_overflows_is_reported():
    state = {"m.lora_A.weight": torch.full((1, 4), 60000.0).half()}
    start = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    with pytest.raises(ValueError, match="Tensor 'm.lora_A.weight': the merge has made entries that are NaN or infi"):
        merge(start, [ClientUpdate(state, 1)], "task_arithmetic", scale=5.0)


def test_there_are_two_ways_to_treat_bad_uploads():
    with pytest.raises(ValueError, match="`on_bad_update` must be 'raise' or 'drop', got 'ignore'"):
        merge({"w": torch.ones(1)}, [ClientUpdate({"w": torch.ones(1)}, 1)], "fedavg", on_bad_update="ignore")
