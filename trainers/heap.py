"""What a federation leaves out of garbage collection."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """
    Leave all that exists out of garbage collection for a while.

    Accelerate collects garbage at the start of each local training. That walks the whole heap, which the imported modules
    fill, and takes longer than many a client's steps. Who has frozen the heap already has done the same, and wants it to
    stay so: Python cannot unfreeze a part of it.
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
