"""The merge methods and server optimizers, one file each, and the registry that knows all of them."""
