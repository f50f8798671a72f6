"""
FlexLoRA: the clients' products B A are averaged, and the mean is decomposed again.

Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources, NeurIPS
2024. Clients may have different ranks. Each gets the first components of the decomposition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig

from ..lora import product_targets
from ..method import MergeMethod
from ..truncation import mean_of_products
from ..updates import ClientUpdate, MergeResult


def flexlora(
    global_state: Mapping[str, torch.Tensor], updates: Sequence[ClientUpdate], config: LoraConfig | None = None
) -> MergeResult:
    """
    Average the products of LoRA's B and A, and all other tensors.

    The decomposition is computed from the factors (`d * R` numbers, where R is the sum of the ranks), and from the
    `d_out x d_in` product only if that is smaller.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        updates (`Sequence[ClientUpdate]`):
            What the clients uploaded, with any ranks.
        config ([`~peft.LoraConfig`], *optional*):
            The configuration of the global adapter. Needed if ranks or alphas differ.

    Returns:
        [`MergeResult`]: The new state, with the global rank. [`lora_state_for_client`] extracts what a client of lower
        rank gets. The diagnostics contain `kept_energy`: for each module, the share of the squared norm that is left.

    Raises:
        ValueError: if there are no LoRA matrices, or if ranks differ and there is no `config`.
    """
    product_targets(global_state, config, required="FlexLoRA")
    state, kept_energy = mean_of_products(global_state, updates, config)
    return MergeResult(state, {"kept_energy": kept_energy})


METHOD = MergeMethod(
    name="flexlora",
    pretty_name="FlexLoRA",
    summary="The clients' products BA are averaged, and the mean is decomposed again at the global rank.",
    reference="https://huggingface.co/papers/2402.11505",
    function=flexlora,
    averages="BA",
    exact="up to the truncation of the rank",
    cost="layer by layer; a decomposition of rank C·r",
    different_ranks=True,
    decomposes=True,
)
