"""Surrogates, one file each: features of a plan in, predicted quality out."""
