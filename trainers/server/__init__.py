"""The server of a federation: who trains, what each is sent, and what becomes of what comes back. It knows no Trainer."""

from .merging import MergeSettings
from .server import Server
from .settings import ServerSettings
from .state import ServerState


__all__ = ["MergeSettings", "Server", "ServerSettings", "ServerState"]
