"""Sharing an adapter: its LoRA twin, inspection, its model card, its federation record, and the Hub."""
