"""Checkpoints: what is in one, where they are kept, how they are written and which one is loaded."""
