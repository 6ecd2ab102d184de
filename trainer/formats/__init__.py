"""Training checkpoints of other programs, read and written: `longhaul checkpoint convert`."""
