"""
Ravan for PEFT, and merging of adapters: importing this package registers RAVAN with PEFT.
"""

from .budget import optimizer_parameter_groups
from .config import RavanConfig
from .conversion import to_lora
from .gradient_bases import GradientSketch, initialize_bases_from_gradient
from .hub import UploadError, push_to_hub
from .inspection import AdapterReport, TargetReport, inspect_adapter
from .layer import RavanLayer
from .model import RavanModel
from .model_card import card_of_folder, make_model_card
from .reading import bases_fingerprint, different_bases
from .registration import register


__version__ = "0.1.0.dev0"

__all__ = [
    "AdapterReport",
    "GradientSketch",
    "RavanConfig",
    "RavanLayer",
    "RavanModel",
    "TargetReport",
    "UploadError",
    "__version__",
    "bases_fingerprint",
    "card_of_folder",
    "different_bases",
    "initialize_bases_from_gradient",
    "inspect_adapter",
    "make_model_card",
    "optimizer_parameter_groups",
    "push_to_hub",
    "to_lora",
]

register(config_cls=RavanConfig, model_cls=RavanModel)
