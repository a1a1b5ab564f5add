"""Activation quantizers, one file each: how a layer's input is rounded."""
