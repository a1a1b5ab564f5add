"""Estimates: each verb's peak memory with each offload, and the first that fits; of the smallest
and the largest model of the cards, and of a saved pipeline.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from qsearch.core.errors import QSearchError
from qsearch.graphs.families import cards
from qsearch.measure.offloading import Sizes, fitting, peak_bytes, streamed_bytes
from qsearch.measure.sizes import decoding_bytes
from qsearch.measure.units import largest_unit
from qsearch.stages import estimates as module
from qsearch.stages.config import Config
from qsearch.stages.doctor import doctor
from qsearch.stages.estimates import VERBS, estimates
from qsearch.stages.folder import Run
from tests.tiny_pipelines import build

GIB = 2**30
KINDS = ("none", "block", "disk")
VAE = {"block_out_channels": [128, 256, 512, 512]}


@cache
def sizes(name: str) -> Sizes:
    """A card's denoiser in bf16, with pictures of 1024 px."""
    model, _ = cards.load(name)
    whole = 2 * sum(p.numel() for p in model.parameters())
    block, layer = largest_unit(model)
    return Sizes(whole, whole, 2 * block, layer, decoding_bytes(VAE, 1024**2, 2))


def ends() -> tuple[str, str]:
    """The smallest and the largest card."""
    by_size = sorted(cards.names(), key=lambda name: cards.card(name).parameters)
    return by_size[0], by_size[-1]


def test_the_smallest_card_fits_whole_and_the_largest_a_block_at_a_time() -> None:
    small, large = map(sizes, ends())

    for verb in VERBS:
        assert fitting(small, verb, "cpu", 16 * GIB, 16 * GIB) == "none"
        assert fitting(large, verb, "cuda", 300 * GIB, 300 * GIB) == "none"
    for verb in ("profile", "evaluate", "apply"):
        assert fitting(large, verb, "cpu", 24 * GIB, 24 * GIB) == "disk"
        assert fitting(large, verb, "cuda", 24 * GIB, 128 * GIB) == "block"
        assert fitting(large, verb, "cuda", 24 * GIB, 32 * GIB) == "disk"
        assert fitting(large, verb, "cuda", 2 * GIB, 128 * GIB) == ""
    assert fitting(large, "export", "cpu", 24 * GIB, 24 * GIB) == "none"  # a layer at a time
    assert fitting(large, "profile", "mps", None, None) == "none"  # nothing is known


def test_peaks_of_the_largest_card_are_its_weights_or_one_block() -> None:
    large = sizes(ends()[1])
    need = streamed_bytes(large.block, large.layer)

    base, whole = streamed_bytes(0, 0), large.whole  # Python and its libraries

    assert peak_bytes(large, "profile", "none") == base + 2 * whole  # weights and gradients
    assert peak_bytes(large, "extract", "none") == peak_bytes(large, "apply", "none")
    assert peak_bytes(large, "apply", "none") == base + whole
    assert peak_bytes(large, "profile", "disk") == need < large.whole / 2
    assert peak_bytes(large, "profile", "block", "cuda") == need
    assert peak_bytes(large, "profile", "block", "cpu") == need + large.whole
    assert peak_bytes(large, "evaluate", "none") == base + 2 * whole + large.decoding
    assert peak_bytes(large, "extract", "disk") < need


def test_decoding_counts_where_it_takes_more_than_a_block() -> None:
    small = sizes(ends()[0])
    big = Sizes(small.whole, small.denoisers, small.block, small.layer, decoding=64 * GIB)

    assert peak_bytes(big, "evaluate", "disk") > 64 * GIB
    assert peak_bytes(big, "profile", "disk") == peak_bytes(small, "profile", "disk")


def test_doctor_says_the_peak_of_each_verb_with_each_offload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("pixart_sigma").save_pretrained(tmp_path / "model")
    run = Run(Config(model=str(tmp_path / "model"), folder=tmp_path / "run"))
    monkeypatch.setattr(module, "matmul_speed", lambda: 1e9)

    rows = doctor(tmp_path, run).verbs

    assert [row["verb"] for row in rows] == list(VERBS)
    for row in rows:
        assert list(row) == ["verb", "passes", *KINDS, "fits with", "time"]
        assert row["fits with"] == "none" and all(row[kind].endswith("B") for kind in KINDS)
    monkeypatch.setattr(module, "free_on", lambda device: 0)
    assert [e.fits for e in estimates(run)] == [""] * len(VERBS)
    assert "a narrower --dtype" in doctor(tmp_path, run).verbs[0]["fits with"]


def test_a_model_that_can_t_be_streamed_has_one_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("pixart_sigma").save_pretrained(tmp_path / "model")
    run = Run(Config(model=str(tmp_path / "model"), folder=tmp_path / "run"))

    def refuses(folder: Path, dtype: str) -> tuple[int, int]:
        raise QSearchError("of another library")

    monkeypatch.setattr(module, "blocks_in", refuses)

    assert [list(e.memory) for e in estimates(run, speed=1e9)] == [["none"]] * len(VERBS)
    assert {row["disk"] for row in doctor(tmp_path, run).verbs} == {"-"}
