"""How sensitivities are estimated, one file an estimator: `estimate(...)` yields the rows of a table."""
