"""PEFT's enum of methods is closed. These tests cover what the rest of the ecosystem reads from a member."""

import importlib
import pickle

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_ravan
from peft_ravan import RavanConfig, RavanModel
from peft_ravan.tuner.registration import ensure_peft_type, register

from ..forked import run_clean


def test_member_behaves_like_any_other():
    member = PeftType.RAVAN
    assert member is PeftType("RAVAN") is PeftType["RAVAN"]
    assert member in list(PeftType) and "RAVAN" in list(PeftType)
    assert (member.name, member.value, member == "RAVAN") == ("RAVAN", "RAVAN", True)
    assert str(member) == "PeftType.RAVAN"
    assert hash(member) == hash(PeftType("RAVAN"))
    assert pickle.loads(pickle.dumps(member)) is member


def test_mappings_hold_the_classes():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RAVAN] is RavanConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RAVAN] is RavanModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.RAVAN] == "ravan_"


def test_registering_again_changes_nothing(recwarn):
    members = list(PeftType)
    assert ensure_peft_type() is PeftType.RAVAN
    register(RavanConfig, RavanModel)
    importlib.reload(peft_ravan)
    assert list(PeftType) == members
    assert not [warning for warning in recwarn if "peft_ravan" in str(warning.message)]


def test_works_when_peft_was_imported_long_before(tmp_path):
    code = (
        "import peft, transformers; from peft import PeftType; n = len(PeftType)\n"
        "import peft_ravan\n"
        "assert len(PeftType) == n + 1 and peft.PeftType.RAVAN.value == 'RAVAN'"
    )
    assert run_clean(code, tmp_path) == (0, "")


def test_survives_a_peft_that_ships_its_own_ravan(tmp_path):
    # a process plays the PEFT of the future: its enum has the member and its mappings a foreign class
    code = (
        "import sys; sys.modules['flax'] = None\n"
        "from peft import LoraConfig, PeftType; from peft.tuners.lora import LoraModel\n"
        "from peft.mapping import *\n"
        "import importlib.util, warnings\n"
        "spec = importlib.util.find_spec('peft_ravan')\n"
        "reg = importlib.util.spec_from_file_location('reg', spec.submodule_search_locations[0] + '/tuner/registration.py')\n"
        "module = importlib.util.module_from_spec(reg); reg.loader.exec_module(module)\n"
        "PEFT_TYPE_TO_CONFIG_MAPPING[module.ensure_peft_type()] = LoraConfig\n"
        "PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RAVAN] = LoraModel\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import peft_ravan\n"
        "assert any(\"already has a method called 'ravan'\" in str(w.message) for w in caught)\n"
        "assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RAVAN] is peft_ravan.RavanConfig\n"
        "assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RAVAN] is peft_ravan.RavanModel\n"
    )
    assert run_clean(code, tmp_path) == (0, "")


def test_config_round_trips_through_a_folder(tmp_path):
    config = RavanConfig(
        r=7, num_heads=3, target_modules=["q_proj"], projection_seed=11, task_type="CAUSAL_LM", train_scaling=False
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is RavanConfig
    assert loaded.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"r": 0}, "`r` must be an integer of 1 or more, got 0"),
        ({"num_heads": 2.5}, "`num_heads` must be an integer of 1 or more, got 2.5"),
        ({"ravan_dropout": 1.0}, "`ravan_dropout` must be at least 0 and below 1, got 1.0"),
        ({"bias": "lora_only"}, "`bias` must be 'none', 'all' or 'ravan_only', got 'lora_only'"),
        ({"init_bases": "svd"}, "`init_bases` must be one of .*, got 'svd'"),
        ({"target_modules": "q|v", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used when"),
        ({"layers_pattern": "h"}, "`layers_to_transform` must also be specified"),
    ],
)
def test_config_errors_name_the_rule_and_the_value(fields, message):
    with pytest.raises(ValueError, match=message):
        RavanConfig(**fields)
