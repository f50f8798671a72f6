"""An adapter on its way to others: its LoRA twin, what is in it, its card, its record, the Hub."""
