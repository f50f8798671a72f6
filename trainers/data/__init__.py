"""The clients' data: how it is split, prepared and displayed."""
