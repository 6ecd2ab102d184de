"""Trained networks in the forms that other programs load: `longhaul export`."""
