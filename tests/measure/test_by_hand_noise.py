"""The sweep's noise is that of weights exchanged by hand in a pipeline that is called plainly,
without hooks.
"""

from __future__ import annotations

import pytest

from tests.measure.by_hand import compared


@pytest.mark.parametrize("name", ["stable_diffusion_3", "sana", "wan_22"])
def test_the_sweep_agrees_with_weights_exchanged_by_hand(name: str) -> None:
    found = compared(name, 3, seed=1)

    assert len(found) == 3
    for layer, (ours, hand) in found.items():
        assert hand > 0, layer
        assert ours == pytest.approx(hand, rel=1e-6), layer
