"""Choices for a whole attention, one file each: what is computed in its place, and what that
carries from step to step.
"""
