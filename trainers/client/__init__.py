"""A client of a federation: it turns a task into a reply, using its own data. It does not depend on the server."""

from .local_client import LocalClient
from .settings import ClientSettings
from .store import ClientStore


__all__ = ["ClientSettings", "ClientStore", "LocalClient"]
