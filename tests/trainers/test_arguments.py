import dataclasses
import re

import pytest
from transformers import HfArgumentParser, TrainingArguments

from peft_ravan.trainers import FederatedArguments, FederatedArgumentsMixin


def test_they_are_training_arguments_with_a_constant_rate():
    args = FederatedArguments("out")
    assert isinstance(args, TrainingArguments)
    assert args.lr_scheduler_type == "constant"
    assert args.federated_seed == args.seed == 42
    assert FederatedArguments("out", seed=3).federated_seed == 3
    assert FederatedArguments("out", seed=3, federated_seed=5).federated_seed == 5


def test_every_argument_is_documented():
    documented = set(re.findall(r"^        (\w+) \(", FederatedArgumentsMixin.__doc__, flags=re.MULTILINE))
    own = {field.name for field in dataclasses.fields(FederatedArgumentsMixin)}
    assert documented == own - {field.name for field in dataclasses.fields(TrainingArguments)}


def test_they_can_be_parsed_from_a_command_line():
    line = "--output_dir out --num_rounds 3 --merge_method fedrpca --merge_options".split() + ['{"beta": 2}']
    [args] = HfArgumentParser(FederatedArguments).parse_args_into_dataclasses(line)
    assert (args.num_rounds, args.merge_method, args.merge_options) == (3, "fedrpca", {"beta": 2})


@pytest.mark.parametrize("weights, expected", [("examples", "examples"), ('{"a": 2}', {"a": 2.0})])
def test_data_and_participation_can_be_parsed_from_a_command_line(weights, expected):
    line = ["--partition", "pathological", "--labels_per_client", "3", "--participation_weights", weights]
    [args] = HfArgumentParser(FederatedArguments).parse_args_into_dataclasses([*line, "--min_clients", "2"])
    assert (args.partition, args.labels_per_client, args.min_clients) == ("pathological", 3, 2)
    assert args.participation_weights == expected


def test_printing_hides_tokens():
    args = FederatedArguments("out", hub_token="secret")
    assert "secret" not in repr(args) + str(args)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_rounds": 0}, "`num_rounds` must be 1 or more, got 0"),
        ({"parallel": "both"}, "`parallel` must be one of clients, data, got 'both'"),
        ({"num_clients": 0}, "`num_clients` must be 1 or more, got 0"),
        (
            {"num_clients": 3, "clients_per_round": 4},
            "`clients_per_round` must not be above `num_clients`, got 4 and 3",
        ),
        ({"partition": "sharded"}, "`partition` must be one of iid, dirichlet, pathological, column, or an obj"),
        ({"labels_per_client": 0}, "`labels_per_client` must be 1 or more, got 0"),
        ({"min_clients": 0}, "`min_clients` must be 1 or more, got 0"),
        ({"participation_weights": "size"}, "must be 'examples' or a dict of client name -> weight, got 'size'"),
        ({"participation_weights": {"a": -1.0}}, "0 or above, got -1.0 for client 'a'"),
        ({"participation_weights": {"a": float("nan")}}, "must be finite numbers, 0 or above, got nan"),
        ({"participation_weights": {"a": "many"}}, "must be finite numbers, 0 or above, got 'many'"),
        ({"partition_alpha": 0.0}, "`partition_alpha` must be above 0, got 0.0"),
        ({"merge_method": "mean"}, "no merge method 'mean'"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}, "is not supported over rounds"),
        ({"client_timeout": 0.0}, "`client_timeout` must be above 0 seconds, got 0.0"),
        ({"max_round_attempts": 0}, "`max_round_attempts` must be 1 or more, got 0"),
        (
            {"clients_per_round": 3, "min_successful_clients": 4},
            "`min_successful_clients` must not be above `clients_per_round`, got 4 and 3",
        ),
        (
            {"num_clients": 3, "min_successful_clients": 4},
            "`min_successful_clients` must not be above `num_clients`, got 4 and 3",
        ),
        ({"learning_rate": -0.1}, "`learning_rate` must be a number of 0 or more, got -0.1"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be a number of 0 or more, got nan"),
        ({"learning_rate": float("inf")}, "`learning_rate` must be a number of 0 or more, got inf"),
        ({"num_train_epochs": 0}, "would train nothing: `num_train_epochs` is 0 and `max_steps` is -1. Set one"),
        ({"num_train_epochs": -1.0, "max_steps": 0}, "would train nothing"),
        ({"local_parameters": "lora_("}, "must be regular expressions, but 'lora_.' is none: missing ., unterminated"),
        (
            {"local_parameters": ["classifier", "*"]},
            r"but '\*' is none: nothing to repeat at position 0. Put a backslash",
        ),
        ({"local_parameters": "[3]"}, "must be regular expressions, but 3 is none"),
    ],
)
def test_values_out_of_range_are_reported(fields, message):
    with pytest.raises(ValueError, match=message):
        FederatedArguments("out", **fields)


@pytest.mark.parametrize(
    "given, read",
    [
        (None, None),
        ("classifier", ["classifier"]),
        (("a", "b"), ["a", "b"]),
        ('["a", "b[0-9]"]', ["a", "b[0-9]"]),
        ("[0-9]+", ["[0-9]+"]),
    ],
)
def test_expressions_are_read(given, read):
    assert FederatedArguments("out", local_parameters=given).local_parameters == read


def test_steps_or_epochs_are_enough():
    assert FederatedArguments("out", num_train_epochs=0, max_steps=1).max_steps == 1
    assert FederatedArguments("out", num_train_epochs=0.5, learning_rate=0.0).num_train_epochs == 0.5


def test_options_that_the_merge_method_does_not_have_are_refused_early():
    with pytest.raises(TypeError, match="'ravan' has no option 'beta'"):
        FederatedArguments("out", merge_method="ravan", merge_options={"beta": 2})


def test_a_checkpoint_after_every_round_is_the_default():
    assert FederatedArguments("out").save_strategy == "epoch"
