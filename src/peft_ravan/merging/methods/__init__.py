"""The merge methods and server optimizers, one file each, and the registry of all of them."""
