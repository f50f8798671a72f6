"""
Ravan for PEFT, and merging of adapters: importing this package registers RAVAN with PEFT.
"""

from .budget import optimizer_parameter_groups
from .config import RavanConfig
from .gradient_bases import GradientSketch, initialize_bases_from_gradient
from .layer import RavanLayer
from .model import RavanModel
from .registration import register


__version__ = "0.1.0.dev0"

__all__ = [
    "GradientSketch",
    "RavanConfig",
    "RavanLayer",
    "RavanModel",
    "__version__",
    "initialize_bases_from_gradient",
    "optimizer_parameter_groups",
]

register(config_cls=RavanConfig, model_cls=RavanModel)
