"""What all tests of federations over Flower need."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _identity():
    """Flower gives it to each of its processes, and no message can be made without it."""
    identity = pytest.importorskip("flwr.supercore.task_identity").TaskIdentity
    identity.run_id, identity.node_id, identity.task_id = 5, 1, 1
