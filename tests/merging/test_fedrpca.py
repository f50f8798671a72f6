import pytest
import torch

from peft_ravan.merging import ClientUpdate, merge


CORE = "model.q.ravan_H"
LORA_A, LORA_B = "model.q.lora_A.weight", "model.q.lora_B.weight"
HEAD = "model.classifier.weight"


def planted_updates(
    num_clients: int = 40, shift: float = 0.0
) -> tuple[list[ClientUpdate], torch.Tensor, torch.Tensor]:
    """Clients with a common direction and a few entries of their own. Also returns mean(L) and mean(S)."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(2000, generator=generator)
    strength = 1 + 0.2 * torch.randn(num_clients, generator=generator)
    L = common[:, None] * strength
    S = torch.where(torch.rand(L.shape, generator=generator) < 0.03, 5.0, 0.0)
    num_examples = torch.randint(1, 50, (num_clients,), generator=generator)
    updates = [
        ClientUpdate({LORA_A: (L + S)[:, c].reshape(4, 500) + shift}, int(num_examples[c])) for c in range(num_clients)
    ]
    weights = num_examples / num_examples.sum()
    return updates, L @ weights, S @ weights


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_the_sparse_part_is_amplified_and_the_common_part_is_not(shift):
    # the global state is at `shift`: the merge acts on update minus global
    updates, mean_L, mean_S = planted_updates(shift=shift)
    global_state = {LORA_A: torch.full((4, 500), shift)}
    result = merge(global_state, updates, "fedrpca", beta=3.0)
    merged = (result.state[LORA_A] - shift).flatten()
    torch.testing.assert_close(merged, mean_L + 3 * mean_S, atol=1e-3, rtol=1e-3)
    figures = result.diagnostics["matrices"][LORA_A]
    assert figures["rank"] == 1 and figures["converged"]
    assert figures["sparsity"] == pytest.approx(0.03, abs=0.005)


def test_adaptive_beta_is_one_over_the_sparse_share():
    updates, mean_L, mean_S = planted_updates()
    share = (mean_S.norm() / (mean_L + mean_S).norm()).item()
    result = merge({LORA_A: torch.zeros(4, 500)}, updates, "fedrpca", beta="adaptive", beta_max=100.0)
    figures = result.diagnostics["matrices"][LORA_A]
    assert figures["sparse_share"] == pytest.approx(share, rel=1e-3)
    assert figures["beta"] == pytest.approx(1 / share, rel=1e-3)
    torch.testing.assert_close(result.state[LORA_A].flatten(), mean_L + mean_S / share, atol=1e-3, rtol=1e-3)


def test_adaptive_beta_is_kept_below_beta_max():
    updates, *_ = planted_updates()
    result = merge({LORA_A: torch.zeros(4, 500)}, updates, "fedrpca", beta_max=1.5)
    assert result.diagnostics["matrices"][LORA_A]["beta"] == 1.5


def test_beta_one_is_fedavg_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    shapes = {LORA_A: (4, 30), LORA_B: (20, 4), CORE: (3, 5, 5), HEAD: (7,)}
    global_state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    updates = [
        ClientUpdate({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, c + 1)
        for c in range(6)
    ]
    fedavg = merge(global_state, updates, "fedavg").state
    fedrpca = merge(global_state, updates, "fedrpca", beta=1).state
    assert all(torch.equal(fedavg[name], fedrpca[name]) for name in shapes)


def test_heads_are_decomposed_one_by_one_and_the_task_head_is_averaged():
    updates = [ClientUpdate({CORE: torch.randn(3, 4, 4), HEAD: torch.full((2,), float(c))}, 1) for c in range(5)]
    result = merge({CORE: torch.zeros(3, 4, 4), HEAD: torch.zeros(2)}, updates, "fedrpca")
    assert list(result.diagnostics["matrices"]) == [f"{CORE}[{i}]" for i in range(3)]
    assert result.state[HEAD].tolist() == [2.0, 2.0]


def test_a_head_counts_only_the_clients_that_trained_it():
    masks = [torch.tensor([True, False, False]), torch.tensor([True, True, False]), torch.tensor([True, False, False])]
    updates = [ClientUpdate({CORE: torch.randn(int(m.sum()), 4, 4)}, 1, "", {CORE: m}) for m in masks]
    global_state = {CORE: torch.full((3, 4, 4), 7.0)}
    result = merge(global_state, updates, "fedrpca")
    matrices = result.diagnostics["matrices"]
    assert [matrices[f"{CORE}[{i}]"]["num_clients"] for i in range(3)] == [3, 1, 0]
    assert torch.equal(result.state[CORE][1], updates[1].state[CORE][1])  # one client: its own
    assert torch.equal(result.state[CORE][2], global_state[CORE][2])  # nobody: unchanged


def test_clients_that_did_not_move_leave_the_global_state():
    global_state = {LORA_A: torch.randn(4, 30)}
    result = merge(global_state, [ClientUpdate(global_state, 1) for _ in range(4)], "fedrpca")
    torch.testing.assert_close(result.state[LORA_A], global_state[LORA_A])


def test_one_client_that_did_not_move_gives_a_sensible_merge():
    updates, *_ = planted_updates()
    updates[3] = ClientUpdate({LORA_A: torch.zeros(4, 500)}, 10)
    result = merge({LORA_A: torch.zeros(4, 500)}, updates, "fedrpca", beta=2.0)
    assert torch.isfinite(result.state[LORA_A]).all()
    assert result.diagnostics["matrices"][LORA_A]["converged"]


def test_a_matrix_that_does_not_converge_is_averaged_with_a_warning():
    updates, *_ = planted_updates()
    global_state = {LORA_A: torch.zeros(4, 500)}
    with pytest.warns(UserWarning, match="did not converge in 2 iterations for 1 of 1 matrices.*Raise `max_iter`"):
        result = merge(global_state, updates, "fedrpca", beta=3.0, max_iter=2)
    assert torch.equal(result.state[LORA_A], merge(global_state, updates, "fedavg").state[LORA_A])
    assert result.diagnostics["matrices"][LORA_A]["beta"] == 1.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": "auto"}, "`beta` must be a number of 0 or more, or 'adaptive', got 'auto'"),
        ({"beta": -1.0}, "`beta` must be a number of 0 or more, or 'adaptive', got -1.0"),
        ({"beta_max": 0.5}, "`beta_max` must be 1 or more, got 0.5"),
        ({"lambda_": 0.0}, "`lambda_` must be above 0, got 0.0"),
        ({"tol": 0.0}, "`tol` must be above 0"),
        ({"max_iter": 0}, "`max_iter` must be above 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        merge({LORA_A: torch.zeros(2, 2)}, [ClientUpdate({LORA_A: torch.ones(2, 2)}, 1)], "fedrpca", **options)
