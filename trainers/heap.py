"""Excludes existing objects from garbage collection during a federation."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


_is_frozen_here = False


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """
    Exclude all existing objects from garbage collection within a context.

    Accelerate collects garbage at the start of each local training. This walks the whole heap, which is full of
    imported modules, and often takes longer than the steps of a client. If the heap is frozen already, it is left
    frozen: Python cannot unfreeze a part of it.
    """
    global _is_frozen_here
    # Python counts what is frozen one by one, so it is not asked within another such context
    if _is_frozen_here or gc.get_freeze_count() > 0:
        yield
        return
    gc.collect()
    gc.freeze()
    _is_frozen_here = True
    try:
        yield
    finally:
        _is_frozen_here = False
        gc.unfreeze()
