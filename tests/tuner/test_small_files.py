"""Adapters saved without their bases: what is in the file, that it loads anywhere, and that other bases are refused."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from peft_ravan import RavanConfig, bases_fingerprint, different_bases, to_lora
from peft_ravan.tuner.bases import BASES, BasesShape, make_bases
from peft_ravan.tuner.fingerprint import TOLERANCE, fingerprint_distance, make_fingerprint

from ..conftest import randomize_adapter, tiny_llama
from .small_files import FOLDER, KINDS, make_base, make_input


# what `small_files.py` printed when it wrote the files
WRITTEN = {
    "gram_schmidt": [0.2165902554988861, -0.04261321574449539, 0.10555069893598557, -0.04092085361480713],
    "normal": [-0.3879648447036743, 0.04522734880447388, -0.010269932448863983, 0.0520537793636322],
    "constant": [0.8573734760284424, -0.1270003318786621, -1.1967710256576538, -0.18024949729442596],
    "shared": [-0.380607008934021, -0.25877317786216736, 0.1153658777475357, 0.22207841277122498],
    "weight_svd": [-0.6223272085189819, 0.3709840178489685, 0.10773400962352753, 0.4608690142631531],
}
SHAPE = BasesShape(d_in=48, d_out=40, num_heads=3, r=8)


def small(seed: int = 0, **kwargs) -> RavanConfig:
    fields = {"r": 4, "num_heads": 3, "task_type": "CAUSAL_LM", "save_projection": False}
    return RavanConfig(**{**fields, "projection_seed": seed, **kwargs})


def adapted(**kwargs) -> PeftModel:
    model = get_peft_model(tiny_llama(), small(**kwargs)).eval()
    randomize_adapter(model, scale=0.3)
    return model


def cores(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.flatten() for name, p in model.named_parameters() if "ravan_H" in name])


@pytest.mark.parametrize("init_bases", KINDS)
def test_files_that_were_written_once_are_still_read(init_bases):
    model = PeftModel.from_pretrained(make_base(), FOLDER / init_bases).eval()
    output = model(make_input())[0, :4]
    torch.testing.assert_close(output, torch.tensor(WRITTEN[init_bases]), atol=1e-4, rtol=1e-4)


def test_every_kind_that_can_be_small_has_a_file():
    assert {name for name, kind in BASES.items() if kind.from_matrix != "gradient"} == set(KINDS) == set(WRITTEN)


@pytest.mark.parametrize("init_bases", KINDS)
def test_a_file_with_another_seed_or_base_model_is_refused(init_bases, tmp_path):
    shutil.copytree(FOLDER / init_bases, tmp_path, dirs_exist_ok=True)
    base = make_base()
    if init_bases == "weight_svd":
        base[1].weight.data.copy_(base[1].weight.flip(0))
    else:
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "projection_seed": 8}))
        with pytest.raises(ValueError, match="The bases of '0', made again, differ"):
            to_lora(tmp_path, tmp_path / "lora")
    with pytest.raises(ValueError, match=f"was trained on other bases .*, where {TOLERANCE} is allowed"):
        PeftModel.from_pretrained(base, tmp_path)


def test_bases_of_the_weight_are_not_made_again_without_the_model(tmp_path):
    with pytest.raises(ValueError, match="'weight_svd'` they are made from the base model. Load the adapter into"):
        to_lora(FOLDER / "weight_svd", tmp_path / "lora")
    model = PeftModel.from_pretrained(make_base(), FOLDER / "weight_svd").eval()
    to_lora(model, tmp_path / "lora")
    twin = PeftModel.from_pretrained(make_base(), tmp_path / "lora").eval()
    torch.testing.assert_close(twin(make_input()), model(make_input()), atol=1e-5, rtol=0)


def test_tensors_of_a_target():
    checkpoint = get_peft_model_state_dict(adapted())
    shapes = {name.rsplit(".", 1)[1]: tuple(tensor.shape) for name, tensor in checkpoint.items()}
    assert shapes == {"ravan_H": (3, 4, 4), "ravan_s": (3,), "ravan_fingerprint": (3, 8), "ravan_layer": (3,)}


def test_size_of_the_file(tmp_path):
    sizes = {}
    for save_projection in (True, False):
        config = RavanConfig(r=55, num_heads=4, target_modules=["0"], save_projection=save_projection)
        get_peft_model(nn.Sequential(nn.Linear(768, 768)), config).save_pretrained(tmp_path)
        sizes[save_projection] = (tmp_path / "adapter_model.safetensors").stat().st_size
    cores_alone = 4 * 4 * (55**2 + 1)
    assert sizes[False] < 1.02 * cores_alone
    assert sizes[True] > 28 * sizes[False]


def test_a_state_of_other_bases_is_refused_before_anything_is_set():
    model, other = adapted(), adapted(seed=1)
    before = cores(model)
    with pytest.raises(ValueError, match="at 'model.layers.0.self_attn.q_proj' and 3 more targets their fingerprints"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert torch.equal(cores(model), before)
    set_peft_model_state_dict(model, {k: 2 * v for k, v in get_peft_model_state_dict(model).items() if "ravan_H" in k})
    assert torch.equal(cores(model), 2 * before)


def test_a_state_with_bases_is_compared_where_bases_are_not_loaded():
    with_bases = {seed: adapted(seed=seed, save_projection=True) for seed in (0, 1)}
    model = adapted()
    set_peft_model_state_dict(model, get_peft_model_state_dict(with_bases[0]))
    with pytest.raises(ValueError, match="was trained on other bases"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(with_bases[1]))
    # and with saved bases, those of the state are loaded
    set_peft_model_state_dict(with_bases[0], get_peft_model_state_dict(with_bases[1]))
    assert not different_bases(bases_fingerprint(with_bases[0]), bases_fingerprint(with_bases[1]))


def test_a_file_without_bases_for_a_configuration_with_them(tmp_path):
    adapted().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "save_projection": True}))
    with pytest.raises(ValueError, match="are to be loaded, since `save_projection=True`"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True)
    PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize("how", ["from_pretrained", "low_cpu_mem_usage", "second adapter", "transformers", "bfloat16"])
def test_ways_to_load(input_ids, tmp_path, how):
    model = adapted()
    model.save_pretrained(tmp_path)
    atol = 1e-6
    if how == "transformers":
        loaded = tiny_llama()
        loaded.load_adapter(tmp_path)
    elif how == "second adapter":
        loaded = adapted(seed=3)
        loaded.load_adapter(tmp_path, adapter_name="loaded")
        loaded.set_adapter("loaded")
    elif how == "bfloat16":
        # bases that are made again are rounded to the dtype of the adapter
        loaded = PeftModel.from_pretrained(
            tiny_llama().to(torch.bfloat16), tmp_path, autocast_adapter_dtype=False
        ).float()
        atol = 0.05
    else:
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=how == "low_cpu_mem_usage")
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(input_ids).logits, model(input_ids).logits, atol=atol, rtol=0)


def test_fingerprints_of_models_and_states():
    fingerprints = [
        bases_fingerprint(source)
        for model in (adapted(), adapted(save_projection=True))
        for source in (model, get_peft_model_state_dict(model))
    ]
    assert list(fingerprints[0]) == [f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qv"]
    for fingerprint in fingerprints:
        assert not different_bases(fingerprints[0], fingerprint)
    other = bases_fingerprint(adapted(seed=1))
    assert different_bases(fingerprints[0], other) == list(other)
    fewer = bases_fingerprint(adapted(target_modules=["q_proj"]))
    assert different_bases(fewer, other) == list(fewer) + [name for name in other if name not in fewer]
    assert bases_fingerprint({"model.lora_A.weight": torch.ones(1, 1)}) == {}


@pytest.mark.parametrize("init_bases", ["gram_schmidt", "normal", "constant", "shared"])
def test_rounding_does_not_change_a_fingerprint(init_bases):
    basis_A, basis_B = make_bases(init_bases, SHAPE, seed=0, target_name="layer")
    fingerprint = make_fingerprint(basis_A, basis_B, 3)
    assert 0.3 < fingerprint.square().mean().sqrt() < 3
    for rounded in (
        (basis_A.bfloat16(), basis_B.bfloat16()),
        (basis_A.half(), basis_B),
        (basis_A * (1 + 1e-6), basis_B - 1e-7),
    ):
        assert fingerprint_distance(make_fingerprint(*rounded, 3), fingerprint) < TOLERANCE / 2


def swapped_heads(basis):
    return basis.reshape(3, 8, -1)[[1, 0, 2]].flatten(0, 1)


def swapped_rows(basis):
    return basis[[0, 1, 3, 2, *range(4, 24)]]


def one_other_sign(basis):
    return basis * torch.where(torch.arange(24) == 13, -1.0, 1.0)[:, None]


def other_scale(basis):
    return 1.1 * basis


@pytest.mark.parametrize("change", [swapped_heads, swapped_rows, one_other_sign, other_scale])
@pytest.mark.parametrize("seed", range(3))
def test_what_changes_the_output_changes_a_fingerprint(change, seed):
    basis_A, basis_B = make_bases("gram_schmidt", SHAPE, seed=seed, target_name="layer")
    fingerprint = make_fingerprint(basis_A, basis_B, 3)
    for bases in ((change(basis_A), basis_B), (basis_A, change(basis_B.T).T)):
        assert fingerprint_distance(make_fingerprint(*bases, 3), fingerprint) > 3 * TOLERANCE


def test_fingerprints_of_different_seeds_are_all_different():
    shape = BasesShape(d_in=8, d_out=8, num_heads=1, r=2)  # the fewest numbers to tell bases apart by
    fingerprints = [make_fingerprint(*make_bases("gram_schmidt", shape, seed, "layer"), 1) for seed in range(60)]
    distances = [fingerprint_distance(a, b) for i, a in enumerate(fingerprints) for b in fingerprints[:i]]
    assert min(distances) > 3 * TOLERANCE


def test_a_broken_basis_is_no_match():
    basis_A, basis_B = make_bases("gram_schmidt", SHAPE, seed=0, target_name="layer")
    fingerprint = make_fingerprint(basis_A, basis_B, 3)
    assert fingerprint_distance(make_fingerprint(basis_A * float("nan"), basis_B, 3), fingerprint) == float("inf")
    assert fingerprint_distance(fingerprint[:2], fingerprint) == float("inf")


def test_what_is_sent_has_no_records():
    from peft_ravan.tuner.state import checkpoint_state, exchange_state

    checkpoint = get_peft_model_state_dict(adapted())
    state = exchange_state(checkpoint)
    assert {name.rsplit(".", 1)[1] for name in state} == {"ravan_H"}
    assert list(checkpoint_state(state, checkpoint)) == list(checkpoint)


def test_a_saved_file_is_what_the_state_is(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    saved, state = load_file(tmp_path / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in saved)
