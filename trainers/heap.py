"""Excludes existing objects from garbage collection during a federation."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """
    Exclude all existing objects from garbage collection within a context.

    Accelerate collects garbage at the start of each local training. This walks the whole heap, which is full of
    imported modules, and often takes longer than the steps of a client. If the heap is frozen already, it is left
    frozen: Python cannot unfreeze a part of it.
    """
    is_frozen = gc.get_freeze_count() > 0
    if not is_frozen:
        gc.collect()
        gc.freeze()
    try:
        yield
    finally:
        if not is_frozen:
            gc.unfreeze()
