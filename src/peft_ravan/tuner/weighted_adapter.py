"""Combining adapters of one model into a new one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import nn

from .config import RavanConfig
from .functional import scaled_cores
from .layer import RavanLayer


# these combinations act on the cores and need adapters with the same bases
ON_SHARED_BASES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATION_TYPES = (*ON_SHARED_BASES, "cat")


def check_combination(
    model: BaseTuner, adapters: Sequence[str], weights: Sequence[float], combination_type: str, density: float | None
) -> None:
    """
    Check the arguments of [`RavanModel.add_weighted_adapter`].

    Raises:
        ValueError: if an adapter does not exist, if the weights do not match, if modules to save would have to be
            combined, or if the combination needs shared bases or a density and has none.
    """
    if not adapters:
        raise ValueError("Combining adapters needs at least one, got none.")
    for adapter in adapters:
        if adapter not in model.peft_config:
            raise ValueError(f"Adapter {adapter} does not exist")
        if model.peft_config[adapter].target_parameters:
            raise ValueError(
                f"add_weighted_adapter does not support targeting nn.Parameter (problematic adapter '{adapter}')"
            )
        if model.peft_config[adapter].trainable_token_indices:
            raise ValueError(
                f"add_weighted_adapter does not combine the embeddings of `trainable_token_indices` (adapter '{adapter}')."
            )
    if len(weights) != len(adapters):
        raise ValueError(f"There must be one weight per adapter, got {len(weights)} for {len(adapters)} adapters.")
    if combination_type not in COMBINATION_TYPES:
        raise ValueError(
            f"Invalid combination_type: {combination_type}. Choose one of {', '.join(COMBINATION_TYPES)}."
        )
    if combination_type not in ("linear", "cat") and density is None:
        raise ValueError(f"combination_type={combination_type!r} needs a `density` between 0 and 1.")
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    shared = [wrapper for wrapper in wrappers if sum(name in wrapper.modules_to_save for name in adapters) > 1]
    if shared:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(shared)} such instance(s)."
        )


def have_shared_bases(layer: RavanLayer, adapters: Sequence[str]) -> bool:
    """Whether adapters of a layer have the same bases, head by head."""
    first = adapters[0]
    return all(
        (layer.num_heads[name], layer.r[name]) == (layer.num_heads[first], layer.r[first])
        and torch.equal(layer.ravan_A[name], layer.ravan_A[first])
        and torch.equal(layer.ravan_B[name], layer.ravan_B[first])
        for name in adapters[1:]
    )


def combined_config(
    model: BaseTuner, layers: dict[str, RavanLayer], adapters: Sequence[str], concatenate: bool
) -> RavanConfig:
    """The configuration of the new adapter. Its targets are those of all adapters together."""
    first = model.peft_config[adapters[0]]
    # exact names, since the adapters may specify their targets in different ways
    common = {"target_modules": set(layers), "exclude_modules": None}
    common |= {"layers_to_transform": None, "layers_pattern": None}
    saved = {module for name in adapters for module in model.peft_config[name].modules_to_save or ()}
    common["modules_to_save"] = sorted(saved) or None
    rank_pattern, heads_pattern = {}, {}
    for name, layer in layers.items():
        present = [adapter for adapter in adapters if adapter in layer.ravan_H]
        key = re.escape(name)
        rank_pattern[key] = max(layer.r[adapter] for adapter in present)
        heads = [layer.num_heads[adapter] for adapter in present]
        heads_pattern[key] = sum(heads) if concatenate else heads[0]
    if not concatenate:
        return replace(first, **common, rank_pattern=rank_pattern, heads_pattern=heads_pattern)
    if not first.save_projection:
        raise ValueError(
            "Adapters with different bases can be combined only with `save_projection=True`: the stacked bases of the new "
            "adapter cannot be made again from one seed."
        )
    # the bases will be overwritten; "normal" has no limit that the total number of heads could exceed
    return replace(first, **common, init_bases="normal", rank_pattern=rank_pattern, heads_pattern=heads_pattern)


def copy_modules_to_save(model: BaseTuner, adapters: Sequence[str], new: str) -> None:
    """Give the new adapter the modules to save of the one adapter that has them."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and new in module.modules_to_save:
            for name in adapters:
                if name in module.modules_to_save:
                    module.modules_to_save[new].load_state_dict(module.modules_to_save[name].state_dict())


def concatenate_heads(layer: RavanLayer, adapters: Sequence[str], weights: Sequence[float], new: str) -> None:
    """
    Stack the heads of adapters, which is exact whatever their bases. Smaller ranks are padded with zeros. Every new
    scaling is 1.
    """
    r = layer.r[new]
    bases_A, bases_B, cores = [], [], []
    for name, weight in zip(adapters, weights, strict=True):
        num_heads, rank = layer.num_heads[name], layer.r[name]
        missing = r - rank
        basis_A, basis_B, core, scaling = layer.adapter_tensors(name)
        basis_A, basis_B = basis_A.reshape(num_heads, rank, -1), basis_B.reshape(-1, num_heads, rank)
        bases_A.append(nn.functional.pad(basis_A, (0, 0, 0, missing)).flatten(0, 1))
        bases_B.append(nn.functional.pad(basis_B, (0, missing)).flatten(1))
        cores.append(nn.functional.pad(weight * scaled_cores(core, scaling), (0, missing, 0, missing)))
    layer.ravan_A[new].copy_(torch.cat(bases_A, dim=0))
    layer.ravan_B[new].copy_(torch.cat(bases_B, dim=1))
    layer.ravan_H[new].copy_(torch.cat(cores))
    layer.ravan_s[new].fill_(1)


def core_combination(
    combination_type: str, density: float | None, majority_sign_method: str
) -> Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor] | None:
    """PEFT's function that combines task vectors, applied to products and weights. `None` for `"cat"`."""
    combinations = {
        "linear": task_arithmetic,
        "ties": partial(ties, density=density, majority_sign_method=majority_sign_method),
        "dare_linear": partial(dare_linear, density=density),
        "dare_ties": partial(dare_ties, density=density, majority_sign_method=majority_sign_method),
        "magnitude_prune": partial(magnitude_prune, density=density),
    }
    return combinations.get(combination_type)


def combine_cores(
    layer: RavanLayer,
    adapters: Sequence[str],
    weights: Sequence[float],
    new: str,
    combine: Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor],
) -> None:
    """Combine the products s*H of adapters with shared bases like task vectors. Every new scaling is 1."""
    products = [scaled_cores(*layer.adapter_tensors(name)[2:]) for name in adapters]
    layer.ravan_A[new].copy_(layer.ravan_A[adapters[0]])
    layer.ravan_B[new].copy_(layer.ravan_B[adapters[0]])
    layer.ravan_H[new].copy_(combine(products, torch.tensor(weights).to(products[0])))
    layer.ravan_s[new].fill_(1)
