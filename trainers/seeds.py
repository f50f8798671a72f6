"""The seeds of a run: one for each random choice, by its name."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *names: str | int) -> int:
    """
    Derive the seed of one random choice from the seed of the run and the choice's name, so that no choice depends on
    how many were made before it.

    Args:
        seed (`int`): The seed of the run.
        *names (`str` or `int`): The name of the choice, such as `"client", round, client_id`.

    Returns:
        `int`: A seed below 2**32, which numpy, torch and Python accept.
    """
    digest = hashlib.sha256("/".join(str(part) for part in (seed, *names)).encode()).digest()
    return int.from_bytes(digest[:4], "big")
