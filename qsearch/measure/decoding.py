"""Decoding: final latents as pictures or frames, the way the pipeline itself decodes them.

How latents become pictures (packed or not, scaled, shifted, by mean and deviation, in tiles, as
video) is the last part of a pipeline's call. So that part is run: the call itself, with a denoiser
that is not asked and a sampler whose every step ends in our latents. Where the VAE's plain formula
makes the same pictures, which is checked once, it is used, since it needs no text encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..core import plugins
from ..core.components import DECODERS
from ..core.errors import QSearchError
from ..core.schedulers import overridden
from .calling import arguments, call
from .components import denoisers_of, schedulers_of
from .placement import device_of
from .prompts import Prompts
from .sampling import Sampling
from .tiling import big_in_tiles, tell

#: of pictures in [-1, 1]: the formula and the pipeline agree below this
_SAME = 1e-3
_ways: WeakKeyDictionary[Any, dict[tuple[Any, ...], bool]] = WeakKeyDictionary()


@torch.no_grad()
def decode(
    pipe: Any,
    latents: Tensor,
    batch: int = 64,
    sampling: Sampling | None = None,
    prompts: Prompts | None = None,
) -> Tensor:
    """Pictures [N, 3, H, W], or frames [N, T, 3, H, W], in [-1, 1] of final latents, `batch` at
    once.
    """
    made, first = [], 0
    each = prompts is not None and len(prompts) == len(latents)
    for part in latents.split(batch):
        own = prompts[first : first + len(part)] if prompts is not None and each else prompts
        made.append(decode_batch(pipe, part, sampling, own).cpu())
        first += len(part)
    return torch.cat(made)


def decode_batch(
    pipe: Any,
    latents: Tensor,
    sampling: Sampling | None = None,
    prompts: Prompts | None = None,
) -> Tensor:
    """Pictures [N, 3, H, W], or frames [N, T, 3, H, W], in [-1, 1] of one batch of latents, with
    gradients.

    Args:
        pipe: a diffusers pipeline.
        latents: as `sample` makes them.
        sampling: how they were made, whose sizes and further arguments the pipeline decodes by.
        prompts: what they were made for, where the pipeline needs it (a picture a prompt).

    Raises:
        QSearchError: nothing in the pipeline makes pictures of such latents.
    """
    sampling = sampling or Sampling()
    if _are_pictures(pipe, latents):
        return latents.clamp(-1, 1)
    key = (*sampling.size, sampling.frames, tuple(latents.shape[1:]))
    known = _ways.setdefault(pipe, {})
    with big_in_tiles(_decoder(pipe)):
        if key not in known:
            with torch.no_grad():
                known[key] = _formula_holds(pipe, latents[:1].detach(), sampling, prompts)
        return _formula(pipe, latents) if known[key] else _own(pipe, latents, sampling, prompts)


def _are_pictures(pipe: Any, latents: Tensor) -> bool:
    channels = latent_channels(pipe)
    return latents.ndim == 4 and latents.shape[1] == 3 and channels != 3


def latent_channels(pipe: Any) -> int:
    """Channels of the latents by the VAE's own configuration; 0 without a VAE that says."""
    config = getattr(_decoder(pipe), "config", {})
    return int(config.get("latent_channels") or config.get("z_dim") or 0)


def _decoder(pipe: Any) -> Any:
    held = (getattr(pipe, name, None) for name in DECODERS)
    return next((part for part in held if isinstance(part, nn.Module)), None)


def _formula(pipe: Any, latents: Tensor) -> Tensor:
    """Pictures by the VAE alone, as most pipelines of pictures call it."""
    vae = pipe.vae
    config = vae.config
    z = latents.to(device_of(vae), vae.dtype) / (config.get("scaling_factor") or 1.0)
    z = z + (config.get("shift_factor") or 0.0)
    pictures: Tensor = vae.decode(z, return_dict=False)[0].float().clamp(-1, 1)
    return pictures


def _formula_holds(pipe: Any, latents: Tensor, sampling: Sampling, prompts: Prompts | None) -> bool:
    if not isinstance(getattr(pipe, "vae", None), nn.Module) or latents.ndim != 4:
        return False
    try:
        simple = _formula(pipe, latents)
    except Exception:  # the formula is not this VAE's
        return False
    try:
        own = _own(pipe, latents, sampling, prompts)
    except QSearchError:  # a pipeline that takes more than we have here; its VAE is plain
        return simple.ndim == 4 and simple.shape[1] == 3
    return own.shape == simple.shape and bool((own - simple).abs().max() < _SAME)


def _own(pipe: Any, latents: Tensor, sampling: Sampling, prompts: Prompts | None) -> Tensor:
    """Pictures by the pipeline's own call, which is led past its denoiser."""
    count = len(latents)
    given = prompts[:count] if prompts is not None and len(prompts) >= count else None
    texts = given or Prompts(("a picture",) * count)
    wanted = arguments(pipe, texts, 0, sampling)
    if "output_type" not in wanted or _decoder(pipe) is None:
        raise _undecodable(pipe, latents)
    with ExitStack() as stack:
        if not torch.is_grad_enabled():
            stack.enter_context(torch.no_grad())
        stack.enter_context(_led(pipe, latents))
        made = call(pipe, wanted | {"output_type": "pt"}, gradients=torch.is_grad_enabled())
    if made.ndim not in (4, 5) or len(made) != count or made.shape[-3] not in (1, 3):
        raise _undecodable(pipe, latents, tuple(made.shape))
    pictures: Tensor = (made.float() * 2 - 1).clamp(-1, 1)
    return pictures


def _undecodable(pipe: Any, latents: Tensor | None, made: tuple[int, ...] = ()) -> QSearchError:
    shape = "" if latents is None else f" of latents {' x '.join(map(str, latents.shape))}"
    what = (
        f"what comes out is {' x '.join(map(str, made))}"
        if made
        else "it has nothing to decode with"
    )
    return QSearchError(
        f"pictures are decoded by the pipeline; {type(pipe).__name__} makes none{shape} ({what}): "
        "use metrics without pictures, such as sqnr"
    )


@contextmanager
def _led(pipe: Any, latents: Tensor | None) -> Iterator[None]:
    """Inside, the denoisers compute once to see what they return and nothing after that, and every
    sampler step makes `latents`.
    """

    def led(own: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        made = own(*args, **kwargs)
        if latents is None:
            return made
        if isinstance(made, tuple):
            return latents.to(made[0].device, made[0].dtype), *made[1:]
        made.prev_sample = latents.to(made.prev_sample.device, made.prev_sample.dtype)
        return made

    with ExitStack() as stack:
        for scheduler in schedulers_of(pipe):
            stack.callback(overridden(scheduler, {"step": led}))
        for model in denoisers_of(pipe).values():
            stack.enter_context(_blank(model))
        yield


@contextmanager
def _blank(model: nn.Module) -> Iterator[None]:
    """The model returns zeros in the form of what it returns for tensors of the same shapes."""
    own, before = model.forward, model.__dict__.get("forward")
    forms: dict[tuple[Any, ...], Any] = {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves = _pytree.tree_leaves((args, kwargs))
        shapes = tuple(tuple(t.shape) for t in leaves if isinstance(t, Tensor))
        if shapes not in forms:
            with torch.no_grad():
                forms[shapes] = own(*args, **kwargs)
        return _pytree.tree_map(
            lambda t: torch.zeros_like(t) if isinstance(t, Tensor) else t, forms[shapes]
        )

    forward.__wrapped__ = own  # type: ignore[attr-defined]  # signatures are asked of it
    model.forward = forward
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before


@torch.no_grad()
def picture_shape(pipe: Any, sampling: Sampling, prompts: Prompts | None = None) -> tuple[int, ...]:
    """Shape of one sample's picture [3, H, W] or video [T, 3, H, W], seen by decoding one without
    sampling it.

    Raises:
        QSearchError: the pipeline makes none.
    """
    one = Prompts(("a picture",)) if prompts is None else prompts[:1]
    wanted = arguments(pipe, one, 0, replace(sampling, batch=1))
    if _decoder(pipe) is None and "output_type" not in wanted:
        raise _undecodable(pipe, None)
    kind = wanted["output_type"] if wanted["output_type"] == "np" else "pt"
    try:
        with _led(pipe, None), big_in_tiles(_decoder(pipe)):
            made = call(pipe, wanted | {"output_type": kind})
    except QSearchError:
        if _decoder(pipe) is None:
            raise _undecodable(pipe, None) from None
        raise
    if made.ndim not in (4, 5) or made.shape[-3] not in (1, 3):
        raise _undecodable(pipe, None, tuple(made.shape))
    return tuple(made.shape[1:])


def decodable(pipe: Any, sampling: Sampling | None = None, prompts: Prompts | None = None) -> str:
    """Why the pipeline's latents can't be decoded into pictures; "" where they can."""
    try:
        picture_shape(pipe, sampling or Sampling(), prompts)
    except QSearchError as error:
        return str(error)
    return ""


def check_metrics(
    pipe: Any, metrics: Sequence[str], sampling: Sampling, prompts: Prompts | None = None
) -> None:
    """Refuse metrics that need what the pipeline does not make, before anything is measured.

    A metric's module says `needs_pictures`, `needs_video` and `needs_scenes` (the zoo's pictures of
    3x64x64).

    Raises:
        QSearchError: names the metrics, and those that remain.
    """
    known = {n: plugins.load("metrics", n) for n in metrics if n in plugins.names("metrics")}
    looking = [n for n, m in known.items() if needs(m, "pictures") or needs(m, "scenes")]
    if not looking:
        return
    others = [n for n in metrics if n not in looking] or ["sqnr"]
    try:
        shape = picture_shape(pipe, sampling, prompts)
    except QSearchError as error:
        raise QSearchError(
            f"{', '.join(looking)} look at pictures: {error}; measure {', '.join(others)}"
        ) from error
    scenes = [n for n in looking if needs(known[n], "scenes")]
    if scenes and shape[-3:] != (3, 64, 64):
        raise QSearchError(
            f"{', '.join(scenes)} compare with the zoo's scenes of 3x64x64; "
            f"{type(pipe).__name__} makes "
            f"{'x'.join(map(str, shape))}: leave {', '.join(scenes)} out"
        )


def needs(metric: Any, what: str) -> bool:
    """Whether a metric's module says that it needs `what`; one that does not say looks at no
    pictures.
    """
    return bool(getattr(metric, f"needs_{what}", False))


def tell_of_tiles(pipe: Any, say: Callable[[str], None]) -> None:
    """Lines about how the pipeline's pictures are decoded go to `say` from here on."""
    tell(_decoder(pipe), say)


def decoder_of(
    pipe: Any, sampling: Sampling | None = None, prompts: Prompts | None = None
) -> Callable[[Tensor], Tensor]:
    """`decode_batch` of a pipeline, sampled in one way."""
    return lambda latents: decode_batch(pipe, latents, sampling, prompts)
