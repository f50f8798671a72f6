import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_ravan import RavanConfig
from peft_ravan.tuner.bases import BasesShape, make_bases, scale_of


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


# ---- The scale ----------------------------------------------------------------------


def test_the_scale_is_that_of_the_product():
    basis_A, basis_B = make_bases("gram_schmidt", SHAPE, seed=0, target_name="layer")
    scaled_A, scaled_B = make_bases("gram_schmidt", SHAPE, seed=0, target_name="layer", scale=9.0)
    torch.testing.assert_close(scaled_A, 3 * basis_A)
    torch.testing.assert_close(scaled_B, 3 * basis_B)


def first_step(shape: BasesShape, init_bases: str = "gram_schmidt") -> float:
    """How far the output moves, relative to the input, if every entry of every core moves by 1 along the gradient."""
    basis_A, basis_B = make_bases(init_bases, shape, 0, "layer", scale="lora")
    x, gradient = torch.randn(shape.d_in), torch.randn(shape.d_out)
    moved = torch.zeros(shape.d_out)
    for B_i, A_i in zip(basis_B.split(shape.r, dim=1), basis_A.split(shape.r), strict=True):
        moved += B_i @ torch.outer(B_i.T @ gradient, A_i @ x).sign() @ A_i @ x
    return (moved.norm() / x.norm()).item()


@pytest.mark.parametrize("init_bases", ["gram_schmidt", "normal", "constant", "shared"])
@pytest.mark.parametrize(("r", "num_heads"), [(64, 1), (32, 4), (16, 4), (16, 16)])
def test_a_step_moves_the_output_as_far_with_any_heads(r, num_heads, init_bases):
    step = first_step(BasesShape(d_in=512, d_out=512, num_heads=num_heads, r=r), init_bases)
    assert step == pytest.approx(first_step(BasesShape(512, 512, 4, 32)), rel=0.35)


def test_the_scale_of_the_configuration_is_that_of_the_adapter():
    layers = {}
    for scale in ("lora", "paper", 4.0):
        config = RavanConfig(r=4, num_heads=2, target_modules=["0"], bases_scale=scale)
        layers[scale] = get_peft_model(nn.Sequential(nn.Linear(30, 20)), config).base_model.model[0]
    products = {scale: layer.ravan_B["default"] @ layer.ravan_A["default"] for scale, layer in layers.items()}
    torch.testing.assert_close(products[4.0], 4 * products["paper"])
    expected = scale_of("lora", "gram_schmidt", BasesShape(30, 20, 2, 4))
    torch.testing.assert_close(products["lora"], expected * products["paper"])


def test_a_larger_scale_is_a_larger_learning_rate():
    """With Adam, in which the size of the gradients makes no difference."""
    x, deltas = torch.randn(64, 30), []
    for scale, learning_rate in ((1.0, 0.02), (4.0, 0.005)):
        config = RavanConfig(r=4, num_heads=2, target_modules=["0"], bases_scale=scale)
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(30, 20)), config)
        layer = model.base_model.model[0]
        optimizer = torch.optim.Adam([layer.ravan_H["default"]], lr=learning_rate, eps=1e-30)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        deltas.append(layer.get_delta_weight("default").detach())
    torch.testing.assert_close(*deltas, atol=1e-5, rtol=1e-4)


def test_adapters_of_before_the_scale_have_that_of_the_paper(tmp_path):
    config = RavanConfig(r=4, num_heads=2, target_modules=["0"], bases_scale="paper", save_projection=False)
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(30, 20)), config)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields.pop("bases_scale") == "paper"
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    assert PeftConfig.from_pretrained(tmp_path).bases_scale == "paper"
    torch.manual_seed(0)
    PeftModel.from_pretrained(nn.Sequential(nn.Linear(30, 20)), tmp_path)  # which compares the fingerprints
    assert RavanConfig().bases_scale == "lora"


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), "Lora", True, [1.0]])
def test_scales_that_are_none(scale):
    with pytest.raises(ValueError, match="`bases_scale` must be"):
        RavanConfig(bases_scale=scale)
