"""How long self-attentions take with each choice on this machine: a dense step and the steps behind
it, their mean over an interval.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from qsearch_kernels import bench

from ..choices.attention import attention_plugin
from ..core.attention_words import attention_word
from ..core.attentions import AttentionSpec, fault_of
from ..core.graph import OpGraph
from ..core.scheme import KEEP, Scheme


@torch.no_grad()
def time_attentions(
    graph: OpGraph, choices: Iterable[Scheme], *, device: str = "cpu", seconds: float = 0.3
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Seconds of each self-attention in one call of the denoiser.

    Args:
        graph: the model's graph; attentions of one shape are timed once, on random numbers.
        choices: for whole attentions; each is timed where it fits.
        device: of the stopwatch.
        seconds: for each race.

    Returns:
        Site -> choice (`keep` is dense) -> seconds; and a row for each shape, for people.
    """
    rows: dict[tuple[int, ...], dict[str, Any]] = {}
    found: dict[str, dict[str, float]] = {}
    asked = list(choices)
    for spec in graph.self_attentions.values():
        one = spec.tokens**2 * spec.heads * spec.head_size * 2
        batch = max(1, spec.macs // one)
        shape = (batch, spec.heads, spec.tokens, spec.head_size)
        if shape not in rows:
            rows[shape] = {
                "layer": "attention",
                "weight": "",
                "input": "x".join(map(str, shape)),
                "calls": 0,
                **_timed(spec, shape, asked, device, seconds),
            }
        rows[shape]["calls"] += 1
        found[spec.site] = {
            str(s): rows[shape][str(s)] / 1e3 for s in [KEEP, *asked] if str(s) in rows[shape]
        }
    return found, list(rows.values())


def _timed(
    spec: AttentionSpec, shape: tuple[int, ...], choices: list[Scheme], device: str, seconds: float
) -> dict[str, float]:
    """Choice -> ms, the mean over an interval from dense step to dense step."""
    dice = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=dice).to(device) for _ in range(3))
    racers: dict[str, Any] = {str(KEEP): partial(F.scaled_dot_product_attention, q, k, v)}
    for scheme in (s for s in choices if not fault_of(spec, s)):
        drift = None
        plugin = attention_plugin(scheme.attention)
        if plugin.fitted(scheme.attention):
            seen = plugin.observed(scheme.attention, spec, (q, k, v), None)
            drift = plugin.fit(scheme.attention, spec, [seen] * plugin.every(scheme.attention))
        racers[f"{scheme} dense"] = partial(_dense, scheme, spec, (q, k, v), drift)
        output = plugin.made(scheme.attention, spec, (q, k, v), drift, None)
        racers[f"{scheme} sparse"] = partial(output, (q, k, v), 1)
    taken = bench.race(racers, seconds, device)
    ms = {name: statistics.median(times) * 1e3 for name, times in taken.items()}
    made = {str(KEEP): ms[str(KEEP)]}
    for scheme in (s for s in choices if f"{s} dense" in ms):
        every = attention_word(scheme.attention).every(scheme.attention)
        sparse = ms[f"{scheme} sparse"]
        made[str(scheme)] = (
            (ms[f"{scheme} dense"] + (every - 1) * sparse) / every if every else sparse
        )
    return made


def _dense(scheme: Scheme, spec: AttentionSpec, given: Any, drift: Any) -> None:
    """A dense step, with what it leaves to later ones."""
    q, k, v = given
    plugin = attention_plugin(scheme.attention)
    plugin.simulated(scheme.attention, spec, drift).attend(q, k, v, scale=None, step=0)
