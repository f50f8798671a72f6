import pytest
import torch

from peft_ravan.tuner.bases import BasesShape, make_bases


SHAPE = BasesShape(d_in=48, d_out=40, num_heads=3, r=8)


def test_gram_schmidt_is_orthonormal_over_all_heads():
    basis_A, basis_B = make_bases("gram_schmidt", SHAPE, seed=0, target_name="layer")
    assert basis_A.shape == (24, 48) and basis_B.shape == (40, 24)
    torch.testing.assert_close(basis_A @ basis_A.T, torch.eye(24), atol=1e-6, rtol=0)
    torch.testing.assert_close(basis_B.T @ basis_B, torch.eye(24), atol=1e-6, rtol=0)


def test_gram_schmidt_update_has_rank_h_times_r():
    basis_A, basis_B = make_bases("gram_schmidt", SHAPE, seed=0, target_name="layer")
    cores = torch.randn(3, 8, 8)
    assert torch.linalg.matrix_rank(basis_B @ torch.block_diag(*cores) @ basis_A) == 24


def test_normal_bases_have_rows_and_columns_of_norm_one():
    shape = BasesShape(d_in=1000, d_out=500, num_heads=4, r=10)
    basis_A, basis_B = make_bases("normal", shape, seed=0, target_name="layer")
    # a peer draws them with variance 1: norms of 32 and 22 here
    assert basis_A.norm(dim=1).mean().item() == pytest.approx(1, abs=0.02)
    assert basis_B.norm(dim=0).mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("init_bases", ["gram_schmidt", "normal"])
def test_seed_and_target_name_determine_the_bases(init_bases):
    def bases(seed, name):
        return torch.cat([tensor.flatten() for tensor in make_bases(init_bases, SHAPE, seed, name)])

    first = bases(0, "layers.0.q_proj")
    torch.manual_seed(99)  # the global generator has no part in it
    assert torch.equal(bases(0, "layers.0.q_proj"), first)
    assert not torch.allclose(bases(1, "layers.0.q_proj"), first)
    assert not torch.allclose(bases(0, "layers.1.q_proj"), first)


def test_bases_do_not_disturb_the_global_random_state():
    state = torch.get_rng_state()
    make_bases("gram_schmidt", SHAPE, seed=0, target_name="layer")
    assert torch.equal(torch.get_rng_state(), state)


def test_bases_are_made_on_the_cpu_under_another_default_device():
    with torch.device("meta"):
        basis_A, _ = make_bases("gram_schmidt", SHAPE, seed=0, target_name="layer")
    assert basis_A.device.type == "cpu"


def test_gram_schmidt_that_does_not_fit_names_the_three_numbers():
    message = r"'layers.0.v' num_heads \* r = 4 \* 16 = 64, d_in = 48 and d_out = 80"
    with pytest.raises(ValueError, match=message):
        make_bases("gram_schmidt", BasesShape(d_in=48, d_out=80, num_heads=4, r=16), 0, "layers.0.v")
