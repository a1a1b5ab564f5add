"""Kinds of choices: formats and methods for weights, roundings and transforms of layer inputs; one
file a plug-in.
"""
