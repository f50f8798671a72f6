"""Optimizations of a federation, and that they have no side effects. `benchmarks/federation.py` measures times."""

import gc

import pytest
from peft import get_peft_model

from peft_ravan import RavanConfig
from peft_ravan.trainers import FederatedArguments, FederatedTrainer, heap
from peft_ravan.trainers.heap import frozen_heap
from peft_ravan.trainers.records.callbacks import FederatedCallback

from ..conftest import tiny_bert


@pytest.fixture(autouse=True)
def _as_in_a_program(monkeypatch):
    monkeypatch.setattr(heap, "_is_frozen_here", False)
    gc.unfreeze()


class Watch(FederatedCallback):
    """Records what is counted while clients train, and which parts of the data exist after each round."""

    def __init__(self):
        self.trainer = None
        self.operations, self.made, self.frozen = [], [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.operations.append(state.total_flos + self.trainer.current_flos)
        self.frozen.append(gc.get_freeze_count())

    def on_round_end(self, args, state, control, record, **kwargs):
        self.made.append(set(self.trainer.clients._kept) == set(record["clients"]))


@pytest.fixture
def watch(train_dataset, tmp_path):
    args = FederatedArguments(
        str(tmp_path), num_clients=60, clients_per_round=2, num_rounds=1, max_steps=2, report_to="none", use_cpu=True
    )
    watch = Watch()
    watch.trainer = FederatedTrainer(
        get_peft_model(tiny_bert(), RavanConfig(r=2, num_heads=2, task_type="SEQ_CLS")),
        args,
        train_dataset=train_dataset,
        callbacks=[watch],
    )
    watch.trainer.train()
    return watch


def test_the_heap_is_frozen_while_clients_train_and_no_longer(watch):
    assert all(count > 1000 for count in watch.frozen) and gc.get_freeze_count() == 0


def test_what_the_caller_has_frozen_stays_frozen():
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        with frozen_heap():
            assert 0 <= before - gc.get_freeze_count() < before / 2  # nothing is added
            with pytest.raises(KeyError), frozen_heap():
                raise KeyError
        assert gc.get_freeze_count() > before / 2 > 1000  # objects may be freed one by one meanwhile
    finally:
        gc.unfreeze()


def test_operations_are_not_counted_for_a_state_that_is_thrown_away(watch, train_dataset):
    assert watch.operations == [0] * 4
    batch = watch.trainer.data_collator([train_dataset[0]])
    assert watch.trainer.floating_point_ops(batch) > 0


def test_only_clients_that_train_have_their_data_made(watch):
    assert watch.made == [True]
