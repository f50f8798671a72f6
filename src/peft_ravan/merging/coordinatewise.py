"""Robust rules that treat every entry of the weight update on its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from peft import LoraConfig

from .lora import client_factors, is_lora_matrix, product_targets
from .matrices import merge_matrices
from .truncation import truncated_factors
from .updates import ClientUpdate, MergeResult


# the products of all clients are formed a few rows at a time, with at most this many entries
MAX_BLOCK_ENTRIES = 2**23


def trimmed_mean_of_entries(values: torch.Tensor, num_trimmed: int) -> torch.Tensor:
    """
    Args:
        values (`torch.Tensor`): `[..., C]`.
        num_trimmed (`int`): How many of the smallest and of the largest values to leave out, less than C / 2.

    Returns:
        `torch.Tensor`: The mean of the others, `[...]`.
    """
    num_clients = values.shape[-1]
    return values.sort(dim=-1).values[..., num_trimmed : num_clients - num_trimmed].mean(dim=-1)


def merge_coordinatewise(
    global_state: Mapping[str, torch.Tensor],
    updates: Sequence[ClientUpdate],
    combine: Callable[[torch.Tensor], torch.Tensor],
    config: LoraConfig | None = None,
) -> MergeResult:
    """
    Merge every entry of the weight update on its own, and every entry of all other tensors, too.

    For LoRA, these are the entries of the products B A: A and B have no meaning of their own, and a client that
    uploads A R and R^-1 B uploads the same update. The result is truncated to the global rank. The numbers of examples
    are not used, since a client could claim any number.

    Args:
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        updates (`Sequence[ClientUpdate]`): What the clients uploaded.
        combine (`Callable`): Maps values `[n, C]` to the merged values `[n]`.
        config ([`~peft.LoraConfig`], *optional*): The configuration of the global adapter.

    Returns:
        [`MergeResult`]: The new state. For LoRA, the diagnostics contain `kept_energy`: for each module, the share of
        the squared norm that is left after truncation to the global rank.
    """
    targets = product_targets(global_state, config)
    others = {name: tensor for name, tensor in global_state.items() if not is_lora_matrix(name)}
    state = merge_matrices(others, updates, lambda M, weights: combine(M), select=lambda name: True)
    kept_energy = {}
    for target in targets:
        factors = [client_factors(target, update, global_state, config) for update in updates]
        d_out, d_in = len(factors[0][0]), factors[0][1].shape[1]
        rows = max(1, MAX_BLOCK_ENTRIES // (d_in * len(updates)))
        merged = torch.cat(
            [
                combine(torch.stack([B[start : start + rows] @ A for B, A in factors], dim=-1))
                for start in range(0, d_out, rows)
            ]
        )
        matrices, kept_energy[target.module] = truncated_factors(target, merged, None, like=global_state)
        state.update(matrices)
    return MergeResult({name: state[name] for name in global_state}, {"kept_energy": kept_energy} if targets else {})
