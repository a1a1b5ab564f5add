"""Tiling: big pictures are decoded in tiles and batches one sample at a time, said once, and the
VAE's own settings stay what they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from qsearch.measure import tiling
from qsearch.measure.calls import patched
from qsearch.measure.decoding import check_metrics, decode, decode_batch, tell_of_tiles
from qsearch.measure.pipelines import Prompts, Sampling
from qsearch.measure.sizes import decoding_bytes
from qsearch.measure.tiling import big_in_tiles, tell
from tests import tiny_parts as tiny
from tests.tiny_pipelines import build

#: fp32 rounding of pictures in another batch
ROUNDING = 1e-4


@contextmanager
def free(monkeypatch: pytest.MonkeyPatch, size: float) -> Iterator[None]:
    """Inside, that many bytes are free, and nothing is too small for tiles."""
    with monkeypatch.context() as patch:
        patch.setattr(tiling, "free_on", lambda device: size)
        patch.setattr(tiling, "_SMALL", 0)
        yield


def made(vae: Any, latents: Tensor, said: list[str]) -> tuple[Tensor, list[tuple[bool, bool]]]:
    """(pictures, (tiling, slicing) in each of the VAE's own calls)."""
    seen: list[tuple[bool, bool]] = []
    tell(vae, said.append)

    def around(own: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((vae.use_tiling, vae.use_slicing))
        return own(*args, **kwargs)

    with torch.no_grad(), patched(vae, around, "_decode"), big_in_tiles(vae):
        return vae.decode(latents, return_dict=False)[0], seen


@pytest.mark.parametrize(
    ("build_vae", "shape"),
    [
        (tiny.vae, (2, 4, 32, 24)),
        (tiny.vae_wan, (1, 4, 2, 4, 34)),
        (tiny.vae_cogvideox, (1, 4, 2, 4, 200)),
    ],
    ids=["pictures", "wan", "cogvideox"],
)
def test_big_pictures_are_decoded_in_tiles_and_settings_stay(
    build_vae: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    vae, latents, said = build_vae().eval(), torch.randn(shape), list[str]()
    with torch.no_grad():
        plain = vae.decode(latents, return_dict=False)[0]

    with free(monkeypatch, 1.0):
        pictures, seen = made(vae, latents, said)

    assert seen and all(tiled for tiled, _ in seen)
    assert not vae.use_tiling and not vae.use_slicing and "decode" not in vars(vae)
    assert pictures.shape == plain.shape and not torch.equal(pictures, plain)
    size = f"{plain.shape[-1]}x{plain.shape[-2]}"
    assert len(said) == 1
    assert said[0].startswith(f"pictures of {size} are decoded in tiles: all at once take about ")
    with free(monkeypatch, 2.0**50):  # full precision and plans alike, whatever is free by then
        assert torch.equal(made(vae, latents, said)[0], pictures)
    assert len(said) == 1


def test_a_batch_that_does_not_fit_goes_one_sample_at_a_time_without_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vae, latents, said = tiny.vae().eval(), torch.randn(3, 4, 32, 32), list[str]()
    one = decoding_bytes(vae.config, 64 * 64, 4)
    with torch.no_grad():
        plain = vae.decode(latents, return_dict=False)[0]

    with free(monkeypatch, 1.5 * one / tiling._SHARE):
        assert made(vae, latents[:1], said)[1] == [(False, False)] and not said
        pictures, seen = made(vae, latents, said)

    assert seen == [(False, True)] * 3
    assert len(said) == 1 and "are decoded one at a time: all at once take about" in said[0]
    torch.testing.assert_close(pictures, plain, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("why", ["small", "no larger than a tile", "enough is free"])
def test_other_pictures_are_decoded_as_ever(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    side = 8 if why == "no larger than a tile" else 32
    vae, latents, said = tiny.vae().eval(), torch.randn(1, 4, side, side), list[str]()
    with torch.no_grad():
        plain = vae.decode(latents, return_dict=False)[0]
    monkeypatch.setattr(tiling, "free_on", lambda device: 2**40 if why == "enough is free" else 1)
    if why != "small":
        monkeypatch.setattr(tiling, "_SMALL", 0)

    pictures, seen = made(vae, latents, said)

    assert seen == [(False, False)] and not said
    assert torch.equal(pictures, plain)


def test_a_vae_whose_tiling_is_on_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, said = tiny.vae().eval(), list[str]()
    vae.enable_tiling()

    with free(monkeypatch, 1.0):
        _, seen = made(vae, torch.randn(1, 4, 32, 32), said)

    assert seen == [(True, False)] and not said and vae.use_tiling


def test_settings_are_put_back_where_decoding_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = tiny.vae().eval()

    def fails(own: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no memory")

    with (
        free(monkeypatch, 1.0),
        patched(vae, fails, "_decode"),
        pytest.raises(RuntimeError, match="no memory"),
        big_in_tiles(vae),
    ):
        vae.decode(torch.randn(2, 4, 32, 32))

    assert not vae.use_tiling and not vae.use_slicing and "decode" not in vars(vae)


def test_a_pipeline_s_big_pictures_have_gradients_and_are_told_of_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe, sampling = build("stable_diffusion"), Sampling(steps=1, resolution=64)
    said: list[str] = []
    tell_of_tiles(pipe, said.append)
    latents = torch.randn(2, 4, 32, 32, requires_grad=True)

    with free(monkeypatch, 1.0):
        check_metrics(pipe, ("psnr",), sampling)
        before = list(said)
        with torch.no_grad():
            plain = decode(pipe, latents, sampling=sampling, prompts=Prompts(("a", "b")))
        pictures = decode_batch(pipe, latents, sampling, Prompts(("a", "b")))
        pictures.sum().backward()

    assert len(before) == 1 and before[0].startswith("pictures of 64x64 are decoded in tiles")
    assert said == before
    assert torch.equal(pictures.detach(), plain)
    assert latents.grad is not None and bool((latents.grad != 0).all())


@pytest.mark.parametrize(
    ("config", "channels"),
    [
        ({"block_out_channels": [128, 256, 512, 512]}, 256),  # Stable Diffusion, Flux
        ({"decoder_block_out_channels": [128, 256, 512], "patch_size": 4}, 256 / 16),  # LTX
        ({"base_dim": 96, "dim_mult": [1, 2, 4, 4]}, 192),  # Wan 2.1
        ({"block_out_channels": [32]}, 32),
        ({}, 256),
    ],
)
def test_memory_of_decoding_is_the_widest_activation_five_times(
    config: dict[str, Any], channels: float
) -> None:
    assert decoding_bytes(config, 1024 * 1024, 2) == 5 * 2 * channels * 1024 * 1024
