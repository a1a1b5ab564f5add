"""Exporters, one file each: a planned model in somebody else's format."""
