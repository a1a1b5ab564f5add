"""Executors, one file each: who does the parts of a work, here or elsewhere."""
