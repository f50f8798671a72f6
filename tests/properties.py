"""
How many examples a property is tested with, in one place.

`make test` draws the same examples each time, so that no run fails by chance. `make test-deep` draws others, and
`DEEP_FACTOR` times as many: `pytest --hypothesis-profile deep`.
"""

from __future__ import annotations

from hypothesis import settings


DEEP_FACTOR = 50
# what a property is tested with that does not say how many examples it needs
_NUM_EXAMPLES = 100


def register_profiles() -> None:
    """Make the profiles known to hypothesis, and choose the one that needs no option."""
    settings.register_profile("default", derandomize=True, database=None, deadline=None, max_examples=_NUM_EXAMPLES)
    # a profile starts from the one that is loaded, which may have been chosen by CI
    settings.register_profile(
        "deep", derandomize=False, deadline=None, max_examples=DEEP_FACTOR * _NUM_EXAMPLES, print_blob=True
    )
    settings.load_profile("default")


def examples(number: int, **options) -> settings:
    """
    Args:
        number (`int`): How many examples a property is tested with by default.
        **options: Other settings of hypothesis.

    Returns:
        `hypothesis.settings`: As a decorator it has the property tested with so many, or with more in `make test-deep`.
    """
    return settings(max_examples=number * _factor(), **options)


def _factor() -> int:
    return settings.default.max_examples // _NUM_EXAMPLES
