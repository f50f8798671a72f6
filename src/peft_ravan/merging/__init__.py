"""
Merging what clients upload, with pure functions that know nothing about rounds, files or the network.

    merge(global_state, updates, method="ravan") -> MergeResult(state, diagnostics)
"""

from ..tuner.state import checkpoint_state, exchange_state
from .base_deltas import BaseDelta, add_base_deltas
from .changes import clip_change
from .checking import UpdateChecker
from .limits import UpdateLimits
from .lora import lora_state_for_client
from .merge import merge
from .method import MergeMethod, ServerOptimizer
from .methods.registry import MERGE_METHODS, SERVER_OPTIMIZERS, get_merge_method, get_server_optimizer, methods_table
from .plain import plain_update
from .privacy import GaussianMechanism
from .robust_pca import RobustPCAInfo, robust_pca
from .safetensors_state import SafetensorsState
from .server_step import ServerStep
from .updates import ClientUpdate, MergeResult, UpdateError


__all__ = [
    "MERGE_METHODS",
    "SERVER_OPTIMIZERS",
    "BaseDelta",
    "ClientUpdate",
    "GaussianMechanism",
    "MergeMethod",
    "MergeResult",
    "RobustPCAInfo",
    "SafetensorsState",
    "ServerOptimizer",
    "ServerStep",
    "UpdateChecker",
    "UpdateError",
    "UpdateLimits",
    "add_base_deltas",
    "checkpoint_state",
    "clip_change",
    "exchange_state",
    "get_merge_method",
    "get_server_optimizer",
    "lora_state_for_client",
    "merge",
    "methods_table",
    "plain_update",
    "robust_pca",
]
