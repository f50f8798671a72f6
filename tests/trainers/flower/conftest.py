"""What all tests of federations over Flower need."""

import pytest

from peft_ravan.trainers.heap import frozen_heap


@pytest.fixture(autouse=True)
def _identity():
    """Flower gives it to each of its processes, and no message can be made without it."""
    identity = pytest.importorskip("flwr.supercore.task_identity").TaskIdentity
    identity.run_id, identity.node_id, identity.task_id = 5, 1, 1


@pytest.fixture(autouse=True, scope="module")
def _frozen_heap():
    """Each run would freeze it for itself, which takes longer than its tiny rounds."""
    with frozen_heap():
        yield
