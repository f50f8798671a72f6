"""
Merging what clients upload: pure functions that know nothing of rounds, files or the network.

    merge(global_state, updates, method="ravan") -> MergeResult(state, diagnostics)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..state import checkpoint_state, exchange_state
from .registry import MERGE_METHODS, MergeMethod, get_merge_method
from .robust_pca import RobustPCAInfo, robust_pca
from .updates import ClientUpdate, MergeResult, UpdateError, check_updates


__all__ = [
    "MERGE_METHODS",
    "ClientUpdate",
    "MergeMethod",
    "MergeResult",
    "RobustPCAInfo",
    "UpdateError",
    "check_updates",
    "get_merge_method",
    "merge",
    "robust_pca",
]


def merge(
    global_state: Mapping[str, torch.Tensor], updates: Sequence[ClientUpdate], method: str = "ravan", **options
) -> MergeResult:
    """
    Merge what clients uploaded into a new global state.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from: checkpoint names of the adapter to tensors. Names that end in `ravan_H`
            hold the products s*H of all heads, `[h, r, r]`. A whole Ravan checkpoint, with scalings and bases, can be
            given too: its products are formed, its bases kept, and its scalings returned as 1.
        updates (`Sequence[ClientUpdate]`):
            What the clients uploaded.
        method (`str`, *optional*, defaults to `"ravan"`):
            The name of a merge method, one of `MERGE_METHODS`.
        **options:
            The options of the method.

    Returns:
        [`MergeResult`]: The new state, with the names and shapes of `global_state`, and the diagnostics of the method.
        Neither `global_state` nor the updates are changed.

    Raises:
        UpdateError: if an update does not fit the global state: tensors that are missing or not expected, other shapes,
            NaN or infinite entries, or no examples. Nothing is merged then.
        TypeError: if the method does not have one of the options.
        ValueError: if the method does not exist or an option is out of range.

    Example:

        ```py
        >>> import torch
        >>> from peft_ravan.merging import ClientUpdate, merge

        >>> name = "base_model.model.layer.ravan_H"
        >>> global_state = {name: torch.zeros(1, 2, 2)}
        >>> updates = [
        ...     ClientUpdate({name: torch.full((1, 2, 2), 1.0)}, num_examples=30, client_id="ward_a"),
        ...     ClientUpdate({name: torch.full((1, 2, 2), 5.0)}, num_examples=10, client_id="ward_b"),
        ... ]
        >>> merge(global_state, updates).state[name]
        tensor([[[2., 2.],
                 [2., 2.]]])
        ```
    """
    merge_method = get_merge_method(method)
    merge_method.check_options(options)
    products = exchange_state(global_state)
    updates = list(updates)
    check_updates(products, updates)
    with torch.no_grad():
        result = merge_method.function(products, updates, **options)
    diagnostics = {
        "method": method,
        "num_clients": len(updates),
        "num_examples": sum(update.num_examples for update in updates),
        **result.diagnostics,
    }
    return MergeResult(checkpoint_state(result.state, global_state), diagnostics)
