"""What people look at: callbacks, logs, tables, plots, and what a card says of a federation."""
