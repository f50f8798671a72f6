"""PEFT's own tests for tuners, run over Ravan: taken from the source distribution of the installed version of PEFT."""
