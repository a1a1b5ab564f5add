"""MixDQ's published sensitivities as a table of ours: half of the 8-bit rows lie at the
measurement's floor, and the step law predicts the others.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from qsearch.core.table import SensitivityTable

pytestmark = pytest.mark.reference
#: SQNR that its log gives without any quantization, in dB (shared research notes, A3)
FLOOR = 10 ** (-83.793 / 10)


@pytest.fixture(scope="module")
def table(published: Path) -> SensitivityTable:
    """Noise powers of 794 layers at 2, 4 and 8 bits (asymmetric, per channel), of one step."""
    decibels = yaml.safe_load((published / "weight_sqnr_db.yaml").read_text())
    shared = {
        "step": 0,
        "metric": "noise",
        "error": 0.0,
        "floor": FLOOR,
        "estimator": "sweep",
        "seed": 42,
    }
    rows = [
        {"site": site, "scheme": f"uint{bits}-c", "estimate": 10 ** (-value / 10), **shared}
        for site, values in decibels.items()
        for bits, value in zip((2, 4, 8), values, strict=True)
    ]
    return SensitivityTable.from_rows("mixdq", rows)


def test_rows_at_the_floor_are_flagged(table: SensitivityTable) -> None:
    flagged = table.at_floor().groupby("scheme").size().to_dict()

    assert len(table.frame) == 3 * 794
    assert 0.5 * 794 < flagged["uint8-c"] < 0.7 * 794
    assert (
        flagged["uint2-c"] < flagged["uint4-c"] < 0.1 * 794
    )  # text keys and queries that hardly matter in one step


def test_values_at_8_bits_follow_from_those_at_4(table: SensitivityTable) -> None:
    values = table.values()
    four, eight = (
        np.array([row[scheme] for row in values.values()]) for scheme in ("uint4-c", "uint8-c")
    )

    ideal = four * (15 / 255) ** 2  # the step shrinks from a 15th of the range to a 255th
    still = ideal < 0.1 * FLOOR
    assert still.sum() > 200
    floor = float(
        eight[still].mean()
    )  # the log's one draw, 83.79 dB, again, from 242 choices that do nothing that could be seen
    assert -10 * np.log10(floor) == pytest.approx(83.79, abs=0.25)

    error = np.abs(10 * np.log10((ideal + floor) / eight))
    assert error.mean() <= 0.56
