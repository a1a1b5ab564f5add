"""Metrics, one file each: how far an output is from its reference."""
