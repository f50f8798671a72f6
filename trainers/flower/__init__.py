"""
The same federation over Flower: the tasks and replies of [`~peft_ravan.trainers.FederatedTrainer`], carried to nodes.

It is imported only where it is used, since flwr is optional: `pip install peft-ravan[flower]`.
"""

from .client_app import make_client_app
from .nodes import TooFewNodesError
from .server_app import make_server_app


__all__ = ["TooFewNodesError", "make_client_app", "make_server_app"]
