"""Tiling: a VAE decodes in tiles, and a batch one sample at a time, where all at once would take
more memory than is free.

diffusers' VAEs have both (`enable_tiling`, `enable_slicing`). Samples one at a time are the same up
to rounding; tiles are blended where they overlap, and their norms see a tile alone. So what is
chosen for pictures of one shape stays: a plan's pictures are decoded as those of full precision
are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils import _pytree

from .calls import patched
from .sizes import decoding_bytes, free_on

#: share of the free memory that decoding may take; simulated weights and pictures take the rest
_SHARE = 0.5
#: what takes less is decoded at once, however little memory is free
_SMALL = 2**30
#: pixels along a side of a latent, and frames of a latent frame, where a decoder does not say
_SCALE, _FRAMES = 8, 4
#: VAE -> (shape of one latent, type) -> bytes that decoding may take
_allowed: WeakKeyDictionary[nn.Module, dict[Any, float]] = WeakKeyDictionary()
_said: WeakKeyDictionary[nn.Module, Callable[[str], None]] = WeakKeyDictionary()
#: VAE -> (size of a picture, how it is decoded) of what was said
_told: WeakKeyDictionary[nn.Module, set[tuple[Any, str]]] = WeakKeyDictionary()


@contextmanager
def big_in_tiles(vae: nn.Module | None) -> Iterator[None]:
    """Inside, `vae.decode` goes in tiles where one sample takes more than half of the free memory,
    and one sample at a time where a batch does; below a GiB nothing changes.

    Its own settings are as they were after each call: a VAE whose tiling is on keeps it.

    Args:
        vae: what decodes latents; nothing is done for None.
    """
    if vae is None or not callable(getattr(vae, "decode", None)):
        yield
        return

    def around(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        latents = next(t for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        with _set(vae, latents):
            return own(*args, **kwargs)

    with patched(vae, around, "decode"):
        yield


def tell(vae: nn.Module | None, say: Callable[[str], None]) -> None:
    """Lines about how a VAE decodes go to `say` from here on."""
    if vae is not None:
        _said[vae] = say


@contextmanager
def _set(vae: nn.Module, latents: Tensor) -> Iterator[None]:
    """Inside, the VAE's settings are those that latents [N, ...] of a VAE need."""
    scale = _scale(vae)
    size = latents.shape[-2] * scale, latents.shape[-1] * scale
    pixels = math.prod(size) * _frames_at_once(vae, latents)
    one = decoding_bytes(getattr(vae, "config", {}), pixels, latents.element_size())
    known, key = _allowed.setdefault(vae, {}), (tuple(latents.shape[1:]), latents.dtype)
    if key not in known:
        free = free_on(latents.device)
        known[key] = math.inf if free is None else max(_SMALL, _SHARE * free)
    sliced = len(latents) > 1 and _off(vae, "use_slicing")
    at_once = one if sliced else one * len(latents)
    tiled = at_once > known[key] and _off(vae, "use_tiling") and _exceeds_tile(vae, size)
    sliced = sliced and one * len(latents) > known[key]
    how = "in tiles" if tiled else "one at a time" if sliced else ""
    told = _told.setdefault(vae, set())
    if how and (size, how) not in told and vae in _said:
        told.add((size, how))
        _said[vae](
            f"pictures of {size[1]}x{size[0]} are decoded {how}: all at once take about "
            f"{one * len(latents) / 2**30:.1f} GiB, {known[key] / 2**30:.1f} may be taken"
        )
    switch: Any = vae
    with ExitStack() as stack:
        if tiled:
            switch.enable_tiling()
            stack.callback(switch.disable_tiling)
        if sliced:
            switch.enable_slicing()
            stack.callback(switch.disable_slicing)
        yield


def _off(vae: nn.Module, setting: str) -> bool:
    """Whether the VAE has that setting, and it is off."""
    return _said_of(vae, setting) is False


def _said_of(vae: nn.Module, name: str) -> Any:
    """What the VAE itself or its config says; diffusers warns where a module is asked for what is
    in its config.
    """
    return vars(vae).get(name, getattr(vae, "config", {}).get(name))


def _scale(vae: nn.Module) -> int:
    """Pixels along a side of a latent."""
    own, levels = (
        _said_of(vae, name) for name in ("spatial_compression_ratio", "block_out_channels")
    )
    return int(own or (2 ** (len(levels) - 1) if levels else _SCALE))


def _frames_at_once(vae: nn.Module, latents: Tensor) -> int:
    """Frames that are decoded together: all, but where a VAE goes by a few latent frames."""
    if latents.ndim != 5:
        return 1
    count = latents.shape[2]
    if callable(getattr(vae, "clear_cache", None)):  # Wan's and its kind: one after the other
        count = 1
    elif _said_of(vae, "use_framewise_decoding") is not False:
        count = min(count, _said_of(vae, "num_latent_frames_batch_size") or count)
    return int(count * (_said_of(vae, "temporal_compression_ratio") or _FRAMES))


def _exceeds_tile(vae: nn.Module, size: tuple[int, int]) -> bool:
    """Whether a picture (height, width) is larger than one of the VAE's tiles; so it is where the
    VAE does not say how large they are.
    """
    square = _said_of(vae, "tile_sample_min_size") or 0
    tile = (_said_of(vae, f"tile_sample_min_{side}") or square for side in ("height", "width"))
    return any(mine > own for mine, own in zip(size, tile, strict=True))
