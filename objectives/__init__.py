"""Objectives beside the paper's own: which hidden states belong together (the door is jepa.py)."""
