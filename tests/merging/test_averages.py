"""FedAvg and Ravan's average: explicit numbers, and agreement with the mean of the dense weights."""

import hypothesis.strategies as st
import torch
from hypothesis import given

from peft_ravan.merging import ClientUpdate, merge
from peft_ravan.tuner.bases import BasesShape, make_bases
from peft_ravan.tuner.functional import delta_weight

from ..properties import examples


CORE = "model.q.ravan_H"


def head(value: float) -> torch.Tensor:
    return torch.full((1, 1), value)


def update(num_examples: int, heads: dict[int, float], num_heads: int = 3, client_id: str = "") -> ClientUpdate:
    """A client that trained some heads, each a 1 x 1 matrix."""
    mask = torch.tensor([index in heads for index in range(num_heads)])
    products = torch.stack([head(heads[index]) for index in sorted(heads)]) if heads else torch.empty(0, 1, 1)
    return ClientUpdate({CORE: products}, num_examples, client_id, {CORE: mask})


def test_means_are_weighted_by_examples():
    updates = [ClientUpdate({"w": torch.tensor([1.0, 0.0])}, 30), ClientUpdate({"w": torch.tensor([5.0, 4.0])}, 10)]
    for method in ("fedavg", "ravan"):
        assert merge({"w": torch.zeros(2)}, updates, method).state["w"].tolist() == [2.0, 1.0]


def test_each_head_is_averaged_over_the_clients_that_trained_it():
    global_state = {CORE: torch.stack([head(7.0), head(7.0), head(7.0)])}
    updates = [update(10, {0: 1.0}), update(30, {0: 5.0, 1: 2.0}), update(60, {1: 8.0})]
    result = merge(global_state, updates, "ravan")
    # head 0: (10 * 1 + 30 * 5) / 40, head 1: (30 * 2 + 60 * 8) / 90, head 2: nobody trained it
    assert result.state[CORE].flatten().tolist() == [4.0, 6.0, 7.0]
    assert result.diagnostics["clients_per_head"] == {CORE: [2, 2, 0]}


def test_averaging_scaling_and_core_separately_is_something_else():
    # two clients with s H = 2 * 3 and 4 * 1: the mean of the products is 5, the product of the means 6
    updates = [ClientUpdate({CORE: head(2.0 * 3.0)[None]}, 1), ClientUpdate({CORE: head(4.0 * 1.0)[None]}, 1)]
    assert merge({CORE: torch.zeros(1, 1, 1)}, updates).state[CORE].item() == 5.0


def test_one_client_is_copied_bit_for_bit():
    state = {CORE: torch.randn(2, 3, 3), "head": torch.randn(5)}
    for method in ("fedavg", "ravan", "fedrpca"):
        merged = merge(
            {name: torch.randn_like(t) for name, t in state.items()}, [ClientUpdate(state, 17)], method
        ).state
        assert all(torch.equal(merged[name], tensor) for name, tensor in state.items())


# a client: its examples, and which of the two heads it trained
CLIENTS = st.lists(
    st.tuples(st.integers(1, 1000), st.lists(st.booleans(), min_size=2, max_size=2)), min_size=1, max_size=5
)


@examples(50)
@given(clients=CLIENTS, seed=st.integers(0, 2**16), order=st.randoms(use_true_random=False))
def test_ravan_is_the_exact_mean_of_the_dense_weight_updates(clients, seed, order):
    generator = torch.Generator().manual_seed(seed)
    shape = BasesShape(d_in=9, d_out=7, num_heads=2, r=3)
    basis_A, basis_B = make_bases("gram_schmidt", shape, seed, "q")
    global_products = torch.randn(2, 3, 3, generator=generator)
    updates, dense = [], torch.zeros(2, 7, 9, dtype=torch.float64)
    totals = [sum(n for n, mask in clients if mask[i]) for i in range(2)]
    for num_examples, mask in clients:
        H, s = torch.randn(2, 3, 3, generator=generator), torch.randn(2, generator=generator)
        trained = torch.tensor(mask)
        updates.append(ClientUpdate({CORE: (s[:, None, None] * H)[trained]}, num_examples, "", {CORE: trained}))
        for i in trained.nonzero().flatten().tolist():
            only = torch.zeros(2)
            only[i] = s[i]
            dense[i] += num_examples / totals[i] * delta_weight(basis_A, basis_B, H, only).double()
    for i in range(2):
        if not totals[i]:
            only = torch.zeros(2)
            only[i] = 1
            dense[i] = delta_weight(basis_A, basis_B, global_products, only).double()

    order.shuffle(updates)  # the order of the clients is irrelevant
    merged = merge({CORE: global_products}, updates, "ravan").state[CORE]
    weight = delta_weight(basis_A.double(), basis_B.double(), merged.double(), torch.ones(2).double())
    torch.testing.assert_close(weight, dense.sum(0), atol=1e-5, rtol=1e-5)
