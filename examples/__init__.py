"""Examples, which are installed as `peft_ravan.examples` for the command line."""
