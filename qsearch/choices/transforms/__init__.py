"""Transforms, one file each: what is done to a layer's input, and undone in its weight, before both
are rounded.
"""
