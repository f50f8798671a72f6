import torch

from peft_ravan.tuner.state import checkpoint_state, exchange_state


def test_exchange_state_forms_products_and_leaves_out_the_rest():
    checkpoint = {
        "q.ravan_H": torch.ones(2, 1, 1),
        "q.ravan_s": torch.tensor([2.0, 3.0]),
        "q.ravan_A": torch.ones(2, 5),
        "q.ravan_B": torch.ones(5, 2),
        "classifier.weight": torch.ones(3),
    }
    state = exchange_state(checkpoint)
    assert list(state) == ["q.ravan_H", "classifier.weight"]
    assert state["q.ravan_H"].flatten().tolist() == [2.0, 3.0]


def test_checkpoint_state_is_the_inverse_with_every_scaling_at_one():
    checkpoint = {"q.ravan_H": torch.ones(1, 2, 2), "q.ravan_s": torch.tensor([7.0]), "q.ravan_A": torch.ones(2, 5)}
    restored = checkpoint_state(exchange_state(checkpoint), checkpoint)
    assert list(restored) == list(checkpoint)
    assert restored["q.ravan_s"].tolist() == [1.0]
    assert torch.equal(restored["q.ravan_H"], torch.full((1, 2, 2), 7.0))
    assert restored["q.ravan_A"] is checkpoint["q.ravan_A"]
