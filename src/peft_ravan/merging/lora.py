"""
LoRA adapters by the names in their checkpoint: which A belongs to which B, and how their product enters the weight.

The update of a weight is `scaling * B @ A` with scaling = alpha / r (or alpha / sqrt(r) with rsLoRA). A and B have no
meaning of their own: A R and R^-1 B are the same update for every invertible R.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from ..tuner.state import has_part
from .updates import ClientUpdate


A_PARTS = (".lora_A.", ".lora_embedding_A")
B_PARTS = (".lora_B.", ".lora_embedding_B")
# LoRA initialises one of A and B with zeros and the other one, called the frame, randomly: A, or B for an embedding
ZERO_PARTS = (".lora_B.", ".lora_embedding_A")
FRAME_PARTS = (".lora_A.", ".lora_embedding_B")
_A_NAME = re.compile(r"(?P<module>.+)\.lora_(A\.weight|embedding_A)")
# with these (DoRA, AdaLoRA), the update of the weight is not scaling * B A
_OTHER_PARTS = (".lora_magnitude_vector", ".lora_E")


@dataclass(frozen=True)
class LoraTarget:
    """
    The matrices of one adapted module.

    Args:
        module (`str`): The name of the module in the PEFT model.
        A_name (`str`): The checkpoint name of A: `[r, d_in]`, or `[r, c_in, k, k]` for a convolution.
        B_name (`str`): The checkpoint name of B: `[d_out, r]`, or `[c_out, r, 1, 1]`.
    """

    module: str
    A_name: str
    B_name: str

    @property
    def bias_name(self) -> str:
        """The checkpoint name of the bias that B has with `lora_bias=True`. The layer scales it like B A."""
        return f"{self.module}.lora_B.bias"

    @property
    def is_embedding(self) -> bool:
        """
        Whether the module is an embedding. There, LoRA starts with A = 0 and a random B, not the other way round.
        """
        return self.A_name.endswith(".lora_embedding_A")

    def swapped(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Convert between B and A on the one hand and the factor that starts at zero and the frame on the other, in both
        directions. The latter are B and A themselves, or A^T and B^T for an embedding.

        Args:
            first (`torch.Tensor`): B `[d_out, r]`, or the factor that starts with zeros, `[d, r]`.
            second (`torch.Tensor`): A `[r, d_in]`, or the frame, `[r, d']`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The other pair.
        """
        return (second.T, first.T) if self.is_embedding else (first, second)

    def rank(self, state: Mapping[str, torch.Tensor]) -> int:
        """The rank of the module in a state."""
        return state[self.A_name].shape[0]

    def factors(self, state: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            state (`Mapping[str, torch.Tensor]`): Checkpoint names to tensors.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: B `[d_out, r]` and A `[r, d_in]`, with flattened kernels, in at least
            float32.
        """
        dtype = torch.promote_types(state[self.A_name].dtype, torch.float32)
        return state[self.B_name].flatten(1).to(dtype), state[self.A_name].flatten(1).to(dtype)

    def as_state(self, B: torch.Tensor, A: torch.Tensor, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        The inverse of [`LoraTarget.factors`].

        Args:
            B (`torch.Tensor`): `[d_out, r]`, with any rank.
            A (`torch.Tensor`): `[r, d_in]`.
            like (`Mapping[str, torch.Tensor]`): The state whose kernel sizes, dtypes and devices are taken.

        Returns:
            `dict[str, torch.Tensor]`: A and B by their names.
        """
        like_A, like_B = like[self.A_name], like[self.B_name]
        return {
            self.A_name: A.reshape(len(A), *like_A.shape[1:]).to(like_A).contiguous(),
            self.B_name: B.reshape(len(B), -1, *like_B.shape[2:]).to(like_B).contiguous(),
        }


def is_lora_matrix(name: str) -> bool:
    """Whether a checkpoint name is that of a LoRA A or B."""
    return has_part(name, A_PARTS + B_PARTS) and not name.endswith(".bias")


def lora_targets(state: Mapping[str, torch.Tensor]) -> list[LoraTarget]:
    """
    Find the pairs of A and B.

    Args:
        state (`Mapping[str, torch.Tensor]`): Checkpoint names to tensors.

    Returns:
        `list[LoraTarget]`: One for each adapted module.
    """
    matches = [match for name in state if (match := _A_NAME.fullmatch(name))]
    names = [(match["module"], match[0], match[2].replace("A", "B", 1)) for match in matches]
    return [LoraTarget(module, A_name, f"{module}.lora_{B_name}") for module, A_name, B_name in names]


def require_lora(state: Mapping[str, torch.Tensor], parts: tuple[str, ...], method: str) -> None:
    """
    Args:
        state (`Mapping[str, torch.Tensor]`): Checkpoint names to tensors.
        parts (`tuple[str, ...]`): Parts of tensor names, `A_PARTS` or `B_PARTS`.
        method (`str`): The display name of the method.

    Raises:
        ValueError: if there are no such tensors, or they belong to DoRA or AdaLoRA.
    """
    _check_plain(state)
    if not any(part in name for name in state for part in parts):
        raise ValueError(
            f"{method} merges LoRA adapters, but the global state has no LoRA matrices. For Ravan use method='ravan'."
        )


def _check_plain(state: Mapping[str, torch.Tensor]) -> None:
    other = [name for name in state if has_part(name, _OTHER_PARTS)]
    if other:
        raise ValueError(
            f"Tensor {other[0]!r}: with DoRA or AdaLoRA the update of a weight is not the product B A, which this method "
            "merges. Use a method that averages tensors, such as 'fedavg'."
        )


def product_targets(
    state: Mapping[str, torch.Tensor], config: LoraConfig | None = None, required: str = ""
) -> list[LoraTarget]:
    """
    Find the pairs of A and B whose scaled product is the update of a weight.

    Args:
        state (`Mapping[str, torch.Tensor]`): Checkpoint names to tensors.
        config ([`~peft.LoraConfig`], *optional*): The configuration of the adapter.
        required (`str`, *optional*): The name of a method that needs such pairs.

    Returns:
        `list[LoraTarget]`: One for each adapted module.

    Raises:
        ValueError: if the adapter adds something other than the products of A and B to the weights (DoRA, AdaLoRA,
            grouped convolutions, adapted parameters), if there are no pairs although a method requires them, or if
            `config` is not a LoRA configuration.
    """
    _check_plain(state)
    targets = lora_targets(state)
    if targets and config is not None and not isinstance(config, LoraConfig):
        raise ValueError(
            f"`config` must be a LoraConfig, since the adapter is LoRA, got {type(config).__name__}. Give the configuration "
            "of the global adapter."
        )
    if targets and config is not None and config.target_parameters:
        raise ValueError(
            "With `target_parameters` A and B hold many matrices each, whose products are not formed here. Use a method "
            "that averages tensors, such as 'fedavg'."
        )
    for target in targets:
        B, A = target.factors(state)
        if B.shape[1] != A.shape[0]:
            raise ValueError(
                f"Tensor {target.B_name!r}: its rank is {B.shape[1]}, but that of A is {A.shape[0]}. Grouped convolutions "
                "have no product B A. Use a method that averages tensors, such as 'fedavg'."
            )
    if required:
        require_lora(state, A_PARTS, required)
    return targets


def lora_scaling(config: LoraConfig, module: str, rank: int) -> float:
    """
    The factor of B A in the update of the weight.

    Args:
        config ([`~peft.LoraConfig`]): The configuration of the adapter.
        module (`str`): The name of the module in the PEFT model.
        rank (`int`): The rank of the module.

    Returns:
        `float`: alpha / r, or alpha / sqrt(r) with rsLoRA.
    """
    name = module.removeprefix("base_model.model.")
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def client_factors(
    target: LoraTarget,
    update: ClientUpdate,
    global_state: Mapping[str, torch.Tensor],
    config: LoraConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What a client uploaded for a module, converted to the scaling of the global adapter. The client may have a
    different alpha or rank.

    Args:
        target ([`LoraTarget`]): The module.
        update ([`ClientUpdate`]): What the client uploaded.
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        config ([`~peft.LoraConfig`], *optional*): The configuration of the global adapter.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: B `[d_out, r_c]` and A `[r_c, d_in]`.

    Raises:
        ValueError: if the client's scaling is not known.
    """
    B, A = target.factors(update.state)
    rank = target.rank(global_state)
    if len(A) == rank and update.config is None:
        return B, A
    if config is None:
        raise ValueError(
            f"client {update.client_id!r}, module {target.module!r}: its rank is {len(A)}, that of the global adapter "
            f"{rank}, and what alpha / r makes of that is not known. Give `config`, the LoraConfig of the global adapter."
        )
    scaling = lora_scaling(update.config or config, target.module, len(A))
    return scaling / lora_scaling(config, target.module, rank) * B, A


def keep_trainable(
    B: torch.Tensor, A: torch.Tensor, global_B: torch.Tensor, global_A: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A direction that is zero in both B and A would never get a gradient again. It gets the global row of A or, if that
    is zero (as at the start of an embedding), the global column of B. The product does not change.

    Args:
        B (`torch.Tensor`): `[d_out, r]`.
        A (`torch.Tensor`): `[r, d_in]`.
        global_B (`torch.Tensor`): `[d_out, r]`.
        global_A (`torch.Tensor`): `[r, d_in]`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: B and A.
    """
    A = torch.where(_dead(B, A)[:, None], global_A, A)
    return torch.where(_dead(B, A), global_B, B), A


def _dead(B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    return (B == 0).all(dim=0) & (A == 0).all(dim=1)  # [r]


def stacked_factors(
    target: LoraTarget,
    updates: Sequence[ClientUpdate],
    weights: torch.Tensor,
    global_state: Mapping[str, torch.Tensor],
    config: LoraConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The weighted mean of the clients' products B A, as one product.

    Args:
        target ([`LoraTarget`]): The module.
        updates (`Sequence[ClientUpdate]`): What C clients uploaded.
        weights (`torch.Tensor`): The clients' weights, `[C]`.
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        config ([`~peft.LoraConfig`], *optional*): The configuration of the global adapter.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `[w_1 B_1 ... w_C B_C]`, of shape `[d_out, R]`, and A_1 to A_C stacked,
        `[R, d_in]`, where R is the sum of the ranks.
    """
    factors = [client_factors(target, update, global_state, config) for update in updates]
    left = torch.cat([weight * B for (B, _), weight in zip(factors, weights.tolist(), strict=True)], dim=1)
    return left, torch.cat([A for _, A in factors])


def config_with_ranks(config: LoraConfig, old_ranks: Mapping[str, int], new_ranks: Mapping[str, int]) -> LoraConfig:
    """
    Change the ranks of a configuration, and alpha such that the scaling of every module stays the same.

    Args:
        config ([`~peft.LoraConfig`]): The configuration.
        old_ranks (`Mapping[str, int]`): The rank of each adapted module, by its name in the PEFT model.
        new_ranks (`Mapping[str, int]`): The new rank of each.

    Returns:
        [`~peft.LoraConfig`]: A changed copy.
    """
    alphas = {}
    for module, rank in new_ranks.items():
        scaling = lora_scaling(config, module, old_ranks[module])
        alpha = scaling * (math.sqrt(rank) if config.use_rslora else rank)
        alphas[module] = round(alpha) if math.isclose(alpha, round(alpha)) else alpha
    # one name can be the suffix of another, and the first pattern that matches wins
    modules = sorted(new_ranks, key=len, reverse=True)
    first = modules[0]
    return replace(
        config,
        r=new_ranks[first],
        lora_alpha=alphas[first],
        rank_pattern=_pattern({module: new_ranks[module] for module in modules}),
        alpha_pattern=_pattern({module: alphas[module] for module in modules}),
    )


def _pattern(values: Mapping[str, float]) -> dict[str, float]:
    if len(set(values.values())) == 1:
        return {}
    return {module.removeprefix("base_model.model."): value for module, value in values.items()}


def lora_state_for_client(
    state: Mapping[str, torch.Tensor], config: LoraConfig, client_config: LoraConfig
) -> dict[str, torch.Tensor]:
    """
    The part of a global LoRA adapter that a client of lower rank gets: the first rows of A and columns of B, in the
    client's own scaling. After `"flexlora"`, which sorts them by singular value, this is the best approximation of
    that rank. After `"hetlora"`, it is what the paper sends.

    Args:
        state (`Mapping[str, torch.Tensor]`): The global state.
        config ([`~peft.LoraConfig`]): The configuration of the global adapter.
        client_config ([`~peft.LoraConfig`]): The configuration of the client.

    Returns:
        `dict[str, torch.Tensor]`: The state of the client's adapter. Tensors that are not LoRA matrices are taken from
        `state` without a copy.

    Raises:
        ValueError: if the client's rank is above the rank of the global adapter, or if the scaling differs with
            `lora_bias`.
    """
    client_state = dict(state)
    for target in product_targets(state, config):
        B, A = target.factors(state)
        name = target.module.removeprefix("base_model.model.")
        rank = client_config.rank_pattern.get(get_pattern_key(client_config.rank_pattern, name), client_config.r)
        if rank > len(A):
            raise ValueError(
                f"Module {target.module!r}: the client's rank {rank} is above the rank {len(A)} of the global adapter. Give "
                "the global adapter the largest rank of all clients."
            )
        scaling, own_scaling = (
            lora_scaling(config, target.module, len(A)),
            lora_scaling(client_config, target.module, rank),
        )
        if target.bias_name in state and not math.isclose(scaling, own_scaling):
            raise ValueError(
                f"Module {target.module!r}: with `lora_bias` all clients need the scaling of the global adapter, {scaling:g}, "
                f"but that of the client is {own_scaling:g}. Choose its lora_alpha so that they agree."
            )
        factor = scaling / own_scaling
        client_state.update(target.as_state(factor * B[:, :rank], A[:rank], like=state))
    return client_state
