"""The server of a federation: it selects clients, sends them tasks and merges their replies. It needs no Trainer."""

from .merging import MergeSettings
from .server import Server
from .settings import ServerSettings
from .state import ServerState


__all__ = ["MergeSettings", "Server", "ServerSettings", "ServerState"]
