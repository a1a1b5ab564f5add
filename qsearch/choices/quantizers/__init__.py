"""Quantizers, one file each: a weight and a scheme in, codes and scales out."""
