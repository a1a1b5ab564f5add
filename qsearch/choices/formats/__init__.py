"""Formats, one file each: how the codes of a weight (or of an input) are spelt, priced, found, and
laid out in memory.
"""
