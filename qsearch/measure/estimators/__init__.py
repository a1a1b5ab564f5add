"""How sensitivities are estimated, one file an estimator: of an `EstimationTask` it makes a
table.
"""
