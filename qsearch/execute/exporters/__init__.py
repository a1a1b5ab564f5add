"""Exporters, one file each: a planned model in another tool's format."""
