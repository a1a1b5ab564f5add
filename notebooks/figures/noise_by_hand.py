"""Noise of layers at int4 by the sweep, against weights that are exchanged by hand in pipelines
that are called plainly, without hooks.

    PYTHONPATH=. python notebooks/figures/noise_by_hand.py [--layers 5]

The tests' tiny pipelines in their true classes. By hand: the layer's weight is rounded in plain
torch (symmetric, an fp16 scale for each output channel, the largest magnitude at 7), the pipeline's
own call makes final latents with the same generators, and the squared distance is divided by the
squared latents. Ours: the sweep over whole trajectories. Both must agree to 1e-6 of the noise.
Writes noise_by_hand.json.
"""

from __future__ import annotations

import argparse

from figure import publish

from tests.measure.by_hand import PIPELINES, compared


def main() -> None:
    """Compare and publish."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--pipelines", nargs="+", default=list(PIPELINES))
    options = parser.parse_args()
    rows = []
    for name in options.pipelines:
        found = compared(name, options.layers)
        worst = max(abs(ours / hand - 1) for ours, hand in found.values())
        rows.append(
            {
                "pipeline": name,
                "layers": len(found),
                "least noise": min(hand for _, hand in found.values()),
                "most noise": max(hand for _, hand in found.values()),
                "largest relative difference": worst,
            }
        )
        print(rows[-1], flush=True)
    publish(__file__, rows, title="Noise by the sweep against noise by hand", seed=4)


if __name__ == "__main__":
    main()
