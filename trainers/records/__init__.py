"""Records of a federation: callbacks, logs, tables, plots, and its description in the model card."""
