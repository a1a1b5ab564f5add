"""Low-bit kernels: a bit layout, the meaning of every operation in plain torch, and its fast
twins.
"""
