"""
Server optimizers after methods that recompute LoRA's A and B from their product: over many rounds, and on embeddings.

Each client fits a linear map with A and B by least squares.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from peft_ravan.merging import MERGE_METHODS, SERVER_OPTIMIZERS, ServerStep, merge
from peft_ravan.merging.lora import LoraTarget
from peft_ravan.merging.truncation import aligned_factors, orthonormal_factors

from .reference import State, client, few, normal


METHODS = {
    "fedsvd": {},
    "flexlora": {},
    "median": {},
    "trimmed_mean": {},
    "krum": {},
    "multi_krum": {},
    "fedrpca": {"lora": "products"},
}
LINEAR = LoraTarget("layer", "layer.lora_A.weight", "layer.lora_B.weight")
EMBEDDING = LoraTarget("layer", "layer.lora_embedding_A", "layer.lora_embedding_B")
KINDS = {"linear": LINEAR, "embedding": EMBEDDING}
PLAIN = ServerStep("fedavgm", {"momentum": 0.0, "learning_rate": 1.0})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def product(target: LoraTarget, state: State) -> torch.Tensor:
    B, A = target.factors(state)
    return B.double() @ A.double()


def lora_start(target: LoraTarget, d_out: int, d_in: int, r: int, dtype=torch.float32, seed: int = 0) -> State:
    """A and B with LoRA's initial values."""
    B, A = torch.zeros(d_out, r), torch.zeros(r, d_in)
    if target.is_embedding:
        B.normal_(generator=seeded(seed))
    else:
        A.uniform_(-(d_in**-0.5), d_in**-0.5, generator=seeded(seed))
    return {target.A_name: A.to(dtype), target.B_name: B.to(dtype)}


@dataclass
class LeastSquares:
    """The maps that clients fit, `[C, d_out, d_in]`. Each is given at some inputs, one token each or dense."""

    target: LoraTarget
    num_clients: int = 6
    d_out: int = 12
    d_in: int = 16
    r: int = 4
    adam: bool = False

    def __post_init__(self):
        generator, shape = seeded(1), (self.num_clients, self.d_out, self.d_in)
        common = normal(generator, self.d_out, 4) @ normal(generator, 4, self.d_in)
        self.maps = ((common / 2 + 0.3 * normal(generator, *shape)) / self.d_in**0.5).float()
        inputs = normal(generator, self.num_clients, 40, self.d_in).float()
        self.gram = inputs.transpose(1, 2) @ inputs / 40  # [C, d_in, d_in]

    def loss(self, state: State) -> float:
        error = product(self.target, state).float() - self.maps
        return ((error @ self.gram) * error).sum(dim=(1, 2)).mean().item()

    def train(self, state: State, frozen: tuple[str, ...] = ()) -> list[State]:
        """Train each client for 20 steps from the state."""
        factors = [factor.expand(self.num_clients, -1, -1).clone() for factor in self.target.factors(state)]
        names = (self.target.B_name, self.target.A_name)
        trained = [
            factor.requires_grad_()
            for name, factor in zip(names, factors, strict=True)
            if not any(part in name for part in frozen)
        ]
        # with gradient descent a rotation of A and B makes no difference
        rate = 0.01 if self.adam else 0.003 if self.target.is_embedding else 0.03
        optimizer = (torch.optim.Adam if self.adam else torch.optim.SGD)(trained, lr=rate)
        for _ in range(20):
            error = factors[0] @ factors[1] - self.maps
            optimizer.zero_grad()
            ((error @ self.gram) * error).sum().backward()
            optimizer.step()
        states = zip(*(factor.detach() for factor in factors), strict=True)
        return [self.target.as_state(B, A, like=state) for B, A in states]

    def rounds(self, method: str, num_rounds: int, step: ServerStep | None = None) -> Iterator[State]:
        """The global state after each round."""
        step = step or ServerStep()
        state, server_state = lora_start(self.target, self.d_out, self.d_in, self.r), {}
        for number in range(1, num_rounds + 1):
            trained = self.train(state, MERGE_METHODS[method].frozen_in(number))
            updates = [client(own, 1, index) for index, own in enumerate(trained)]
            result = merge(state, updates, method, server_step=replace(step, state=server_state), **METHODS[method])
            state, server_state = result.state, result.server_state
            yield state


def test_all_methods_that_decompose_are_here():
    assert set(METHODS) == {name for name, method in MERGE_METHODS.items() if method.decomposes}


# ---------------------------------------------------------------- over many rounds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_without_momentum_is_the_plain_merge_round_after_round(method, kind):
    problem = LeastSquares(KINDS[kind])
    num_rounds = 15
    plain = list(problem.rounds(method, num_rounds))
    stepped = list(problem.rounds(method, num_rounds, PLAIN))
    # what is frozen in every round bounds what can be learned
    share = 0.9 if MERGE_METHODS[method].frozen_in(1) else 0.6
    assert problem.loss(plain[-1]) < share * problem.loss(lora_start(KINDS[kind], 12, 16, 4))
    for one, other in zip(plain, stepped, strict=True):
        expected = product(problem.target, one)
        assert (product(problem.target, other) - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "method, optimizer, options",
    [
        ("flexlora", "fedavgm", {"momentum": 0.0}),
        ("flexlora", "fedavgm", {}),
        ("flexlora", "fedadam", {"learning_rate": 0.05}),
        ("flexlora", "fedyogi", {"learning_rate": 0.05}),
        ("median", "fedavgm", {}),
        ("fedrpca", "fedavgm", {"momentum": 0.5}),
    ],
)
def test_many_rounds_are_stable(method, optimizer, options, kind):
    problem = LeastSquares(KINDS[kind], adam=True)
    num_rounds = 40 if method != "fedrpca" else 20
    states = list(problem.rounds(method, num_rounds, ServerStep(optimizer, options)))
    losses = [problem.loss(lora_start(problem.target, 12, 16, 4)), *map(problem.loss, states)]
    # what the best map of rank 4 leaves is a sixteenth; momentum goes too far at first
    assert max(losses) == losses[0] and losses[-1] < losses[0] / 10
    for state in states:
        # the factor that LoRA starts at random neither shrinks nor grows
        B, A = problem.target.factors(state)
        gram = A @ A.T if kind == "linear" else B.T @ B / len(B)
        torch.testing.assert_close(gram, torch.eye(4))


@pytest.mark.parametrize("optimizer", SERVER_OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_clients_that_did_not_move_leave_the_product(method, kind, optimizer):
    target = KINDS[kind]
    moved = {
        name: torch.randn(tensor.shape, generator=seeded()) for name, tensor in lora_start(target, 7, 9, 3).items()
    }
    for state in (moved, lora_start(target, 7, 9, 3)):
        updates = [client(state, 1, index) for index in range(3)]
        result = merge(state, updates, method, server_step=ServerStep(optimizer), **METHODS[method])
        torch.testing.assert_close(product(target, result.state), product(target, state), atol=1e-5, rtol=1e-5)


def test_a_step_beyond_the_dtype_is_reported_by_name():
    start = lora_start(LINEAR, 7, 9, 3)
    step = ServerStep("fedavgm", {"learning_rate": 1e300})
    with pytest.raises(
        ValueError, match="Tensor 'layer.lora_A.weight': the merge has made entries that are NaN or inf"
    ):
        merge(start, [client(start)], "flexlora", server_step=step)


def test_half_precision_loses_no_more_than_the_rounding_of_a_and_b():
    problem = LeastSquares(LINEAR)
    *_, state = problem.rounds("flexlora", 3)
    updates = [
        client({name: t.bfloat16() for name, t in own.items()}, 1, i) for i, own in enumerate(problem.train(state))
    ]
    state = {name: tensor.bfloat16() for name, tensor in state.items()}
    plain, stepped = (merge(state, updates, "flexlora", server_step=step).state for step in (None, PLAIN))
    assert all(tensor.dtype == torch.bfloat16 for tensor in stepped.values())
    expected = product(LINEAR, plain)
    assert (product(LINEAR, stepped) - expected).norm() <= 2**-7 * expected.norm()


# ---------------------------------------------------------------- the factors


CASES = dict(seed=st.integers(0, 2**20), kind=st.sampled_from(sorted(KINDS)))


def frame(target: LoraTarget, state: State) -> torch.Tensor:
    """The factor with random initial values in LoRA, `[r, d]`."""
    B, A = target.factors(state)
    return B.T if target.is_embedding else A


def random_state(target: LoraTarget, generator: torch.Generator, d_out: int, d_in: int, r: int) -> State:
    return {target.A_name: normal(generator, r, d_in), target.B_name: normal(generator, d_out, r)}


@few
@given(**CASES, d_out=st.integers(1, 9), d_in=st.integers(1, 9), r=st.integers(1, 6))
def test_aligned_factors_keep_the_product(seed, kind, d_out, d_in, r):
    target, generator = KINDS[kind], seeded(seed)
    state, start = (random_state(target, generator, d_out, d_in, r) for _ in range(2))
    aligned = aligned_factors(target, state, start)
    torch.testing.assert_close(product(target, aligned), product(target, state))
    # they are what a step of an optimizer keeps, and nothing else is near
    again = orthonormal_factors(target, aligned, start)
    assert all(torch.allclose(again[name], tensor) for name, tensor in aligned.items())


@few
@given(**CASES)
def test_aligned_factors_are_the_nearest_rotation_of_both(seed, kind):
    target, generator = KINDS[kind], seeded(seed)
    state, start = (random_state(target, generator, 6, 7, 3) for _ in range(2))
    aligned = aligned_factors(target, state, start)

    def distance(rotation: torch.Tensor) -> float:
        B, A = target.factors(aligned)
        global_B, global_A = target.factors(start)
        return ((B @ rotation.T - global_B).square().sum() + (rotation @ A - global_A).square().sum()).item()

    for _ in range(20):
        rotation = torch.linalg.qr(normal(generator, 3, 3)).Q
        small = torch.linalg.matrix_exp(0.01 * (rotation - rotation.T))
        assert distance(torch.eye(3, dtype=torch.float64)) <= min(distance(rotation), distance(small))


@few
@given(**CASES, rank=st.integers(0, 3))
def test_directions_that_the_product_leaves_over_come_from_the_random_factor(seed, kind, rank):
    target, generator = KINDS[kind], seeded(seed)
    start = lora_start(target, 20, 30, 4, torch.float64, seed)
    # the product has the directions of the first rows of the random factor, and the clients have turned them
    B, A = target.factors(start)
    if target.is_embedding:
        A = torch.cat([normal(generator, rank, 30), torch.zeros(4 - rank, 30, dtype=torch.float64)])
    else:
        B = torch.cat([normal(generator, 20, rank), torch.zeros(20, 4 - rank, dtype=torch.float64)], dim=1)
    turn = torch.linalg.qr(normal(generator, 4, 4)).Q
    moved = target.as_state(B @ turn.T, turn @ A, like=start)
    for state in (
        merge(start, [client(moved)], "flexlora").state,
        merge(start, [client(moved)], "flexlora", server_step=PLAIN).state,
        aligned_factors(target, moved, start),
    ):
        torch.testing.assert_close(product(target, state), product(target, moved))
        # all that the random factor has spanned before, it spans now, and as large as LoRA makes it
        directions, before = frame(target, state), frame(target, start)
        size = 20.0 if target.is_embedding else 1.0
        torch.testing.assert_close(directions @ directions.T, size * torch.eye(4, dtype=torch.float64))
        torch.testing.assert_close(before @ directions.T @ directions / size, before)
    # sorted by singular value, the other factor has zeros for what is left over
    B, A = target.factors(merge(start, [client(moved)], "flexlora").state)
    other = A.T if target.is_embedding else B
    assert not other[:, rank:].any() and all(other[:, column].any() for column in range(rank))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero", ["A", "B", "both"])
def test_no_product_is_left_without_directions(kind, zero):
    # no adapter of LoRA starts so, but for one of the three on each kind of layer
    target = KINDS[kind]
    start = random_state(target, seeded(), 5, 6, 3)
    for name, part in ((target.A_name, "A"), (target.B_name, "B")):
        if zero in (part, "both"):
            start[name].zero_()
    for step in (None, PLAIN, ServerStep("fedadam")):
        state = merge(start, [client(start)], "flexlora", server_step=step).state
        assert not product(target, state).any()
        assert torch.linalg.matrix_rank(frame(target, state)) == 3


def test_kernels_of_convolutions_keep_their_shape():
    generator = seeded()
    start = {LINEAR.A_name: normal(generator, 2, 3, 5, 5), LINEAR.B_name: normal(generator, 6, 2, 1, 1)}
    moved = {name: tensor + 0.1 * normal(generator, *tensor.shape) for name, tensor in start.items()}
    state = merge(start, [client(moved)], "flexlora", server_step=PLAIN).state
    assert {name: tensor.shape for name, tensor in state.items()} == {name: t.shape for name, t in start.items()}
    torch.testing.assert_close(product(LINEAR, state), product(LINEAR, moved))
