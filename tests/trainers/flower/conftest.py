"""The identity that Flower gives to each of its processes, without which no message can be made."""

import pytest


@pytest.fixture(autouse=True)
def _identity():
    identity = pytest.importorskip("flwr.supercore.task_identity").TaskIdentity
    identity.run_id, identity.node_id, identity.task_id = 5, 1, 1
