"""
The parts of Ravan that `get_peft_model` needs: the configuration, the model and its layers, and the bases. In PEFT,
this would be `peft/tuners/ravan`.
"""
