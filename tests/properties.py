"""
The number of examples that each property is tested with.

`make test` draws the same examples each time, so that no run fails by chance. `make test-deep` draws different ones,
and `DEEP_FACTOR` times as many: `pytest --hypothesis-profile deep`.
"""

from __future__ import annotations

from hypothesis import settings


DEEP_FACTOR = 50
# the number of examples for a property that does not specify it
_NUM_EXAMPLES = 100


def register_profiles() -> None:
    """Register the profiles with hypothesis, and load the default one."""
    settings.register_profile("default", derandomize=True, database=None, deadline=None, max_examples=_NUM_EXAMPLES)
    # a profile inherits from the loaded one, which may have been chosen by CI
    settings.register_profile(
        "deep", derandomize=False, deadline=None, max_examples=DEEP_FACTOR * _NUM_EXAMPLES, print_blob=True
    )
    settings.load_profile("default")


def examples(number: int, deep: int | None = None, **options) -> settings:
    """
    Args:
        number (`int`): The number of examples by default.
        deep (`int`, *optional*): The number in `make test-deep`. By default `DEEP_FACTOR` times as many.
        **options: Other settings of hypothesis.

    Returns:
        `hypothesis.settings`: A decorator that sets the number of examples, which is larger in `make test-deep`.
    """
    factor = _factor()
    return settings(max_examples=number * factor if factor == 1 else deep or number * factor, **options)


def _factor() -> int:
    return settings.default.max_examples // _NUM_EXAMPLES
