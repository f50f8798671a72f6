"""Trains several clients at once: what their models compute on each batch is computed for all of them together."""

from .checks import check_batching
from .client_batch import ClientBatch


__all__ = ["ClientBatch", "check_batching"]
