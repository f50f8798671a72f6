"""
Ravan for PEFT, and merging of adapters: importing this package registers RAVAN with PEFT.
"""

from .config import RavanConfig
from .layer import RavanLayer
from .model import RavanModel
from .registration import register


__version__ = "0.1.0.dev0"

__all__ = ["RavanConfig", "RavanLayer", "RavanModel", "__version__"]

register(config_cls=RavanConfig, model_cls=RavanModel)
