"""Importers, one file each: what another tool chose, as schemes for the layers of a graph."""
