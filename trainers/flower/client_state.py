"""What a client keeps between its rounds, at its node."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flwr.app import ArrayRecord, Context, RecordDict

from ..client.store import ClientStore
from .codec import RECORD, bytes_array, bytes_of, from_record, to_record
from .introduction import Bases


KEPT = "peft-ravan.kept"
BASES = "peft-ravan.bases"
STATE_DIR = "state-dir"


@contextlib.contextmanager
def client_store(context: Context) -> Iterator[ClientStore]:
    """
    Give a client its store within a context. Its files are kept in `context.state`, which Flower holds in the memory of
    the node until the run ends, or in the folder `state-dir`, where they also survive the node and the run. It is in the
    configuration of the node, or in that of the run: nodes that Flower simulates cannot be configured.

    Args:
        context (`flwr.app.Context`): The context of the node. If an error is raised, its state stays as it was.

    Yields:
        [`ClientStore`]: The store.
    """
    state_dir = context.node_config.get(STATE_DIR, context.run_config.get(STATE_DIR))
    if state_dir is not None:
        yield ClientStore(str(state_dir))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, array in context.state.get(KEPT, {}).items():
            file = Path(folder, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes_of(array, name))
        yield ClientStore(folder)
        files = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
        if files:
            context.state[KEPT] = ArrayRecord({name: bytes_array(path.read_bytes()) for name, path in files.items()})


def keep_bases(context: Context, bases: Bases) -> None:
    """
    Args:
        context (`flwr.app.Context`): The context of the node, which keeps the bases until the run ends.
        bases ([`Bases`]): The bases.
    """
    context.state[BASES] = to_record(bases)[RECORD]


def kept_bases(context: Context) -> Bases | None:
    """
    Args:
        context (`flwr.app.Context`): The context of the node.

    Returns:
        [`Bases`]: The bases that it keeps, or `None` if it was sent none.
    """
    return from_record(RecordDict({RECORD: context.state[BASES]}), Bases) if BASES in context.state else None
