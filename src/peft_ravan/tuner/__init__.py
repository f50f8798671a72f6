"""
What `get_peft_model` needs of Ravan: the configuration, the model and its layers, the bases. It would map onto
`peft/tuners/ravan`.
"""
