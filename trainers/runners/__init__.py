"""Runners of the tasks of a round on one machine: one by one, over processes, or by all processes together."""

from .choice import PARALLEL_MODES, make_runner
from .one_by_one import Runner


__all__ = ["PARALLEL_MODES", "Runner", "make_runner"]
