"""RoLoRA and FedSVD: only one of A and B is trained in a round, so the merge is exact, and the server sets both."""

import pytest
import torch
from hypothesis import given

from peft_ravan.merging import ServerStep, UpdateError, merge

from .reference import (
    CONFIG,
    TASK_HEAD,
    LoraRound,
    a_name,
    assert_same,
    b_name,
    client,
    few,
    lora_rounds,
    lora_state,
    mean_tensor,
    mean_weight,
    modules_of,
    normal,
    upload,
    weight_of,
    weights_of,
)


A, B = "m.lora_A.weight", "m.lora_B.weight"
EMBEDDING_A, EMBEDDING_B = "base_model.model.words.lora_embedding_A", "base_model.model.words.lora_embedding_B"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained_in(method, round_, round_number):
    """The clients of a round, with changes only in the factor that the method trains in it."""
    return [
        client(upload(method, update.state, round_.global_state, round_number), update.num_examples, index)
        for index, update in enumerate(round_.updates)
    ]


def merged(method, global_state, updates, config=CONFIG, round_number=1, **kwargs):
    return merge(
        global_state, updates, method, config=config, server_step=ServerStep(round_number=round_number), **kwargs
    )


def without(updates, part):
    return [
        client({name: t for name, t in update.state.items() if part not in name}, update.num_examples, index)
        for index, update in enumerate(updates)
    ]


def embedding_state(generator):
    return {EMBEDDING_A: normal(generator, 2, 7), EMBEDDING_B: normal(generator, 4, 2)}


# ---------------------------------------------------------------- RoLoRA


def test_rolora_averages_b_then_a_in_numbers():
    start = {A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[0.0], [0.0]])}
    first = [client({B: torch.tensor([[4.0], [0.0]])}, 1, 0), client({B: torch.tensor([[0.0], [8.0]])}, 3, 1)]
    state = merged("rolora", start, first, None).state
    assert state[A].tolist() == [[1.0, 0.0]] and state[B].tolist() == [[1.0], [6.0]]
    second = [client({A: torch.tensor([[1.0, 4.0]])}, 1, 0), client({A: torch.tensor([[5.0, 0.0]])}, 1, 1)]
    state = merged("rolora", state, second, None, round_number=2).state
    assert state[A].tolist() == [[3.0, 2.0]] and state[B].tolist() == [[1.0], [6.0]]


@pytest.mark.parametrize("round_number", [1, 2, 3, 4])
@few
@given(round_=lora_rounds())
def test_rolora_is_the_mean_of_the_weights_in_every_round(round_number, round_: LoraRound):
    updates = trained_in("rolora", round_, round_number)
    state = merged("rolora", round_.global_state, updates, round_.config, round_number).state
    expected = {module: mean_weight(updates, module, round_.config) for module in modules_of(state)}
    assert_same({module: weight_of(state, module, round_.config) for module in expected}, expected)
    assert_same({TASK_HEAD: state[TASK_HEAD]}, {TASK_HEAD: mean_tensor(updates, TASK_HEAD)})
    frozen, trained = (".lora_A.", ".lora_B.") if round_number % 2 else (".lora_B.", ".lora_A.")
    for name in state:
        assert torch.equal(state[name], round_.global_state[name]) == (frozen in name), name
    slim = merged("rolora", round_.global_state, without(updates, frozen), round_.config, round_number).state
    assert all(torch.equal(slim[name], tensor) for name, tensor in state.items())
    with pytest.raises(UpdateError, match=f"RoLoRA keeps it frozen in round {round_number + 1}"):
        merged("rolora", round_.global_state, updates, round_.config, round_number + 1)
    with pytest.raises(UpdateError, match=f"{trained}weight': missing from the update"):
        merged("rolora", round_.global_state, without(updates, trained), round_.config, round_number)


def test_rolora_trains_first_what_starts_at_zero_also_on_embeddings():
    """With B frozen at zero, or A of an embedding, the other one would have no gradient."""
    start, updates = embedding_state(seeded()), [client(embedding_state(seeded(seed)), seed, seed) for seed in (1, 2)]
    only_A, only_B = (without(updates, part) for part in (EMBEDDING_B, EMBEDDING_A))
    state = merged("rolora", start, only_A, None, 1).state
    assert torch.equal(state[EMBEDDING_B], start[EMBEDDING_B])
    assert_same({EMBEDDING_A: state[EMBEDDING_A]}, {EMBEDDING_A: mean_tensor(updates, EMBEDDING_A)})
    state = merged("rolora", start, only_B, None, 2).state
    assert torch.equal(state[EMBEDDING_A], start[EMBEDDING_A])
    assert_same({EMBEDDING_B: state[EMBEDDING_B]}, {EMBEDDING_B: mean_tensor(updates, EMBEDDING_B)})


# ---------------------------------------------------------------- FedSVD


def test_fedsvd_in_numbers():
    """B A is [[6, 8]] after the mean: its norm goes to B, and its direction to A."""
    start = {A: torch.tensor([[3.0, 4.0]]), B: torch.tensor([[0.0]])}
    state = merged("fedsvd", start, [client({B: torch.tensor([[2.0]])})], None).state
    torch.testing.assert_close(state[B], torch.tensor([[10.0]]))
    torch.testing.assert_close(state[A], torch.tensor([[0.6, 0.8]]))


@pytest.mark.parametrize("round_number", [1, 2])
@few
@given(round_=lora_rounds())
def test_fedsvd_is_the_mean_of_the_weights_in_orthonormal_directions(round_number, round_: LoraRound):
    updates = trained_in("fedsvd", round_, round_number)
    state = merged("fedsvd", round_.global_state, updates, round_.config, round_number).state
    expected = {module: mean_weight(updates, module, round_.config) for module in modules_of(state)}
    assert_same({module: weight_of(state, module, round_.config) for module in expected}, expected)
    for module in expected:
        new_A, new_B = state[a_name(module)], state[b_name(module)]
        if min(new_A.shape[0], *expected[module].shape) == new_A.shape[0]:
            torch.testing.assert_close(new_A @ new_A.T, torch.eye(len(new_A), dtype=torch.float64))
            gram = new_B.T @ new_B  # U S: orthogonal columns, the longest first
            assert (gram - gram.diag().diag()).abs().max() <= 1e-9 * (1 + gram.max())
            assert (gram.diag().diff() <= 1e-9 * (1 + gram.max())).all()
    slim = merged("fedsvd", round_.global_state, without(updates, ".lora_A."), round_.config, round_number).state
    assert all(torch.equal(slim[name], tensor) for name, tensor in state.items())
    assert_same({TASK_HEAD: state[TASK_HEAD]}, {TASK_HEAD: mean_tensor(updates, TASK_HEAD)})


def test_fedsvd_refuses_an_a_that_was_trained_in_any_round():
    for round_number in (1, 2):
        with pytest.raises(UpdateError, match="lora_A.*FedSVD keeps it frozen"):
            merged("fedsvd", lora_state(seeded()), [client(lora_state(seeded(1)))], round_number=round_number)


def test_fedsvd_keeps_all_directions_of_a_where_the_product_has_fewer():
    """At the start the product is zero: A becomes orthonormal in the span it has, and B stays zero and trainable."""
    start = {A: normal(seeded(), 3, 8), B: torch.zeros(5, 3, dtype=torch.float64)}
    state = merged("fedsvd", start, [client({B: start[B]})], None).state
    torch.testing.assert_close(state[A] @ state[A].T, torch.eye(3, dtype=torch.float64))
    assert torch.linalg.matrix_rank(torch.cat([state[A], start[A]])) == 3 and not state[B].any()


def test_fedsvd_keeps_the_space_that_a_spans():
    start = {A: normal(seeded(), 3, 8), B: normal(seeded(1), 5, 3)}
    state = merged("fedsvd", start, [client({B: normal(seeded(i), 5, 3)}, i, i) for i in (2, 3)], None).state
    torch.testing.assert_close(state[A].T @ state[A], torch.linalg.pinv(start[A]) @ start[A])  # one projection


def test_fedsvd_on_an_embedding_makes_b_anew():
    start, updates = embedding_state(seeded()), [client(embedding_state(seeded(seed)), seed, seed) for seed in (1, 2)]
    state = merged("fedsvd", start, without(updates, EMBEDDING_B), None).state
    expected = start[EMBEDDING_B] @ mean_tensor(updates, EMBEDDING_A)
    torch.testing.assert_close(state[EMBEDDING_B] @ state[EMBEDDING_A], expected)
    gram = state[EMBEDDING_B].T @ state[EMBEDDING_B] / 4  # of the size that LoRA draws B with
    torch.testing.assert_close(gram, torch.eye(2, dtype=torch.float64))


@few
@given(round_=lora_rounds())
def test_the_mean_counts_examples(round_: LoraRound):
    updates = trained_in("fedsvd", round_, 1)
    module = modules_of(round_.global_state)[0]
    mean_B = sum(w * u.state[b_name(module)] for w, u in zip(weights_of(updates), updates, strict=True))
    state = merged("fedsvd", round_.global_state, updates, round_.config).state
    expected = mean_B @ round_.global_state[a_name(module)]
    torch.testing.assert_close(state[b_name(module)] @ state[a_name(module)], expected)
