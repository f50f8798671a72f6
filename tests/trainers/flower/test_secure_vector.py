"""The vectors of secure aggregation: their sum modulo 2^32 is the sum of the updates, and masks hide one of them."""

import math
from dataclasses import replace
from functools import reduce

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given


pytest.importorskip("flwr")

from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes, public_key_to_bytes

from peft_ravan.merging import ClientUpdate, UpdateError, merge
from peft_ravan.trainers.compression import with_changes
from peft_ravan.trainers.exchange import ClientReply, ClientTask
from peft_ravan.trainers.flower.secure_masks import mask, pair_mask
from peft_ravan.trainers.flower.secure_vector import LOSS_RANGE, MODULUS, SecureSumError, SumFormat

from ...properties import examples


CORE, HEAD = "base_model.model.q.ravan_H", "base_model.model.classifier.weight"
STATE = {CORE: torch.zeros(2, 1, 1), HEAD: torch.zeros(2)}
TASK = ClientTask(1, "north", STATE, seed=0, upload_dtype="float32")


def reply(core, head, heads=None, loss=0.5, num_examples=1) -> ClientReply:
    change = {CORE: torch.tensor(core).view(-1, 1, 1), HEAD: torch.tensor(head)}
    trained = None if heads is None else {CORE: torch.tensor(heads)}
    return ClientReply.to(
        TASK, update=change, num_examples=num_examples, trained_heads=trained, train_loss=loss, upload_dtype="float32"
    )


def summed(form: SumFormat, replies: list[ClientReply]) -> np.ndarray:
    return reduce(np.add, [form.pack(reply, reply.num_examples) for reply in replies])


def test_the_mean_of_two_clients():
    form = SumFormat.of(TASK, 3, 4, clipping_range=8.0)
    replies = [
        reply([2.0, -4.0], [1.0, 0.0], loss=1.0),
        reply([6.0], [5.0, -8.0], heads=[True, False], loss=3.0, num_examples=3),
    ]
    assert [len(form.pack(one, one.num_examples)) for one in replies] == [len(form)] * 2 == [3 + 2 + 2 + 2] * 2
    mean = form.unpack(summed(form, replies), 4)
    # (2 + 3 * 6) / 4, and -4 of the only client that trained the head
    assert mean.change[CORE].flatten().tolist() == pytest.approx([5.0, -4.0], abs=1e-7)
    assert mean.change[HEAD].tolist() == pytest.approx([4.0, -6.0], abs=1e-7)
    assert mean.train_loss == pytest.approx(2.5, abs=1e-5) and mean.trained_heads == {}


def test_a_head_that_nobody_has_trained_is_left_out():
    form = SumFormat.of(TASK, 3, 4, clipping_range=8.0)
    replies = [reply([2.0], [1.0, 1.0], heads=[False, True], num_examples=n) for n in (1, 3)]
    mean = form.unpack(summed(form, replies), 4)
    assert mean.change[CORE].tolist() == [[[pytest.approx(2.0)]]]
    assert mean.trained_heads[CORE].tolist() == [False, True]


def test_frozen_tensors_have_no_words():
    task = replace(TASK, frozen=("classifier",))
    assert list(SumFormat.of(task, 3, 4, 8.0).shapes) == [CORE]


def test_a_loss_that_cannot_be_summed_is_left_out():
    form = SumFormat.of(TASK, 3, 4, clipping_range=8.0)
    losses = {math.nan: math.nan, 2 * LOSS_RANGE: math.nan, 0.5: 0.5}
    for loss, expected in losses.items():
        assert form.unpack(summed(form, [reply([1.0, 1.0], [1.0, 1.0], loss=loss)]), 1).train_loss == pytest.approx(
            expected, nan_ok=True
        )
    both = summed(form, [reply([0.0, 0.0], [0.0, 0.0], loss=loss, num_examples=2) for loss in (math.nan, 0.25)])
    assert form.unpack(both, 4).train_loss == pytest.approx(0.25)


entries = st.floats(-1, 1, width=32) | st.sampled_from([-1.0, 0.0, 1.0])
clients = st.lists(
    st.tuples(st.integers(1, 1000), st.lists(st.booleans(), min_size=3, max_size=3), st.lists(entries, min_size=8, max_size=8)),
    min_size=1,
    max_size=6,
)  # fmt: skip


@given(clients, st.integers(0, 4), st.sampled_from([0.125, 1.0, 8.0, 1000.0]))
@examples(200)
def test_the_mean_of_a_sum_is_that_of_the_merge_within_its_bound(clients, num_missing, largest):
    """Also if some clients have dropped out, and whatever masks were added and removed."""
    start = {CORE: torch.zeros(3, 2, 1), HEAD: torch.zeros(2)}
    task = ClientTask(1, "", start, seed=0, upload_dtype="float32")
    total, missing = sum(n for n, *_ in clients) + 1000 * num_missing, num_missing
    form = SumFormat.of(task, len(clients) + missing, total, largest)
    words, updates = np.zeros(len(form), dtype=np.uint32), []
    for index, (num_examples, heads, numbers) in enumerate(clients):
        trained, numbers = torch.tensor(heads), torch.tensor(numbers) * largest
        change = {CORE: numbers[:6].view(3, 2, 1)[trained], HEAD: numbers[6:]}
        words += form.pack(
            ClientReply.to(task, update=change, trained_heads={CORE: trained}, num_examples=num_examples), num_examples
        )
        updates.append(ClientUpdate(change, num_examples, str(index), {CORE: trained}))
    counted = sum(n for n, *_ in clients)
    mean = form.unpack(words, counted)
    merged = merge(start, updates, "ravan").state
    unpacked = {**start, **with_changes(start, mean.change, mean.trained_heads)}
    mask = mean.trained_heads.get(CORE)
    if mask is not None:  # the others keep their values
        whole = torch.zeros(3, 2, 1)
        whole[mask] = unpacked[CORE]
        unpacked[CORE] = whole
    fewest = min(n for n, *_ in clients)
    bound = form.num_clients * largest / MODULUS * total / fewest
    for name in start:
        torch.testing.assert_close(unpacked[name], merged[name], rtol=1e-6, atol=1.01 * bound + 1e-7 * largest)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_changes_of_many_clients_do_not_overflow(sign):
    num_clients, form = 1000, SumFormat.of(TASK, 1000, 7000, clipping_range=2.5)
    one = form.pack(reply([sign * 2.5] * 2, [sign * 2.5] * 2, num_examples=7), 7)
    mean = form.unpack((one.astype(np.uint64) * num_clients % MODULUS).astype(np.uint32), 7000)
    assert mean.change[HEAD].tolist() == pytest.approx([sign * 2.5] * 2, abs=1e-6)


@pytest.mark.parametrize("value", [2.500001, -3.0, math.nan, math.inf])
def test_a_change_out_of_range_is_refused_by_its_name_and_not_clipped(value):
    form = SumFormat.of(TASK, 3, 4, clipping_range=2.5)
    with pytest.raises(UpdateError, match="beyond ±2.5.*raise `clipping_range`") as raised:
        form.pack(reply([0.0, 1.0], [0.0, value]), 1)
    assert repr(HEAD) in str(raised.value) and str(value) not in str(raised.value).replace("infinite", "")


BAD_UPDATES = {
    "missing": ({CORE: torch.zeros(2, 1, 1)}, "is missing from the update"),
    "unknown": ({CORE: torch.zeros(2, 1, 1), HEAD: torch.zeros(2), "x": torch.zeros(1)}, "'x'.*is not expected"),
    "shape": ({CORE: torch.zeros(2, 1, 1), HEAD: torch.zeros(2, 1)}, "with the shape"),
    "heads": ({CORE: torch.zeros(1, 1, 1), HEAD: torch.zeros(2)}, "with the shape"),
    "integers": ({CORE: torch.zeros(2, 1, 1), HEAD: torch.zeros(2).int()}, "must be floating point"),
}


@pytest.mark.parametrize("update, reason", BAD_UPDATES.values(), ids=BAD_UPDATES)
def test_another_update_is_refused(update, reason):
    with pytest.raises(UpdateError, match=reason):
        SumFormat.of(TASK, 3, 4, 8.0).pack(ClientReply.to(TASK, update=update), 1)


def test_what_no_clients_can_sum_to_is_refused():
    form = SumFormat.of(TASK, 3, 8, clipping_range=8.0)
    words = summed(form, [reply([1.0, 1.0], [1.0, 1.0], num_examples=2) for _ in range(2)])
    assert form.unpack(words, 4).change[HEAD].tolist() == [pytest.approx(1.0)] * 2
    with pytest.raises(SecureSumError, match="have 4 examples, and they have said 5"):
        form.unpack(words, 5)
    more_losses = words + np.array([0, 1, *[0] * (len(words) - 2)], dtype=np.uint32)
    with pytest.raises(SecureSumError, match="One of them has not sent what it should"):
        form.unpack(more_losses, 4)
    for word, value in {3: 5, 5: MODULUS // 2 - 1, 8: MODULUS // 2}.items():  # heads, a core, the task head
        changed = words.copy()
        changed[word] = value
        with pytest.raises(SecureSumError, match="beyond what changes up to ±8 can sum to"):
            form.unpack(changed, 4)


def test_too_many_examples_are_refused():
    with pytest.raises(ValueError, match="32 bits, which are too few .* `max_examples`"):
        SumFormat.of(TASK, 3, 2**32, 8.0)


# ---- Masks -------------------------------------------------------------------------


def test_a_mask_is_the_key_stream_of_aes():
    # the known answer for AES-256 with a key and a block of zeros
    assert mask(bytes(32), 4).tobytes().hex() == "dc95c078a2408989ad48a21492842087"
    with pytest.raises(ValueError, match="must have 32 bytes, got 16"):
        mask(bytes(16), 4)


def test_all_bits_of_a_key_count():
    key = bytes(range(32))
    swapped = key[4:8] + key[:4] + key[8:]  # the same if words are combined by exclusive or
    assert not (mask(key, 100) == mask(swapped, 100)).any()


def test_two_clients_make_the_same_mask_and_others_another_one():
    pairs = [generate_key_pairs() for _ in range(3)]
    private, public = [private_key_to_bytes(own) for own, _ in pairs], [public_key_to_bytes(own) for _, own in pairs]
    masks = [pair_mask(private[one], public[two], 50) for one, two in ((0, 1), (1, 0), (0, 2), (1, 2))]
    assert (masks[0] == masks[1]).all()
    assert not (masks[0] == masks[2]).any() and not (masks[0] == masks[3]).any()


def test_the_words_of_a_mask_are_uniform():
    counts = np.bincount(mask(bytes(range(32)), 2**16).view(np.uint8), minlength=256)
    expected = 2**18 / 256
    assert ((counts - expected) ** 2 / expected).sum() < 400  # 255 degrees of freedom
