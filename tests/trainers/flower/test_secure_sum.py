"""The protocol of secure aggregation with Flower's own client mod: dropouts, hostile clients, and a server that asks too much."""

import numpy as np
import pytest
import torch


pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes

from peft_ravan.trainers import SecureAggregation
from peft_ravan.trainers.exchange import ClientReply, ClientTask
from peft_ravan.trainers.flower.codec import from_record, to_record
from peft_ravan.trainers.flower.secure_client import MaskingClient
from peft_ravan.trainers.flower.secure_masks import mask, pair_mask
from peft_ravan.trainers.flower.secure_sum import SecureSum
from peft_ravan.trainers.flower.secure_vector import MASKED, MODULUS, SecureSumError, SumFormat

from .grid import InProcessGrid


SIZES = {"east": 1, "north": 2, "south": 3, "west": 4}
NODES = {"east": 40, "north": 2**63 + 5, "south": 20, "west": 30}  # Flower's ids have 64 bits
WEIGHT = "base_model.model.classifier.weight"
STAGES = (Stage.SETUP, Stage.SHARE_KEYS, Stage.COLLECT_MASKED_VECTORS, Stage.UNMASK)
LOST = "lost"


def stage_of(message: Message) -> str | None:
    return message.content.get(RECORD_KEY_CONFIGS, {}).get(Key.STAGE)


class Clients(InProcessGrid):
    """
    Nodes with Flower's mod, whose clients upload given changes.

    Args:
        size (`int`, *optional*): The number of entries of a change.
        faults (`dict`, *optional*): Clients and stages to what changes the answer, or `LOST`.
        clients (`tuple`, *optional*): The clients.
        settings (`SecureAggregation`, *optional*): The settings of the clients.
    """

    def __init__(self, size=3, faults=None, clients=tuple(SIZES), settings=None):
        self.settings, self.faults, self.answers = settings or SecureAggregation(), faults or {}, []
        self.names = {node_id: name for name, node_id in NODES.items()}
        self.task = ClientTask(1, "", {WEIGHT: torch.zeros(size)}, seed=0, upload_dtype="float32")
        self.changes = {name: torch.linspace(-n, n, size) for name, n in SIZES.items()}
        self.trained, self.public_keys = [], {}
        self.form = SumFormat.of(self.task, len(clients), sum(SIZES[client] for client in clients), 8.0)
        app = ClientApp()

        @app.train()
        def train(message, context):
            def reply(task):
                name = self.names[context.node_id]
                self.trained.append(name)
                return self.plain(name)

            return MaskingClient(self.settings, int, reply).answer(message, context)

        super().__init__(app, {NODES[client]: {} for client in clients})

    def plain(self, name: str) -> ClientReply:
        """What a client would send without masks."""
        update = {WEIGHT: self.changes[name]}
        return ClientReply.to(self.task, update=update, num_examples=SIZES[name], upload_dtype="float32")

    def handle(self, message, context):
        fault = self.faults.get((self.names[context.node_id], stage_of(message)))
        if fault == LOST:
            return None
        answer = super().handle(message, context)
        self.answers.append(answer)
        if key := answer.content.get(RECORD_KEY_CONFIGS, {}).get(Key.PUBLIC_KEY_1):
            self.public_keys[self.names[context.node_id]] = key
        return answer if fault is None else fault(message, answer)

    def secure_sum(self, threshold=None) -> SecureSum:
        nodes = {self.names[node_id]: node_id for node_id in self.contexts}
        threshold = self.settings.shares_needed(len(nodes)) if threshold is None else threshold
        return SecureSum(self, nodes, self.form, threshold, timeout=60.0, group_id="1")

    def collect(self, secure: SecureSum) -> dict[str, ClientReply]:
        """What the clients upload that have agreed on keys."""
        messages = []
        for client, node_id in secure.agree().items():
            content = to_record(self.task)
            content[RECORD_KEY_CONFIGS] = secure.request(client)
            messages.append(Message(content, node_id, "train"))
        answers = self.send_and_receive(messages)
        uploads = {}
        for answer in answers:
            if not answer.has_error():
                uploads[self.names[answer.metadata.src_node_id]] = from_record(answer.content, ClientReply)
        return uploads


def words_of(reply: ClientReply) -> np.ndarray:
    return reply.update[MASKED].numpy().view(np.uint32)


def run(grid: Clients, least=1) -> tuple[SecureSum, list[str], torch.Tensor]:
    """A whole sum: which clients are in it, and their mean change."""
    secure = grid.secure_sum()
    uploads = grid.collect(secure)
    for client, reply in uploads.items():
        secure.add(client, words_of(reply))
    mean = grid.form.unpack(secure.unmasked(least), sum(SIZES[client] for client in uploads))
    return secure, sorted(uploads), mean.change[WEIGHT]


def mean_of(grid: Clients, clients) -> torch.Tensor:
    total = sum(SIZES[client] for client in clients)
    return sum(grid.changes[client].double() * SIZES[client] for client in clients) / total


def test_the_sum_of_all_clients():
    grid = Clients()
    secure, clients, mean = run(grid)
    assert clients == sorted(SIZES) and secure.failures == {}
    torch.testing.assert_close(mean, mean_of(grid, SIZES), rtol=0, atol=4 * 8 / MODULUS)
    assert all(size > 1000 for size in secure.sent_bytes.values())  # two keys, and three times two shares


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", [LOST, "raises"])
def test_a_client_that_drops_out_costs_only_itself(stage, how):
    def raising(message, answer):
        raise OSError("no route")

    grid = Clients(faults={("north", stage): LOST if how == LOST else raising})
    secure, clients, mean = run(grid)
    # at the end, it is in the sum already
    expected = sorted(SIZES) if stage == Stage.UNMASK else ["east", "south", "west"]
    assert clients == expected
    torch.testing.assert_close(mean, mean_of(grid, expected), rtol=0, atol=4 * 8 / MODULUS * 10 / 8)
    if stage in (Stage.SETUP, Stage.SHARE_KEYS):
        assert ("has not replied within 60 seconds" if how == LOST else "no route") in secure.failures["north"]
        assert "north" not in grid.trained


@pytest.mark.parametrize("stage", STAGES)
def test_with_too_few_clients_nothing_is_uncovered(stage):
    grid = Clients(faults={(client, stage): LOST for client in ("north", "west")})
    with pytest.raises(SecureSumError, match="2 of 4 clients are left, and secure aggregation needs 3 of them"):
        run(grid)
    has_shares = any(Key.SHARE_LIST in answer.content.get(RECORD_KEY_CONFIGS, {}) for answer in grid.answers)
    assert has_shares == (stage == Stage.UNMASK)


def test_fewer_clients_than_are_needed_for_the_round_are_not_uncovered():
    grid = Clients(faults={("north", Stage.COLLECT_MASKED_VECTORS): LOST})
    with pytest.raises(SecureSumError, match="3 of 4 clients are left, and secure aggregation needs 4"):
        run(grid, least=4)
    assert not any(Key.SHARE_LIST in answer.content.get(RECORD_KEY_CONFIGS, {}) for answer in grid.answers)


# ---- What the server sees ------------------------------------------------------------


def chi_square(words: np.ndarray) -> float:
    """Of the bytes against uniform ones, with 255 degrees of freedom."""
    counts, expected = np.bincount(words.view(np.uint8), minlength=256), 4 * len(words) / 256
    return float(((counts - expected) ** 2 / expected).sum())


def test_the_server_sees_no_update_but_only_their_sum():
    grid = Clients(size=20_000)
    secure = grid.secure_sum()
    uploads = grid.collect(secure)
    plain = {client: grid.form.pack(grid.plain(client), SIZES[client]) for client in SIZES}
    for client, reply in uploads.items():
        words = words_of(reply)
        assert chi_square(plain[client]) > 10_000 and chi_square(words) < 400
        assert chi_square(words - plain[client]) < 400 and (words == plain[client]).mean() < 1e-3
        # its name, the number of its examples and that it took part are all that is said of it
        said = ClientReply.to(grid.task, update=reply.update, num_examples=SIZES[client])
        assert reply == said and reply.train_loss == 0 and reply.trained_heads is None and reply.learning_rate is None
        secure.add(client, words)
    # nor those of some of them, nor of all before their own masks are removed
    masked = [words_of(reply) for reply in uploads.values()]
    for count in (2, 3, 4):
        assert chi_square(sum(masked[:count])) < 400
    assert (secure.unmasked() == sum(plain.values())).all()


def secrets_given(grid: Clients) -> dict[int, bytes]:
    """What the server can put together of the shares that it was given: one secret of each client."""
    shares = {}
    for answer in grid.answers:
        given = answer.content.get(RECORD_KEY_CONFIGS, {})
        for node_id, share in zip(given.get(Key.NODE_ID_LIST, ()), given.get(Key.SHARE_LIST, ()), strict=True):
            shares.setdefault(node_id, []).append(share)
    return {node_id: combine_shares(some) for node_id, some in shares.items()}


def test_what_uncovers_the_sum_does_not_uncover_a_client_in_it():
    grid = Clients(size=20_000)
    secure = grid.secure_sum()
    uploads = grid.collect(secure)
    for client, reply in uploads.items():
        secure.add(client, words_of(reply))
    secure.unmasked()
    # without its own mask, the masks that it shares with others are left
    seeds = secrets_given(grid)
    left = {client: words_of(reply) - mask(seeds[NODES[client]], len(grid.form)) for client, reply in uploads.items()}
    assert all(chi_square(words) < 400 for words in left.values())
    assert chi_square(left["east"] + left["north"] + left["south"]) < 400 < chi_square(sum(left.values()))


def test_what_uncovers_the_sum_does_not_uncover_a_client_that_is_late():
    late = []
    grid = Clients(20_000, {("north", Stage.COLLECT_MASKED_VECTORS): lambda message, answer: late.append(answer)})
    run(grid)
    words = words_of(from_record(late[0].content, ClientReply))
    private = secrets_given(grid)[NODES["north"]]
    for name in ("east", "south", "west"):
        shared = pair_mask(private, grid.public_keys[name], len(words))
        words = words - shared if NODES["north"] > NODES[name] else words + shared
    assert chi_square(words) < 400  # its own mask is left


def test_masks_are_new_in_each_round():
    grid = Clients(size=1000)
    first, second = (grid.collect(grid.secure_sum()) for _ in range(2))
    for client in SIZES:
        assert (words_of(first[client]) == words_of(second[client])).mean() < 0.01


# ---- Hostile clients -----------------------------------------------------------------


def with_values(**values):
    """Changes what a client answers."""

    def change(message, answer):
        record = ConfigRecord({**answer.content[RECORD_KEY_CONFIGS], **values})
        return Message(RecordDict({RECORD_KEY_CONFIGS: record}), reply_to=message)

    return change


def with_content(content):
    return lambda message, answer: Message(content, reply_to=message)


NO_CONFIGS = RecordDict({"x": ArrayRecord({"x": Array("bytes", (1,), "x", b"x")})})
HOSTILE = {
    "nothing": (Stage.SETUP, with_content(RecordDict()), "none to a message of secure aggregation"),
    "arrays": (Stage.SETUP, with_content(NO_CONFIGS), "none to a message of secure aggregation"),
    "no key": (Stage.SETUP, with_values(**{Key.PUBLIC_KEY_1: "pk"}), "must be up to 16,384 bytes, got 'pk'"),
    "a long key": (Stage.SETUP, with_values(**{Key.PUBLIC_KEY_2: bytes(10**6)}), "must be up to 16,384 bytes"),
    "a damaged key": (Stage.SETUP, with_values(**{Key.PUBLIC_KEY_1: b"-----BEGIN PUBLIC KEY-----"}), ""),
    "one key": (Stage.SETUP, lambda message, answer: with_values(
        **{Key.PUBLIC_KEY_2: answer.content[RECORD_KEY_CONFIGS][Key.PUBLIC_KEY_1]})(message, answer), "are the same"),
    "too few shares": (Stage.SHARE_KEYS, with_values(**{Key.DESTINATION_LIST: [20], Key.CIPHERTEXT_LIST: [b"x"]}), "for each of 3"),
    "no lists": (Stage.SHARE_KEYS, with_values(**{Key.DESTINATION_LIST: 3}), "for each of 3 clients"),
    "for others": (Stage.SHARE_KEYS, with_values(**{Key.DESTINATION_LIST: [1, 2, 3]}), "for other clients"),
    "texts": (Stage.SHARE_KEYS, with_values(**{Key.CIPHERTEXT_LIST: ["a", "b", "c"]}), "up to 16,384 bytes, got 'a'"),
}  # fmt: skip


@pytest.mark.parametrize("stage, change, reason", HOSTILE.values(), ids=HOSTILE)
def test_an_answer_that_cannot_be_used_costs_only_its_client(stage, change, reason):
    grid = Clients(faults={("north", stage): change})
    secure, clients, mean = run(grid)
    assert clients == ["east", "south", "west"] and reason in secure.failures["north"]
    torch.testing.assert_close(mean, mean_of(grid, clients), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "vector", [np.zeros(5, np.uint32), np.zeros((6, 1), np.uint32), np.zeros(6), np.zeros(6, np.int32)]
)
def test_a_vector_of_another_form_is_not_added(vector):
    secure = Clients().secure_sum()
    with pytest.raises(ValueError, match="must have 6 words of 32 bits"):
        secure.add("north", vector)


@pytest.mark.parametrize(
    "share", [create_shares(bytes(32), 3, 4)[0], b"x", b""], ids=["of another secret", "short", "empty"]
)
@pytest.mark.parametrize("also_lost", [None, "east"])
def test_a_wrong_share_spoils_the_sum_and_the_reason_says_so(share, also_lost):
    def wrong(message, answer):
        ids = answer.content[RECORD_KEY_CONFIGS][Key.NODE_ID_LIST]
        return with_values(**{Key.SHARE_LIST: [share] * len(ids)})(message, answer)

    grid = Clients(faults={("west", Stage.UNMASK): wrong, (also_lost, Stage.COLLECT_MASKED_VECTORS): LOST})
    with pytest.raises(SecureSumError, match="shares of its key do not fit together|has sent a wrong share of a key"):
        run(grid)


def test_shares_of_another_key_than_that_of_the_client_are_found_out():
    own, _ = generate_key_pairs()
    forged = iter(create_shares(private_key_to_bytes(own), 3, 4))

    def wrong(message, answer):
        record = answer.content[RECORD_KEY_CONFIGS]
        ids, shares = record[Key.NODE_ID_LIST], list(record[Key.SHARE_LIST])
        shares[ids.index(NODES["east"])] = next(forged)
        return with_values(**{Key.SHARE_LIST: shares})(message, answer)

    faults = {(client, Stage.UNMASK): wrong for client in ("north", "south", "west")}
    with pytest.raises(SecureSumError, match="masks of 'east' .* the private key is not that of its public key"):
        run(Clients(faults={**faults, ("east", Stage.COLLECT_MASKED_VECTORS): LOST}))


def test_any_vector_of_the_right_length_is_found_out_by_its_number_of_examples():
    grid = Clients()
    secure = grid.secure_sum()
    for client, reply in grid.collect(secure).items():
        words = words_of(reply)
        secure.add(client, np.arange(6, dtype=np.uint32) if client == "north" else words)
    with pytest.raises(SecureSumError, match="The sum says that its clients have .* examples, and they have said 10"):
        grid.form.unpack(secure.unmasked(), 10)


# ---- A server that asks too much -----------------------------------------------------


def setup_of(grid: Clients, **changes) -> dict:
    values = {
        Key.STAGE: Stage.SETUP, Key.SAMPLE_NUMBER: 4, Key.SHARE_NUMBER: 4, Key.THRESHOLD: 3,
        Key.CLIPPING_RANGE: 8.0, Key.TARGET_RANGE: MODULUS, Key.MOD_RANGE: MODULUS, Key.MAX_WEIGHT: 10.0,
    }  # fmt: skip
    return {**values, **changes}


def ask(grid: Clients, configs: dict, kind="train", content=None) -> Message:
    content = RecordDict() if content is None else content
    content[RECORD_KEY_CONFIGS] = ConfigRecord(configs)
    return grid.send_and_receive([Message(content, NODES["north"], kind)])[0]


WEAKER = {
    "threshold": ({Key.THRESHOLD: 2}, "sets 'threshold' .* to 2, and by the arguments of this node it is 3 for 4"),
    "two clients": ({Key.SAMPLE_NUMBER: 2}, "at least 3 clients, and the server has 2"),
    "shares": ({Key.SHARE_NUMBER: 3}, "'share_num'"),
    "range": ({Key.CLIPPING_RANGE: 1e9}, "'clipping_range'"),
    "modulus": ({Key.MOD_RANGE: 2**8}, "'mod_range'"),
    "a text": ({Key.SAMPLE_NUMBER: "4"}, "the server has '4'"),
}


@pytest.mark.parametrize("changes, reason", WEAKER.values(), ids=WEAKER)
def test_a_client_refuses_weaker_settings_than_its_own(changes, reason):
    grid = Clients()
    assert not ask(grid, setup_of(grid)).has_error()
    answer = ask(grid, setup_of(grid, **changes))
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(answer.error.reason)


def test_a_client_gives_no_update_without_masks():
    grid = Clients()
    [answer] = grid.send_and_receive([Message(to_record(grid.task), NODES["north"], "train")])
    assert answer.has_error() and "asks for an update that is not masked" in answer.error.reason
    assert grid.trained == []


def test_a_client_masks_one_update_with_its_keys():
    """With a second one, the difference of both would be seen."""
    grid = Clients()
    secure = grid.secure_sum()
    request = [secure.agree(), secure.request("north")][1]
    for kind, reason in (("train.default", "must be of the type 'train'"), ("train", None), ("train", "Abort")):
        answer = ask(grid, dict(request), kind, to_record(grid.task))
        assert answer.has_error() == (reason is not None)
        assert reason is None or reason in answer.error.reason
    assert grid.trained == ["north"]


def test_a_client_shares_one_mask_with_each_other():
    grid = Clients()
    secure = grid.secure_sum()
    request = [secure.agree(), dict(secure.request("north"))][1]
    for name in (Key.SOURCE_LIST, Key.CIPHERTEXT_LIST):
        request[name] = [request[name][0], *request[name]]
    answer = ask(grid, request, content=to_record(grid.task))
    assert answer.has_error() and "names a client twice" in answer.error.reason


@pytest.mark.parametrize("active, dead", [([0, 1, 2, 3], [1]), ([1, 2, 3], [0]), ([0, 1, 1, 2], [])])
def test_a_client_gives_one_secret_of_another_client_and_none_that_uncovers_its_own_update(active, dead):
    grid = Clients()
    uploads = grid.collect(grid.secure_sum())
    assert len(uploads) == 4
    others = [NODES["north"], *(node_id for name, node_id in NODES.items() if name != "north")]
    asked = {Key.ACTIVE_NODE_ID_LIST: [others[i] for i in active], Key.DEAD_NODE_ID_LIST: [others[i] for i in dead]}
    answer = ask(grid, {Key.STAGE: Stage.UNMASK, **asked})
    assert answer.has_error() and "It gets none." in answer.error.reason
    # what it may ask, once
    asked = {Key.ACTIVE_NODE_ID_LIST: others[:3], Key.DEAD_NODE_ID_LIST: others[3:]}
    assert not ask(grid, {Key.STAGE: Stage.UNMASK, **asked}).has_error()
    assert ask(grid, {Key.STAGE: Stage.UNMASK, **asked}).has_error()


def test_keys_are_forgotten_at_the_end_of_a_round():
    grid = Clients()
    run(grid)
    assert all(not context.state for context in grid.contexts.values())


def test_what_a_client_cannot_mask_is_a_failure_with_a_reason():
    grid = Clients()
    grid.changes["north"] = torch.tensor([1.0, 9.0, 0.0])
    secure = grid.secure_sum()
    failed = grid.collect(secure)["north"]
    assert failed.update is None and "beyond ±8" in failed.failure and WEIGHT in failed.failure


@pytest.mark.parametrize("dtype", ["int4", None])
def test_a_client_masks_only_changes_in_float32(dtype):
    grid = Clients()
    secure = grid.secure_sum()
    secure.agree()
    task = ClientTask(1, "north", grid.task.state, seed=0, upload_dtype=dtype)
    answer = ask(grid, dict(secure.request("north")), content=to_record(task))
    assert answer.has_error() and "Only changes of a round in float32" in answer.error.reason
