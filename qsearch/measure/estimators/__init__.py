"""How sensitivities are estimated, one file an estimator: it answers a `Question` with a table."""
