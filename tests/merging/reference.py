"""
The merge methods, implemented from their definitions with dense matrices in float64, and random rounds to compare them
on.

Nothing here calls the library's own helpers, so the two computations are independent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
from peft import LoraConfig

from peft_ravan.merging import MERGE_METHODS, ClientUpdate, MergeResult, merge

from ..properties import examples


State = dict[str, torch.Tensor]

PREFIX = "base_model.model.layers"
# modules and their [d_out, d_in]: tall, wide, square, and one that is smaller than the ranks
LORA_SHAPES = {f"{PREFIX}.0.q": (9, 5), f"{PREFIX}.1.q": (4, 8), f"{PREFIX}.1.v": (6, 6), f"{PREFIX}.0.tiny": (2, 3)}
CORES = {f"{PREFIX}.0.q.ravan_H": (3, 4, 4), f"{PREFIX}.1.q.ravan_H": (2, 3, 3)}
TASK_HEAD = "base_model.model.classifier.weight"
CONFIG = LoraConfig(r=3, lora_alpha=6)

few = examples(15)


def a_name(module: str) -> str:
    return f"{module}.lora_A.weight"


def b_name(module: str) -> str:
    return f"{module}.lora_B.weight"


# ---------------------------------------------------------------- random updates


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def lora_state(
    generator: torch.Generator,
    ranks: int | Mapping[str, int] = 3,
    dtype: torch.dtype = torch.float64,
    shapes: Mapping[str, tuple[int, int]] = LORA_SHAPES,
) -> State:
    """A and B of every module, in the order of a checkpoint, and a task head."""
    state = {}
    for module, (d_out, d_in) in shapes.items():
        rank = ranks if isinstance(ranks, int) else ranks[module]
        state[a_name(module)] = normal(generator, rank, d_in, dtype=dtype)
        state[b_name(module)] = normal(generator, d_out, rank, dtype=dtype)
    return {**state, TASK_HEAD: normal(generator, 3, 4, dtype=dtype)}


def ravan_state(generator: torch.Generator, dtype: torch.dtype = torch.float64, num_heads: int | None = None) -> State:
    """The products s*H of every target, and a task head."""
    shapes = {name: (num_heads or h, *shape) for name, (h, *shape) in CORES.items()}
    shapes[TASK_HEAD] = (3, 4)
    return {name: normal(generator, *shape, dtype=dtype) for name, shape in shapes.items()}


def client(state: Mapping[str, torch.Tensor], num_examples: int = 1, index: int = 0, **kwargs) -> ClientUpdate:
    return ClientUpdate(dict(state), num_examples, f"client_{index}", **kwargs)


def trained_some(update: ClientUpdate, masks: Mapping[str, Sequence[bool]]) -> ClientUpdate:
    """The update of a client that has all heads, restricted to the heads it trained."""
    heads = {name: torch.tensor(mask, dtype=torch.bool) for name, mask in masks.items()}
    state = {name: t[heads[name]] if name in heads else t for name, t in update.state.items()}
    return replace(update, state=state, trained_heads=heads)


def regauged(update: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
    """The same update with different factors: B R and R^-1 A with a random, well-conditioned R."""
    state = dict(update.state)
    for module in modules_of(state):
        A, B = state[a_name(module)], state[b_name(module)]
        Q, _ = torch.linalg.qr(normal(generator, len(A), len(A)))
        R = Q * (0.5 + 1.5 * torch.rand(len(A), generator=generator, dtype=torch.float64))
        state[b_name(module)], state[a_name(module)] = (B.double() @ R).to(B), (torch.linalg.inv(R) @ A.double()).to(A)
    return replace(update, state=state)


@dataclass(frozen=True)
class LoraRound:
    """A random round: the global adapter and the clients' uploads."""

    config: LoraConfig
    global_state: State
    updates: list[ClientUpdate]

    def mean_weight(self, module: str) -> torch.Tensor:
        return mean_weight(self.updates, module, self.config)


@st.composite
def lora_rounds(
    draw, min_clients: int = 1, max_clients: int = 4, different_ranks: bool = False, max_client_rank: int = 7
) -> LoraRound:
    """Random ranks, alphas, patterns and examples. Clients with other ranks have their own configurations."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    config = _draw_config(draw, draw(st.integers(1, 5)))
    global_state = lora_state(generator, ranks_of(config))
    updates = []
    for index in range(draw(st.integers(min_clients, max_clients))):
        own = (
            _draw_config(draw, draw(st.integers(1, max_client_rank)))
            if different_ranks and draw(st.booleans())
            else None
        )
        state = lora_state(generator, ranks_of(own or config, max_client_rank if own else None))
        updates.append(client(state, draw(st.integers(1, 100)), index, config=own))
    return LoraRound(config, global_state, updates)


def _draw_config(draw, rank: int) -> LoraConfig:
    patterns = [{}, {"q": 2}, {r"layers\.1\.q": 5, "v": 2}]
    alphas = [{}, {"v": 3}, {r"layers\.\d\.q": 7, "tiny": 1}]
    return LoraConfig(
        r=rank,
        lora_alpha=draw(st.sampled_from([1, 4, 16])),
        use_rslora=draw(st.booleans()),
        rank_pattern=draw(st.sampled_from(patterns)),
        alpha_pattern=draw(st.sampled_from(alphas)),
    )


# ---------------------------------------------------------------- LoRA by definition


def modules_of(state: Mapping[str, torch.Tensor]) -> list[str]:
    return [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]


def _from_pattern(pattern: Mapping[str, int], module: str, default: int) -> int:
    """As in PEFT: keys are regular expressions for the end of the module's name, and the first match wins."""
    return next((value for key, value in pattern.items() if re.search(rf"(^|\.)({key})$", module)), default)


def ranks_of(config: LoraConfig, at_most: int | None = None) -> dict[str, int]:
    ranks = {module: _from_pattern(config.rank_pattern, module, config.r) for module in LORA_SHAPES}
    return {module: min(rank, at_most or rank) for module, rank in ranks.items()}


def scaling_of(config: LoraConfig, module: str, rank: int) -> float:
    alpha = _from_pattern(config.alpha_pattern, module, config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def weight_of(state: Mapping[str, torch.Tensor], module: str, config: LoraConfig) -> torch.Tensor:
    """The weight update of a module, `[d_out, d_in]`."""
    A, B = state[a_name(module)].double(), state[b_name(module)].double()
    return scaling_of(config, module, len(A)) * sum(torch.outer(B[:, i], A[i]) for i in range(len(A)))


def weights_of(updates: Sequence[ClientUpdate]) -> list[float]:
    total = sum(update.num_examples for update in updates)
    return [update.num_examples / total for update in updates]


def mean_weight(updates: Sequence[ClientUpdate], module: str, config: LoraConfig) -> torch.Tensor:
    dense = [weight_of(update.state, module, update.config or config) for update in updates]
    return sum(weight * delta for weight, delta in zip(weights_of(updates), dense, strict=True))


def mean_tensor(updates: Sequence[ClientUpdate], name: str) -> torch.Tensor:
    return sum(
        weight * update.state[name].double() for weight, update in zip(weights_of(updates), updates, strict=True)
    )


def best_of_rank(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest matrix of a given rank (Eckart and Young)."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


# ---------------------------------------------------------------- the effective update of any adapter


def effective(state: Mapping[str, torch.Tensor], config: LoraConfig = CONFIG) -> State:
    """The effect of a state: the products of LoRA, and all other tensors unchanged."""
    modules = modules_of(state)
    products = {module: weight_of(state, module, config) for module in modules}
    factors = {name for module in modules for name in (a_name(module), b_name(module))}
    return products | {name: tensor.double() for name, tensor in state.items() if name not in factors}


def assert_same(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tol: float = 1e-9) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        difference = (actual[name].double() - tensor.double()).abs()
        assert (difference <= tol * (1 + tensor.double().abs())).all(), f"{name}: differs by up to {difference.max()}"


# ---------------------------------------------------------------- rules for the clients' values of one entry


def entrywise(rule: Callable[[list[float]], float], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Apply a rule for lists of numbers to each entry."""
    columns = zip(*(tensor.double().flatten().tolist() for tensor in tensors), strict=True)
    return torch.tensor([rule(list(column)) for column in columns], dtype=torch.float64).reshape(tensors[0].shape)


def trimmed(num_trimmed: int) -> Callable[[list[float]], float]:
    def rule(values: list[float]) -> float:
        kept = sorted(values)[num_trimmed : len(values) - num_trimmed]
        return sum(kept) / len(kept)

    return rule


def krum_scores(vectors: Sequence[torch.Tensor], num_bad_clients: int) -> list[float]:
    """Blanchard et al.: the sum of the squared distances to the C - f - 2 nearest other clients."""
    scores = []
    for i, vector in enumerate(vectors):
        others = sorted((vector - other).square().sum().item() for j, other in enumerate(vectors) if j != i)
        scores.append(sum(others[: len(vectors) - num_bad_clients - 2]))
    return scores


def ties_delta(deltas: Sequence[torch.Tensor], weights: Sequence[float], density: float) -> torch.Tensor:
    """Yadav et al., algorithm 1, for the updates of one matrix: trim, elect, disjoint mean."""
    num_kept = max(1, round(density * deltas[0].numel()))
    trimmed_deltas = []
    for delta in deltas:
        threshold = delta.abs().flatten().sort(descending=True).values[num_kept - 1]
        trimmed_deltas.append(torch.where(delta.abs() >= threshold, delta, 0.0))

    def elect_and_average(values: list[float]) -> float:
        elected = sum(weight * value for weight, value in zip(weights, values, strict=True))
        sign = 1 if elected >= 0 else -1
        agreeing = [(w, value) for w, value in zip(weights, values, strict=True) if value * sign > 0]
        total = sum(weight for weight, _ in agreeing)
        return sum(weight * value for weight, value in agreeing) / total if agreeing else 0.0

    return entrywise(elect_and_average, trimmed_deltas)


def pursue_principal_components(
    M: torch.Tensor, lambda_: float, max_iter: int = 5000
) -> tuple[torch.Tensor, torch.Tensor]:
    """min ||L||_* + lambda ||S||_1 with L + S = M, by plain ADMM (Candes et al. 2011, algorithm 1), to convergence."""
    mu = M.numel() / (4 * M.abs().sum())
    S, Y = torch.zeros_like(M), torch.zeros_like(M)
    for _ in range(max_iter):
        U, sigma, Vh = torch.linalg.svd(M - S + Y / mu, full_matrices=False)
        L = (U * (sigma - 1 / mu).clamp(min=0)) @ Vh
        residual = M - L + Y / mu
        S_new = residual.sign() * (residual.abs() - lambda_ / mu).clamp(min=0)
        step, S = (S_new - S).norm(), S_new
        Y = Y + mu * (M - L - S)
        if max(step, (M - L - S).norm()) < 1e-10 * M.norm():
            break
    return L, S


# ---------------------------------------------------------------- rounds for any method of the registry


ADAPTERS: dict[str, Callable[..., State]] = {
    "lora": lora_state,
    "ravan": ravan_state,
    "one-head": lambda generator, dtype=torch.float64: ravan_state(generator, dtype, num_heads=1),
}
# options with which merging one client, or identical ones, changes nothing
FAITHFUL = {"ties": {"density": 1.0}}


def upload(
    method: str, state: Mapping[str, torch.Tensor], global_state: Mapping[str, torch.Tensor], round_number: int = 1
) -> State:
    """The upload of a client of a method: without personal tensors, and with frozen tensors unchanged."""
    parts = MERGE_METHODS[method]
    frozen = parts.frozen_in(round_number)
    return {
        name: global_state[name] if any(part in name for part in frozen) else tensor
        for name, tensor in state.items()
        if not any(part in name for part in parts.personal_parts)
    }


def random_round(
    method: str, adapter: str, num_clients: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[State, list[ClientUpdate]]:
    """A global state and updates of clients with different numbers of examples."""
    generator = torch.Generator().manual_seed(seed)
    global_state = ADAPTERS[adapter](generator, dtype=dtype)
    states = [upload(method, ADAPTERS[adapter](generator, dtype=dtype), global_state) for _ in range(num_clients)]
    return global_state, [client(state, 3 * index + 1, index) for index, state in enumerate(states)]


def merge_faithfully(method: str, global_state: State, updates: Iterable[ClientUpdate], **kwargs) -> MergeResult:
    return merge(global_state, updates, method, config=CONFIG, **FAITHFUL.get(method, {}), **kwargs)


def effect_of(result: MergeResult) -> State:
    """The effect of the result of a merge, including residuals for base weights."""
    effect = effective(result.state, result.config or CONFIG)
    return effect | {module: effect[module] + delta.dense().double() for module, delta in result.base_deltas.items()}


def _suits(method: str, adapter: str) -> bool:
    try:
        merge_faithfully(method, *random_round(method, adapter))
    except ValueError as error:
        if "merges LoRA adapters" in str(error) or "merges Ravan adapters" in str(error):
            return False
        raise
    return True


# every method with every adapter that it accepts, with a single head where it needs that
CASES = [(method, adapter) for method in MERGE_METHODS for adapter in ("lora", "ravan") if _suits(method, adapter)]
CASES += [(method, "one-head") for method in MERGE_METHODS if all(method != known for known, _ in CASES)]
every_case = pytest.mark.parametrize("method, adapter", CASES, ids=["-".join(case) for case in CASES])
