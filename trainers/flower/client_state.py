"""What a client keeps between its rounds, at its node."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flwr.app import ArrayRecord, Context

from ..client.store import ClientStore
from .codec import bytes_array, bytes_of


RECORD = "peft-ravan.kept"
STATE_DIR = "state-dir"


@contextlib.contextmanager
def client_store(context: Context) -> Iterator[ClientStore]:
    """
    Give a client its store within a context. Its files are kept in `context.state`, which Flower holds in the memory of
    the node until the run ends, or in the folder `state-dir` of the node's configuration, where they also survive the
    node and the run.

    Args:
        context (`flwr.app.Context`): The context of the node. If an error is raised, its state stays as it was.

    Yields:
        [`ClientStore`]: The store.
    """
    if STATE_DIR in context.node_config:
        yield ClientStore(str(context.node_config[STATE_DIR]))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, array in context.state.get(RECORD, {}).items():
            file = Path(folder, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes_of(array, name))
        yield ClientStore(folder)
        files = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
        if files:
            context.state[RECORD] = ArrayRecord({name: bytes_array(path.read_bytes()) for name, path in files.items()})
