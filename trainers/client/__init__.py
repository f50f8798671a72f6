"""A client of a federation: what it makes of a task, with its own data. It knows no server."""

from .local_client import LocalClient
from .settings import ClientSettings
from .store import ClientStore


__all__ = ["ClientSettings", "ClientStore", "LocalClient"]
