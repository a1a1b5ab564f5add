"""Plans: MixDQ's published ones solved again, and the time of a frontier.

    python notebooks/figures/plans.py [--reference FOLDER] [--seed 0]

MixDQ's four published integer programs, solved again, and one joint problem in noise power at the
size of each of its two plans (FOLDER has its tables, `mixdq/*.yaml`: ../shared/reference beside the
clone, or what QSEARCH_REFERENCE says). Then 50 budgets in one pass, one budget solved exactly and
one with interactions, on as many layers as SDXL has and on 3,000, made up. A minute. What plans of
every kind measure at equal stored bits: arena.py. Writes plans.json.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from figure import publish

from qsearch.core.scheme import Scheme
from qsearch.decide.frontier import frontier
from qsearch.decide.problem import Problem
from qsearch.decide.solvers import ilp, local

BITS = (2, 4, 8)


# -------------------------------------------------------------------------- MixDQ's published plans


def problem(loss: dict[str, dict[int, float]], weights: dict[str, float], limit: float) -> Problem:
    """Least sum of losses, layer -> bits -> loss, at no more than `limit` weight-bits in all."""
    return Problem(
        sites=tuple(loss),
        choices=tuple(tuple(Scheme.parse(f"uint{b}-c") for b in row) for row in loss.values()),
        values=tuple(np.array(list(row.values())) for row in loss.values()),
        costs={
            "average_bits": tuple(
                weights[name] * np.array(list(row), float) for name, row in loss.items()
            )
        },
        limits={"average_bits": limit},
    )


def reference(folder: Path) -> list[dict[str, Any]]:
    """Its four integer programs, then one joint problem in noise power at each published size."""
    files = {
        path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in (folder / "mixdq").glob("*.yaml")
    }
    sqnr, ssim, weights = files["weight_sqnr_db"], files["weight_ssim"], files["weight_ratio"]
    rows = []
    for name in ("plan_weight_4.00", "plan_weight_5.02"):
        published = files[name]
        for group, table, best in (
            ("content", ssim, 1.0),
            ("quality", {k: v for k, v in sqnr.items() if k not in ssim}, 120.0),
        ):
            loss = {
                n: {
                    b: best - x
                    for b, x in zip(BITS, row, strict=True)
                    if group == "content" or b > 2
                }
                for n, row in table.items()
            }
            began = time.perf_counter()
            chosen, said = ilp.solve(
                problem(loss, weights, sum(weights[n] * published[n] for n in table))
            )
            seconds = time.perf_counter() - began
            single = {n: s for n, s in chosen.items() if isinstance(s, Scheme)}
            value = sum(table[n][BITS.index(s.bits)] for n, s in single.items())
            same = sum(s.bits == published[n] for n, s in single.items())
            rows.append(
                {
                    "plan": name,
                    "problem": group,
                    "objective": value,
                    "equal to it": f"{same}/{len(table)}",
                    "status": said.status,
                    "s": seconds,
                }
            )
        noise = {
            n: {b: 10 ** (-x / 10) for b, x in zip(BITS, row, strict=True)}
            for n, row in sqnr.items()
        }
        began = time.perf_counter()
        chosen, said = ilp.solve(
            problem(noise, weights, sum(weights[n] * published[n] for n in sqnr))
        )
        seconds = time.perf_counter() - began
        for whose, bits in (
            ("published", published),
            ("joint, noise power", {n: s.bits for n, s in chosen.items() if isinstance(s, Scheme)}),
        ):
            decibels = -10 * math.log10(sum(noise[n][bits[n]] for n in sqnr))
            lost = sum(ssim[n][2] - ssim[n][BITS.index(bits[n])] for n in ssim)
            text = f"{decibels:.2f} dB, SSIM lost {lost:.4f}"
            rows.append(
                {
                    "plan": name,
                    "problem": whose,
                    "objective": decibels,
                    "equal to it": text,
                    "status": said.status,
                    "s": seconds,
                }
            )
    return rows


# ----------------------------------------------------------------------------------------- frontier


def random_problem(sites: int, choices: int, seed: int) -> Problem:
    """Layers whose sizes span three decades, noise that falls by about 6 dB a bit, over five
    decades from layer to layer.
    """
    dice = np.random.default_rng(seed)
    bits = np.linspace(2, 8, choices)
    options = tuple(Scheme.parse(f"uint{2 + i % 7}-g{8 * (1 + i)}") for i in range(choices))
    sizes = 10 ** dice.uniform(0, 3, sites)
    values = tuple(
        10 ** (dice.normal(-4, 1.2) - 0.6 * bits + dice.normal(0, 0.15, choices))
        for _ in range(sites)
    )
    costs = tuple(size * bits * dice.uniform(0.97, 1.03, choices) / sizes.sum() for size in sizes)
    return Problem(
        tuple(f"s{i}" for i in range(sites)),
        (options,) * sites,
        values,
        {"average_bits": costs},
        {"average_bits": 4.0},
    )


def with_probes(asked: Problem, seed: int) -> Problem:
    """The same with responses of 24 probes, which share a part, so that choices interact."""
    dice = np.random.default_rng(seed)
    sites, choices = len(asked.sites), len(asked.choices[0])
    scores = dice.normal(size=(24, sites, choices)) + 0.3 * dice.normal(size=(24, 1, 1))
    scores *= np.sqrt(np.array(asked.values) / (scores**2).mean(0))
    return replace(asked, scores=scores, trust=0.1)


def whole(asked: Problem, allowed: float) -> tuple[str, float | None]:
    """50 budgets at once: what was done, and the largest gap."""
    answers = frontier(asked, "average_bits", [float(b) for b in np.linspace(2.5, 7.5, 50)])
    gaps = [answer[1].gap for answer in answers if isinstance(answer, tuple)]
    return f"{len(gaps)} budgets in one pass", max(g for g in gaps if g is not None)


def exact(asked: Problem, allowed: float) -> tuple[str, float | None]:
    """One budget by the integer program."""
    _, said = ilp.solve(asked, seconds=allowed)
    return f"ilp at 4 bits: {said.status}", said.gap


def interacting(asked: Problem, allowed: float) -> tuple[str, float | None]:
    """One budget by local search, interactions included."""
    _, said = local.solve(asked, seconds=allowed)
    return "local, 24 probes", said.gap


def timing(seed: int) -> list[dict[str, Any]]:
    """Each of these on as many layers as SDXL has and on 3,000."""
    rows = []
    for sites, choices, allowed in ((794, 12, 10.0), (3000, 16, 60.0)):
        asked = random_problem(sites, choices, seed)
        probed = with_probes(asked, seed)
        for solve, given in ((whole, asked), (exact, asked), (interacting, probed)):
            began, worked = time.perf_counter(), time.process_time()
            what, gap = solve(given, allowed)
            rows.append(
                {
                    "sites x choices": f"{sites} x {choices}",
                    "what": what,
                    "s": time.perf_counter() - began,
                    "CPU s": time.process_time() - worked,
                    "allowed s": allowed,
                    "largest gap": gap,
                }
            )
    return rows


def main() -> None:
    """Solve, time, publish."""
    parser = argparse.ArgumentParser()
    beside = Path(__file__).parents[2].parent / "shared" / "reference"
    parser.add_argument(
        "--reference", type=Path, default=Path(os.environ.get("QSEARCH_REFERENCE", beside))
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    solved = reference(options.reference)
    publish(
        __file__,
        solved,
        title="MixDQ's published plans",
        seed=options.seed,
        extra={"time of plans": timing(options.seed)},
    )


if __name__ == "__main__":
    main()
