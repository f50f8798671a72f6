"""
Krum: take the update of the one client whose nearest neighbours are closest.

Blanchard et al., Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, NeurIPS 2017.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from peft import LoraConfig

from ..distances import squared_distances
from ..method import MergeMethod
from ..truncation import mean_of_products
from ..updates import ClientUpdate, MergeResult, UpdateError


def krum_scores(
    global_state: Mapping[str, torch.Tensor],
    updates: Sequence[ClientUpdate],
    config: LoraConfig | None,
    num_bad_clients: int | None,
) -> tuple[torch.Tensor, int]:
    """
    Args:
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        updates (`Sequence[ClientUpdate]`): What C clients uploaded.
        config ([`~peft.LoraConfig`], *optional*): The configuration of the global adapter.
        num_bad_clients (`int`, *optional*): f, by default the largest number that C allows.

    Returns:
        `tuple[torch.Tensor, int]`: The sum of squared distances of each client to its C - f - 2 nearest neighbours,
        `[C]`, and f.

    Raises:
        UpdateError: if C is less than 2 f + 3. A single client is accepted.
        ValueError: if f is negative.
    """
    num_clients = len(updates)
    if num_bad_clients is None:
        num_bad_clients = max(0, (num_clients - 3) // 2)
    if num_bad_clients < 0:
        raise ValueError(f"Krum withstands 0 bad clients or more, got `num_bad_clients` = {num_bad_clients!r}.")
    if 1 < num_clients < 2 * num_bad_clients + 3:
        # this is no client's fault, and the round may succeed with other clients
        raise UpdateError(
            f"Krum needs 2 f + 3 clients or more to withstand f = `num_bad_clients` of them, got {num_clients} clients and "
            f"f = {num_bad_clients}."
        )
    distances = squared_distances(global_state, updates, config)
    nearest = distances.sort(dim=1).values[:, 1 : num_clients - num_bad_clients - 1]  # excluding the client itself
    return nearest.sum(dim=1), num_bad_clients


def merge_chosen(
    global_state: Mapping[str, torch.Tensor],
    updates: Sequence[ClientUpdate],
    config: LoraConfig | None,
    scores: torch.Tensor,
    num_chosen: int,
) -> MergeResult:
    """
    Average the clients with the lowest scores. All have the same weight, since a client could claim any number of
    examples.

    Args:
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        updates (`Sequence[ClientUpdate]`): What C clients uploaded.
        config ([`~peft.LoraConfig`], *optional*): The configuration of the global adapter.
        scores (`torch.Tensor`): `[C]`.
        num_chosen (`int`): How many clients to average.

    Returns:
        [`MergeResult`]: The mean state. The diagnostics contain the `chosen` clients and all `scores`.
    """
    names = [update.client_id or str(index) for index, update in enumerate(updates)]
    # two clients that are each other's nearest neighbours have the same score up to rounding: the name breaks the tie
    ranking = sorted(range(len(updates)), key=lambda index: (float(f"{scores[index]:.9e}"), names[index]))
    chosen = sorted(ranking[:num_chosen])
    state, _ = mean_of_products(global_state, [replace(updates[index], num_examples=1) for index in chosen], config)
    return MergeResult(
        {name: state[name] for name in global_state},
        {"chosen": [names[index] for index in chosen], "scores": dict(zip(names, scores.tolist(), strict=True))},
    )


def krum(
    global_state: Mapping[str, torch.Tensor],
    updates: Sequence[ClientUpdate],
    config: LoraConfig | None = None,
    num_bad_clients: int | None = None,
) -> MergeResult:
    """
    Choose one client. Distances are measured between weight updates: the products s*H, LoRA's products B A (computed
    from the factors), and the task head.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        updates (`Sequence[ClientUpdate]`):
            What the clients uploaded.
        config ([`~peft.LoraConfig`], *optional*):
            The configuration of the global adapter. Needed if LoRA ranks or alphas differ.
        num_bad_clients (`int`, *optional*):
            How many bad clients it shall withstand, f. By default the largest number that 2 f + 3 <= C allows.

    Returns:
        [`MergeResult`]: The state of the chosen client. For LoRA, its product is decomposed again. The diagnostics
        contain the `chosen` client and the `scores` of all clients.

    Raises:
        UpdateError: if there are fewer than 2 f + 3 clients.
    """
    scores, _ = krum_scores(global_state, updates, config, num_bad_clients)
    return merge_chosen(global_state, updates, config, scores, num_chosen=1)


METHOD = MergeMethod(
    name="krum",
    pretty_name="Krum",
    summary="The update of the client whose nearest neighbours are nearest is taken.",
    reference="https://huggingface.co/papers/1703.02757",
    function=krum,
    averages="nothing: one client is chosen by distances of s*H, or of BA",
    exact="no",
    cost="layer by layer; C² distances",
    different_ranks=True,
    decomposes=True,
)
