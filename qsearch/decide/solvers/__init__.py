"""Solvers, one file each: a scheme for every layer, within the budget."""
