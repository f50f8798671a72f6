"""
FLoRA-NA: combine the clients' A and the clients' B such that the product is nearest to the mean of the products.

Nguyen et al., Communication-Efficient and Accurate Approach for Aggregation in Federated Low-Rank Adaptation, 2025.
The server finds A = sum p_c A_c and B = sum q_c B_c, so a client sends and receives no more than with FedIT. Given p,
finding the best q is a least squares problem with C unknowns, and vice versa.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig

from ...tuner.linalg import pseudo_inverse
from ..averaging import client_weights, mean_state
from ..lora import is_lora_matrix, product_targets
from ..method import MergeMethod
from ..updates import ClientUpdate, MergeResult


def flora_na(
    global_state: Mapping[str, torch.Tensor],
    updates: Sequence[ClientUpdate],
    config: LoraConfig | None = None,
    num_steps: int = 10,
) -> MergeResult:
    """
    Combine A and B with separate weights, and average all other tensors.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        updates (`Sequence[ClientUpdate]`):
            What the clients uploaded.
        config ([`~peft.LoraConfig`], *optional*):
            The configuration of the adapter.
        num_steps (`int`, *optional*, defaults to 10):
            How often the weights of B and then those of A are chosen anew, starting from the clients' shares of the
            examples. 0 is FedIT.

    Returns:
        [`MergeResult`]: The new state. For each module, the diagnostics contain the distance from the mean of the
        products relative to the norm of that mean (`relative_error`), and the same for the means of A and B
        (`relative_error_of_means`).

    Raises:
        ValueError: if there are no LoRA matrices, if the adapter adds something other than their products to the
            weights, or if `num_steps` is not an integer of 0 or more.
    """
    targets = product_targets(global_state, config, required="FLoRA-NA")
    if isinstance(num_steps, bool) or not hasattr(num_steps, "__index__") or operator.index(num_steps) < 0:
        raise ValueError(f"flora_na: `num_steps` must be an integer of 0 or more, got {num_steps!r}.")
    weights = client_weights(updates)
    lora_names = tuple(name for name in global_state if is_lora_matrix(name))
    state = mean_state(global_state, updates, leave_out=lora_names)
    relative_error, relative_error_of_means = {}, {}
    for target in targets:
        pairs = [target.factors(update.state) for update in updates]
        Bs, As = (torch.stack(factors).double() for factors in zip(*pairs, strict=True))  # [C, d_out, r], [C, r, d_in]
        grams_B, grams_A = torch.einsum("cki,dkj->cidj", Bs, Bs), torch.einsum("cik,djk->cidj", As, As)
        shares = weights.to(Bs)
        p = q = shares
        relative_error_of_means[target.module] = _relative_error(grams_B, grams_A, shares, q, p)
        for _ in range(num_steps):
            q = _best_weights(grams_B, grams_A, shares, q, p)
            p = _best_weights(grams_A, grams_B, shares, p, q)
        relative_error[target.module] = _relative_error(grams_B, grams_A, shares, q, p)
        B, A = torch.einsum("c,cij->ij", q, Bs), torch.einsum("c,cij->ij", p, As)
        state.update(target.as_state(B, A, like=global_state))
    errors = {"relative_error": relative_error, "relative_error_of_means": relative_error_of_means}
    return MergeResult(state, errors)


def _normal_equations(
    own: torch.Tensor, other: torch.Tensor, shares: torch.Tensor, other_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The inner products of the terms of a combination with each other and with the mean of the products. If B is the
    factor to combine and A the other one, these are `<B_c A, B_d A>` and `<B_c A, sum_d w_d B_d A_d>`.

    Args:
        own (`torch.Tensor`): The inner products of the factors to combine along their long side, `[C, r, C, r]`.
        other (`torch.Tensor`): The same for the other factors.
        shares (`torch.Tensor`): The clients' shares of the examples, w, `[C]`.
        other_weights (`torch.Tensor`): The weights of the other factors, `[C]`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `[C, C]` and `[C]`.
    """
    with_combination = torch.einsum("djei,e->dji", other, other_weights)  # A_d A^T, [C, r, r]
    combination = torch.einsum("d,dji->ij", other_weights, with_combination)  # A A^T, [r, r]
    return (
        torch.einsum("cidj,ij->cd", own, combination),
        torch.einsum("cidj,d,dji->c", own, shares, with_combination),
    )


def _best_weights(
    own: torch.Tensor, other: torch.Tensor, shares: torch.Tensor, weights: torch.Tensor, other_weights: torch.Tensor
) -> torch.Tensor:
    """
    The least squares weights of the factors to combine. Of several solutions, the one nearest to the current weights.
    """
    gram, products = _normal_equations(own, other, shares, other_weights)
    return weights + pseudo_inverse(gram) @ (products - gram @ weights)


def _relative_error(
    grams_B: torch.Tensor, grams_A: torch.Tensor, shares: torch.Tensor, q: torch.Tensor, p: torch.Tensor
) -> float:
    """The Frobenius norm of `B A - mean(B_c A_c)` relative to that of `mean(B_c A_c)`, or 0 for a mean of zeros."""
    gram, products = _normal_equations(grams_B, grams_A, shares, p)
    target = torch.einsum("c,cidj,d,cidj->", shares, grams_B, shares, grams_A).item()
    error = target - 2 * (q @ products).item() + (q @ gram @ q).item()
    return math.sqrt(max(error, 0.0) / target) if target > 0 else 0.0


METHOD = MergeMethod(
    name="flora_na",
    pretty_name="FLoRA-NA",
    summary="LoRA's A and B are combined with weights that bring their product nearest to the mean of the products BA.",
    reference="https://huggingface.co/papers/2509.26399",
    function=flora_na,
    averages="A and B, apart, with weights for which BA is near mean(BA)",
    exact="up to what combinations allow",
    cost="layer by layer; products with C·r x C·r matrices",
)
