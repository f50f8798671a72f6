"""The tasks and replies of a federation over Flower. It is imported only when it is used, since flwr is optional."""
