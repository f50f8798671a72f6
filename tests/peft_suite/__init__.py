"""PEFT's own tests for tuners, run on Ravan. They come from the source distribution of the installed version."""
