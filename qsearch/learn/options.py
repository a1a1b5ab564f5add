"""Defaults of what learns and explains, said once."""

from __future__ import annotations

#: plug-in of surrogates
KIND = "xgboost"
#: parts of a cross-validation
FOLDS = 5
#: strongest pairs of layers that are explained
PAIRS = 100
