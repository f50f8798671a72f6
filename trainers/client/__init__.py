"""A client of a federation: what it makes of a task, with its own data. It knows no server."""
