"""Multistage autoregressive generation with flow matching: a reading of the abstract of ECAR.

ECAR (arXiv:2412.14170) generates token maps of rising resolution with an autoregressive
transformer, and the flow network of each stage carries the distribution only a part of the way
from noise to picture. No code is public. What the abstract leaves open is filled in here from
Pyramid Flow (arXiv:2410.05954): noise levels of the stages, and the renoise between two of them.
"""
