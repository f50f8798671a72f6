"""
Federations in which the server sees only sums of updates end up where those with uploads in float32 do, up to the
resolution of the sums. Clients train as ever, and talk by Flower's own SecAgg+ mod.
"""

import re

import pytest
import torch
from transformers import HfArgumentParser


pytest.importorskip("flwr")

from flwr.app import Message
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage

from peft_ravan import RavanConfig
from peft_ravan.merging import MERGE_METHODS
from peft_ravan.trainers import FederatedArguments, FederatedTrainer, RoundFailedError, SecureAggregation
from peft_ravan.trainers.exchange import ClientReply
from peft_ravan.trainers.flower import TooFewNodesError
from peft_ravan.trainers.flower.codec import RECORD, from_record, to_record
from peft_ravan.trainers.flower.secure_checks import single_heads
from peft_ravan.trainers.flower.secure_vector import MASKED

from ...conftest import classification_dataset
from ..helpers import assert_same, logged, lora, make_trainer, of_each_kind, ravan
from .grid import InProcessGrid, over_the_wire
from .helpers import Federation, small


SIZES = {"partition": "dirichlet", "partition_alpha": 0.5}  # clients with 32 to 134 examples
BAD_NODE, BAD_CLIENT = 107, "client_1"
BUDGETS = {"client_budgets": {"client_0": 0.34, "client_1": 0.67}}


def run(folder, adapter=ravan, grid_class=InProcessGrid, **options) -> Federation:
    federation = Federation(small(folder, **options), adapter, grid_class=grid_class)
    federation.run()
    return federation


def run_both(tmp_path, adapter=ravan, **options) -> tuple[Federation, Federation]:
    """With sums, and with updates in float32."""
    secure = run(tmp_path / "secure", adapter, secure_aggregation=True, **options)
    return secure, run(tmp_path / "plain", adapter, **options)


# ---- The result ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 2},
        BUDGETS,
        {**BUDGETS, "head_selection": "gradient", "head_allocation": "global"},
        {"max_examples": 50},
        {"download_dtype": "int8"},
    ],
    ids=["all heads", "budgets", "chosen heads", "limited weights", "small downloads"],
)
def test_a_round_is_that_of_uploads_in_float32_up_to_the_resolution(tmp_path, options):
    secure, plain = run_both(tmp_path, num_rounds=1, **SIZES, **options)
    assert_same(secure.adapter(), plain.adapter(), rtol=1e-6, atol=3e-8)
    [one], [two] = secure.records, plain.records
    assert one["clients"] == two["clients"] and one["num_examples"] == two["num_examples"]
    assert one["train_loss"] == pytest.approx(two["train_loss"], abs=1e-5)
    assert one["learning_rate"] == pytest.approx(two["learning_rate"])
    # what would compare or count single updates is not known
    assert two.keys() - one.keys() == {"update_cosine"} | ({"heads_trained"} if "client_budgets" in options else set())
    assert one.keys() <= two.keys()


ADAPTERS = {
    "ravan": ravan, "fed_sb": lambda: RavanConfig(r=4, num_heads=1, task_type="SEQ_CLS"), "task_arithmetic": ravan,
}  # fmt: skip
METHODS = [name for name, method in MERGE_METHODS.items() if method.secure_aggregation]


@pytest.mark.parametrize("method", of_each_kind(METHODS))
def test_every_method_that_needs_only_sums_ends_up_at_the_same(tmp_path, method):
    adapter = ADAPTERS.get(method, lora)
    rounds = 2 if MERGE_METHODS[method].frozen_cycle else 1
    secure, plain = run_both(tmp_path, adapter, merge_method=method, num_rounds=rounds, **SIZES)
    # in a second round, optimizers have amplified the last bits of the first one
    assert_same(secure.adapter(), plain.adapter(), rtol=1e-6, atol=3e-8 if rounds == 1 else 2e-5)


def test_the_methods_of_the_task_are_among_them():
    assert {"ravan", "fedavg", "fedit", "ffa_lora", "fed_sb"} <= set(METHODS)


@pytest.mark.parametrize(
    "options",
    [
        {"server_optimizer": "fedadam", "lr_scheduler_type": "linear", "clients_per_round": 3, "num_clients": 4},
        {"average_rounds": None, "local_parameters": ["classifier"], "proximal_mu": 0.1},
    ],
    ids=["server optimizer, schedule, some clients", "mean of rounds, personal parts"],
)
def test_what_the_server_does_besides_is_the_same(tmp_path, options):
    secure, plain = run_both(tmp_path, num_rounds=2, **{**SIZES, **options})
    assert_same(secure.adapter(), plain.adapter(), rtol=1e-3, atol=1e-4)
    for one, two in zip(secure.records, plain.records, strict=True):
        assert one["clients"] == two["clients"]
        assert one["learning_rate"] == pytest.approx(two["learning_rate"])


def test_what_is_uploaded_is_counted(tmp_path):
    counted = []

    class Counting(InProcessGrid):
        def handle(self, message, context):
            answer = super().handle(message, context)
            if message.metadata.message_type == "train":
                records = answer.content
                counted.append(len(records[RECORD_KEY_CONFIGS].deflate()) if RECORD_KEY_CONFIGS in records else 0)
                if RECORD in records:
                    counted.append(from_record(records, ClientReply).num_bytes)
            return answer

    [record] = run(tmp_path, grid_class=Counting, secure_aggregation=True, num_rounds=1).records
    assert record["upload_bytes"] == sum(counted)


# ---- What the server sees ------------------------------------------------------------


class Watching(InProcessGrid):
    """Keeps what the server is sent by clients."""

    seen: list

    def handle(self, message, context):
        answer = super().handle(message, context)
        if message.metadata.message_type == "train":
            self.seen.append(answer.content)
        return answer


@pytest.mark.parametrize("options", [{}, {"local_parameters": ["classifier"]}], ids=["shared", "personal"])
def test_nothing_else_of_a_client_reaches_the_server(tmp_path, options):
    class Grid(Watching):
        seen = []

    run(tmp_path, grid_class=Grid, secure_aggregation=True, num_rounds=1, **BUDGETS, **options)
    replies = [from_record(content, ClientReply) for content in Grid.seen if RECORD in content]
    keys = [content[RECORD_KEY_CONFIGS] for content in Grid.seen if RECORD not in content]
    assert len(replies) == 3 and len(keys) == 9
    for reply in replies:
        assert list(reply.update) == [MASKED] and reply.update[MASKED].dtype == torch.int32
        expected = ClientReply(1, reply.client, run=reply.run, num_examples=80, update=reply.update)
        if options:  # that something is kept is known, but not a digest of it
            expected = ClientReply(
                1, reply.client, run=reply.run, num_examples=80, update=reply.update, kept_digest=""
            )
        assert reply == expected
    assert {name for record in keys for name in record} == {
        Key.PUBLIC_KEY_1, Key.PUBLIC_KEY_2, Key.DESTINATION_LIST, Key.CIPHERTEXT_LIST, Key.NODE_ID_LIST, Key.SHARE_LIST,
    }  # fmt: skip
    # all clients have vectors of the same length, whatever heads they have trained
    assert len({len(reply.update[MASKED]) for reply in replies}) == 1


# ---- Failures ------------------------------------------------------------------------


def failing(stage, rounds=(1,), change=None):
    """A grid on which one node fails at a stage, or answers something else."""

    class Failing(InProcessGrid):
        def handle(self, message, context):
            configs = message.content.get(RECORD_KEY_CONFIGS, {})
            is_bad = context.node_id == BAD_NODE and message.metadata.group_id in map(str, rounds)
            found = configs.get(Key.STAGE)  # Flower's mod takes it out
            answer = super().handle(message, context)
            if not is_bad or found != stage:
                return answer
            if change is None:
                raise OSError("no route")
            return change(message, answer)

    return Failing


@pytest.mark.parametrize("stage", [Stage.SETUP, Stage.SHARE_KEYS, Stage.COLLECT_MASKED_VECTORS])
def test_a_client_that_drops_out_costs_only_itself(tmp_path, stage):
    secure = run(tmp_path / "secure", grid_class=failing(stage), secure_aggregation=True, num_rounds=1, **SIZES)

    def fault(client, round_number, update):
        if client == BAD_CLIENT:
            raise OSError("no route")

    trainer = make_trainer(tmp_path / "one", num_clients=3, max_steps=1, num_rounds=1, client_fault=fault, **SIZES)
    trainer.train()
    [record] = secure.records
    assert record["clients"] == ["client_0", "client_2"] and record["attempts"] == 1
    assert [failed["client"] for failed in record["failed_clients"]] == [BAD_CLIENT]
    assert "no route" in record["failed_clients"][0]["reason"]
    saved, merged = secure.adapter(), trainer.last_global_state
    names = [name for name in merged if "ravan_H" in name]
    assert_same({n: saved[n] for n in names}, {n: merged[n] for n in names}, rtol=1e-6, atol=1e-7)


def test_a_client_that_drops_out_after_its_upload_is_in_the_sum(tmp_path):
    secure = run(tmp_path / "secure", grid_class=failing(Stage.UNMASK), secure_aggregation=True, num_rounds=1)
    [record] = secure.records
    assert len(record["clients"]) == 3 and record["failed_clients"] == []


def changed(**fields):
    def change(message, answer):
        reply = from_record(answer.content, ClientReply)
        return Message(to_record(ClientReply(**{**vars(reply), **fields})), reply_to=message)

    return change


WORDS = {
    "short": torch.zeros(3, dtype=torch.int32),
    "NaN": torch.full((3,), torch.nan),
}
BAD_REPLIES = {
    **{name: (changed(update={MASKED: words}), "masked vector") for name, words in WORDS.items()},
    "unmasked": (changed(update={"base_model.model.classifier.weight": torch.zeros(2, 2)}), "not uploaded a masked"),
    "no update": (changed(update=None), "not uploaded a masked vector"),
    "other examples": (changed(num_examples=10**9), "It has 1000000000 examples, and had 80 before the first round"),
    "another client": (changed(client="client_0"), "replied to another task"),
    "its failure": (changed(update=None, failure="OutOfMemoryError: no room"), "OutOfMemoryError: no room"),
}


@pytest.mark.parametrize("change, reason", BAD_REPLIES.values(), ids=BAD_REPLIES)
def test_a_reply_that_cannot_be_summed_costs_only_its_client(tmp_path, change, reason):
    grid = failing(Stage.COLLECT_MASKED_VECTORS, change=change)
    [record] = run(tmp_path, grid_class=grid, secure_aggregation=True, num_rounds=1).records
    assert record["clients"] == ["client_0", "client_2"]
    assert re.search(reason, record["failed_clients"][0]["reason"])


def test_a_change_out_of_range_fails_its_client_by_name(tmp_path):
    federation = Federation(small(tmp_path, secure_aggregation={"clipping_range": 1e-6}, max_round_attempts=1))
    with pytest.raises(RoundFailedError, match="'client_0' .*beyond ±1e-06.*raise `clipping_range`"):
        federation.run()


def poisoned(message, answer):
    """Words of the right number that no masks and no update have made."""
    reply = from_record(answer.content, ClientReply)
    words = torch.arange(len(reply.update[MASKED]), dtype=torch.int32)
    return changed(update={MASKED: words})(message, answer)


def wrong_share(message, answer):
    record = answer.content[RECORD_KEY_CONFIGS]
    record[Key.SHARE_LIST] = [bytes(len(share)) for share in record[Key.SHARE_LIST]]
    return answer


@pytest.mark.parametrize(
    "stage, change, reason",
    [
        (Stage.COLLECT_MASKED_VECTORS, poisoned, "has not sent what it should"),
        (Stage.UNMASK, wrong_share, "do not fit together"),
    ],
)
def test_a_spoilt_sum_leaves_the_state_as_it_was(tmp_path, stage, change, reason):
    """In the second round, after which the adapter is that of the first one."""
    whole = run(tmp_path / "whole", secure_aggregation={"threshold": 1}, num_rounds=1)
    options = {"secure_aggregation": {"threshold": 1}, "max_round_attempts": 2, "save_strategy": "epoch"}
    federation = Federation(small(tmp_path / "cut", **options), grid_class=failing(stage, (2,), change))
    with pytest.raises(RoundFailedError, match=f"in each of 2 attempts.*{reason}"):
        federation.run()
    again = run(tmp_path / "cut", resume_from_checkpoint=True, **{**options, "num_rounds": 1})
    assert_same(again.adapter(), whole.adapter())


def test_with_too_few_clients_left_the_attempt_fails_and_the_next_one_can_succeed(tmp_path):
    attempts = []

    class FailsOnce(InProcessGrid):
        def handle(self, message, context):
            stage = message.content.get(RECORD_KEY_CONFIGS, {}).get(Key.STAGE)
            if stage == Stage.COLLECT_MASKED_VECTORS and len(attempts) < 2:
                attempts.append(context.node_id)
                raise OSError("no route")
            return super().handle(message, context)

    secure = run(tmp_path / "secure", grid_class=FailsOnce, secure_aggregation=True, num_rounds=1)
    plain = run(tmp_path / "plain", num_rounds=1)
    [record] = secure.records
    assert record["attempts"] == 2 and len(record["clients"]) == 3
    reasons = {failed["client"]: failed["reason"] for failed in record["failed_clients"]}
    assert sum("1 of 3 clients are left, and secure aggregation needs 2" in reason for reason in reasons.values()) == 1
    assert sum("no route" in reason for reason in reasons.values()) == 2
    assert_same(secure.adapter(), plain.adapter(), rtol=1e-6, atol=1e-7)


def test_no_sum_is_uncovered_that_does_not_count(tmp_path):
    """Or the difference of the sums of two attempts would be the update of a client."""

    class Grid(Watching):
        seen = []

        def handle(self, message, context):
            stage = message.content.get(RECORD_KEY_CONFIGS, {}).get(Key.STAGE)
            if stage == Stage.COLLECT_MASKED_VECTORS and context.node_id == BAD_NODE:
                raise OSError("no route")
            return super().handle(message, context)

    options = {"min_successful_clients": 3, "max_round_attempts": 1, "secure_aggregation": True}
    with pytest.raises(RoundFailedError, match="2 of 3 clients are left, and secure aggregation needs 3"):
        run(tmp_path, grid_class=Grid, **options)
    assert not any(Key.SHARE_LIST in content.get(RECORD_KEY_CONFIGS, {}) for content in Grid.seen)


def test_a_node_without_the_argument_is_left_out_with_the_reason(tmp_path):
    federation = Federation(small(tmp_path, secure_aggregation=True, max_round_attempts=1))
    other = Federation(small(tmp_path / "other"))
    federation.grid.app = other.grid.app
    with pytest.raises(RoundFailedError, match="Its node reports an error: .*must have the record 'peft-ravan'"):
        federation.run()


@pytest.fixture(scope="module")
def unmasked_task(tmp_path_factory) -> Message:
    """A task of a federation without secure aggregation."""

    class Keeping(InProcessGrid):
        kept = []

        def handle(self, message, context):
            self.kept.append(message)
            return super().handle(message, context)

    run(tmp_path_factory.mktemp("plain"), grid_class=Keeping, num_rounds=1)
    return next(message for message in Keeping.kept if message.metadata.message_type == "train")


@pytest.mark.parametrize("kind", ["train", "train.on_sent_bases", "evaluate", "evaluate.on_sent_bases"])
def test_a_node_sends_nothing_without_masks_whatever_it_is_asked(tmp_path, unmasked_task, kind):
    """By a server that ignores the arguments."""
    node_id = unmasked_task.metadata.dst_node_id
    grid = Federation(small(tmp_path, secure_aggregation=True)).grid
    answer = grid.reply(over_the_wire(Message(unmasked_task.content, node_id, kind)))
    assert answer.has_error() and "arguments of this node have `secure_aggregation`" in answer.error.reason


def test_a_resumed_run_ends_up_at_the_same(tmp_path):
    class Killed(InProcessGrid):
        def handle(self, message, context):
            if message.metadata.group_id == "2":
                raise KeyboardInterrupt
            return super().handle(message, context)

    options = {"secure_aggregation": True, "save_strategy": "epoch", "server_optimizer": "fedadam", **SIZES, **BUDGETS}
    whole = run(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", grid_class=Killed, **options)
    resumed = run(tmp_path / "cut", resume_from_checkpoint=True, **options)
    # masks are new, and cancel to the last bit
    assert_same(resumed.adapter(), whole.adapter())


# ---- What is refused -----------------------------------------------------------------


REFUSED = {
    **{
        name: (
            {"merge_method": name},
            f"merge_method='{name}', which needs the update of each client.*Choose one of: ",
        )
        for name in ("fedrpca", "ties", "flexlora", "median", "krum", "multi_krum", "trimmed_mean", "hetlora")
    },
    "privacy": ({"privacy": {"clip_norm": 1.0, "noise_multiplier": 1.0}}, "with `privacy`.*Leave one of the two out"),
    "max_update_norm": ({"max_update_norm": 1.0}, "with `max_update_norm`.*Leave one of the two out"),
    "a multiple of the median": ({"max_update_norm": "3*median"}, "with `max_update_norm`"),
    "scaffold": ({"scaffold": True}, "with `scaffold`.*Leave one of the two out"),
    "eval_clients": ({"eval_clients": True}, "with `eval_clients`.*Leave one of the two out"),
    "two clients": ({"num_clients": 2}, "at least 3 clients in a round, and `num_clients` is 2.*Let more clients"),
    "two of four": ({"clients_per_round": 2}, "at least 3 clients in a round, and `clients_per_round` is 2"),
    "half": ({"secure_aggregation": {"threshold": 0.5}}, "`threshold` .* above 0.5 and up to 1, got 0.5"),
    "no range": ({"secure_aggregation": {"clipping_range": 0.0}}, "`clipping_range` .* above 0, got 0.0"),
    "NaN": ({"secure_aggregation": {"clipping_range": float("nan")}}, "`clipping_range`"),
}


@pytest.mark.parametrize("options, reason", REFUSED.values(), ids=REFUSED)
def test_what_needs_single_updates_is_refused_when_the_arguments_are_made(tmp_path, options, reason):
    with pytest.raises(ValueError, match=reason):
        FederatedArguments(str(tmp_path), **{"secure_aggregation": True, **options})


@pytest.mark.parametrize(
    "value, reason", [({"treshold": 0.9}, "no field 'treshold'"), (3, "must be True"), ({"threshold": "x"}, "number")]
)
def test_settings_of_another_kind_are_refused(tmp_path, value, reason):
    with pytest.raises(TypeError, match=reason):
        FederatedArguments(str(tmp_path), secure_aggregation=value)


def test_the_settings_can_be_given_in_several_forms(tmp_path):
    default = SecureAggregation().to_dict()
    for value in (True, "true", {}, "{}", SecureAggregation()):
        assert FederatedArguments(str(tmp_path), secure_aggregation=value).secure_aggregation == default
    for value in (None, False, "false"):
        assert FederatedArguments(str(tmp_path), secure_aggregation=value).secure_aggregation is None
    words = ["--output_dir", str(tmp_path), "--secure_aggregation", '{"threshold": 0.9}']
    [args] = HfArgumentParser(FederatedArguments).parse_args_into_dataclasses(words)
    assert SecureAggregation.parse(args.secure_aggregation) == SecureAggregation(threshold=0.9)


@pytest.mark.parametrize(
    "num_clients, threshold, needed", [(3, 2 / 3, 2), (4, 0.51, 3), (6, 2 / 3, 4), (5, 1.0, 5), (100, 0.7, 70)]
)
def test_how_many_clients_must_stay(num_clients, threshold, needed):
    assert SecureAggregation(threshold).shares_needed(num_clients) == needed


def test_it_is_refused_on_one_machine(tmp_path):
    args = small(tmp_path, secure_aggregation=True)
    with pytest.raises(
        ValueError, match="here all are in one process. Leave it out, or run the federation over Flower"
    ):
        FederatedTrainer(None, args, train_dataset=classification_dataset())


def test_bases_from_the_clients_gradients_are_refused_before_nodes_are_waited_for(tmp_path):
    def adapter():
        return ravan(init_bases="gradient_svd")

    with pytest.raises(
        ValueError, match="made from the clients' gradients in a round 0.*`initialize_bases_from_gradient`"
    ):
        run(tmp_path, adapter, secure_aggregation=True)


def test_bases_cannot_be_sent(tmp_path):
    federation = Federation(small(tmp_path, secure_aggregation=True), send_bases=True)
    with pytest.raises(ValueError, match="does not go with `send_bases`.*the same version of torch"):
        federation.run()


def test_two_nodes_are_too_few(tmp_path):
    federation = Federation(small(tmp_path, secure_aggregation=True, num_clients=3), min_nodes=2)
    del federation.grid.contexts[BAD_NODE]
    with pytest.raises(TooFewNodesError, match="needs 3 nodes"):
        federation.run()


def test_heads_of_one_client_are_reported(tmp_path, monkeypatch):
    warnings = logged(monkeypatch, "flower.secure_checks")
    run(tmp_path / "all", secure_aggregation=True, num_rounds=1)
    assert warnings == []
    run(tmp_path / "some", secure_aggregation=True, num_rounds=1, client_budgets=0.34)
    assert len(warnings) == 1 and "about 44% of the heads are trained by only one of 3 clients" in warnings[0]
    assert single_heads({"a": 0.5, "b": 0.5}, 3) == pytest.approx(3 * 0.5**3)
