"""Calling a pipeline: the arguments of its call for a batch of prompts, and the latents that come
out.

Which arguments exist is asked of the signature of its `__call__`; what it requires besides a prompt
comes from `Sampling.call` and the prompts' own values. Every sample has a generator of its own, so
its noise does not depend on the batch it is in.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import QSearchError, nearest
from .calls import measuring
from .components import components, ticking
from .prompts import Prompts, is_file_name, joined, read_value
from .sampling import Sampling

#: what is asked of a call where its signature has it: cleaning needs packages that change the
#: prompt, binning a resolution table
_PLAIN = {"clean_caption": False, "use_resolution_binning": False}
#: keywords that belong to us or to no measurement
_OURS = ("prompt", "generator", "num_inference_steps", "output_type", "return_dict", "self")
_LATENT = re.compile(r"""["']latent["']""")
#: types of a prompt that is one text
_TEXTS = (str, str | None, "str", "str | None", "Optional[str]")
_ONE_PROMPT = re.compile(r"list of prompts is not", re.IGNORECASE)


def arguments(
    pipe: Any, prompts: Prompts | Sequence[str], first: int, sampling: Sampling
) -> dict[str, Any]:
    """Arguments of the pipeline's call for `prompts`, the first of which is sample number `first`
    of the seed: its noise depends on that alone.

    Raises:
        QSearchError: `sampling.call` names a keyword that the call does not have, the call requires
            one that is not given, or a size is asked of a pipeline whose call takes none.
    """
    given = prompts if isinstance(prompts, Prompts) else Prompts(tuple(prompts))
    count = len(given)
    known = inspect.signature(type(pipe).__call__).parameters
    wanted: dict[str, Any] = {
        "prompt": list(given.texts),
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance,
        "generator": [
            torch.Generator().manual_seed(seed) for seed in _seeds(given, first, sampling)
        ],
        "output_type": _output_type(type(pipe).__call__),
        **_PLAIN,
    }
    sizes = {
        "height": sampling.size[0],
        "width": sampling.size[1],
        "num_frames": sampling.frames,
    }
    asked = {name: size for name, size in sizes.items() if size is not None}
    fixed = [f"{name} {size}" for name, size in asked.items() if name not in known]
    if fixed:
        raise QSearchError(
            f"the call of {type(pipe).__name__} has no such argument: {', '.join(fixed)}; leave it "
            "out, what it makes has the size of the model or of its input"
        )
    wanted |= asked
    _check_frames(pipe, known, asked.get("num_frames"))
    longest = getattr(getattr(pipe, "tokenizer", None), "model_max_length", 10**9)
    limit = known.get("max_sequence_length")
    if limit is not None and isinstance(limit.default, int) and longest < limit.default:
        wanted["max_sequence_length"] = longest
    if "prompt" not in known and "batch_size" in known:
        wanted["batch_size"] = count
    if _required(known, "class_labels"):
        classes = _classes(pipe)
        wanted["class_labels"] = [(first + i) % classes for i in range(count)]
    made = {k: v for k, v in wanted.items() if k in known}
    made |= _more(pipe, given, first, sampling, known)
    if count == 1:
        alone = {"generator"} if _is_of_diffusers(pipe) else set[str]()
        if takes_one_prompt(type(pipe).__call__):
            alone |= {name for name in made if "prompt" in name or name == "generator"}
        made |= {k: v[0] for k, v in made.items() if k in alone and isinstance(v, list)}
    missing = [name for name in known if _required(known, name) and name not in made]
    if missing:
        raise QSearchError(
            f"the call of {type(pipe).__name__} requires {', '.join(missing)} besides what is "
            f"given ({', '.join(made)}); say it in `call`, such as call: {{{missing[0]}: FILE or "
            "value}"
        )
    return made


def _check_frames(pipe: Any, known: Mapping[str, inspect.Parameter], frames: int | None) -> None:
    """Refuse frames that the VAE's compression in time does not divide, which pipelines round in
    silence. Where their own default is not one frame more than a multiple of it, neither is asked
    for (Allegro).
    """
    step = int(getattr(pipe, "vae_scale_factor_temporal", None) or 1)
    default = known["num_frames"].default if "num_frames" in known else None
    if frames is None or not isinstance(default, int) or (default - 1) % step:
        return
    if (frames - 1) % step:
        below = frames - (frames - 1) % step
        raise QSearchError(
            f"frames: the VAE of {type(pipe).__name__} makes one frame more than a multiple of "
            f"{step}; given {frames}, take {below} or {below + step}"
        )


def _seeds(prompts: Prompts, first: int, sampling: Sampling) -> list[int]:
    """A seed a sample: the prompt's own value `seed`, or one by the sample's number."""
    own = prompts.values or ({},) * len(prompts)
    return [
        int(values.get("seed", sampling.seed * 1_000_003 + first + i))
        for i, values in enumerate(own)
    ]


@cache
def takes_one_prompt(own: Callable[..., Any]) -> bool:
    """Whether a pipeline's call takes no lists of prompts: by the type that it declares
    (SanaWM), or by its own words (Wan VACE).
    """
    declared = getattr(inspect.signature(own).parameters.get("prompt"), "annotation", None)
    return declared in _TEXTS or _ONE_PROMPT.search(_source(own)) is not None


def _is_of_diffusers(pipe: Any) -> bool:
    """Whether a pipeline takes one generator for one sample, as all of diffusers do; some of them
    refuse a list of one.
    """
    diffusers = sys.modules.get("diffusers")
    return diffusers is not None and isinstance(pipe, diffusers.DiffusionPipeline)


def _source(own: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(inspect.unwrap(own))
    except (OSError, TypeError):
        return ""


def _required(known: Mapping[str, inspect.Parameter], name: str) -> bool:
    parameter = known.get(name)
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return (
        parameter is not None
        and name != "self"
        and parameter.default is inspect.Parameter.empty
        and parameter.kind not in kinds
    )


def _classes(pipe: Any) -> int:
    found = [
        getattr(getattr(part, "config", None), name, None)
        for part in components(pipe).values()
        if isinstance(part, nn.Module)
        for name in ("num_embeds_ada_norm", "num_class_embeds")
    ]
    return max((int(n) for n in found if n), default=1000)


@cache
def _output_type(own: Callable[..., Any]) -> str:
    """What a pipeline's call hands over with the least done to it: latents where its code knows the
    word, else tensors or arrays.
    """
    code = _source(own)
    if not code or _LATENT.search(code):
        return "latent"
    default = inspect.signature(own).parameters.get("output_type")
    return "pt" if default is not None and default.default == "pt" else "np"


def _more(
    pipe: Any,
    prompts: Prompts,
    first: int,
    sampling: Sampling,
    known: Mapping[str, inspect.Parameter],
) -> dict[str, Any]:
    """The keywords of `sampling.call` and of the prompts' own values, for one batch."""
    own = tuple({k: v for k, v in held.items() if k != "seed"} for held in prompts.values)
    names = dict.fromkeys([*sampling.call, *(name for values in own for name in values)])
    for name in names:
        if name not in known or name in _OURS:
            more = [n for n in known if n not in _OURS]
            raise QSearchError(
                f"`call` holds keywords of the call of {type(pipe).__name__}; {name} is "
                "none of them"
                f"{nearest(name, more)}; it has {', '.join(more[:12])}"
            )
    made = {}
    for name in names:
        each = [
            _value(name, values.get(name, sampling.call.get(name)), first + i)
            for i, values in enumerate(own or ({},) * len(prompts))
        ]
        made[name] = _batch(name, each, sampling.call.get(name), any(name in v for v in own))
    return made


def _value(name: str, value: Any, number: int) -> Any:
    """The value of one sample: read from its file, chosen from `each`."""
    if isinstance(value, Mapping) and set(value) == {"each"}:
        values = value["each"]
        if not isinstance(values, list) or not values:
            raise QSearchError(
                f"`each` is a list of values, one a sample, in turn; given {values!r}"
            )
        return _value(name, values[number % len(values)], number)
    if isinstance(value, Mapping):
        return {k: _value(k, v, number) for k, v in value.items()}
    if isinstance(value, str) and is_file_name(value):
        value = read_value(value, name)
    if isinstance(value, Mapping):  # several tensors of one file
        return {k: _value(k, v, number) for k, v in value.items()}
    if isinstance(value, Tensor) and value.ndim:
        return value[number % len(value) :][:1]
    if isinstance(value, list) and value and _files(value):
        return _value(name, value[number % len(value)], number)
    if isinstance(value, list) and any(isinstance(v, list) for v in value):
        return [_whole(name, v) for v in value]
    return value


def _whole(name: str, value: Any) -> Any:
    """A list of lists is the value of each sample, with what its files hold: rows of pictures
    (VisualCloze), several pictures a sample.
    """
    if isinstance(value, list):
        return [_whole(name, v) for v in value]
    return read_value(value, name) if isinstance(value, str) and is_file_name(value) else value


def _files(values: Sequence[Any]) -> bool:
    return all(isinstance(v, str) and is_file_name(v) for v in values)


def _batch(name: str, each: list[Any], shared: Any, own: bool) -> Any:
    """One sample's values as the value of a batch: what differs between samples, or is theirs, is
    joined; settings stay one.
    """
    value = each[0]
    chosen = own or (isinstance(shared, Mapping) and set(shared) == {"each"})
    text = isinstance(value, str) and ("prompt" in name or chosen)
    listed = text or name in ("class_labels",) or chosen
    from PIL import Image

    if isinstance(value, Tensor | Image.Image):
        return joined(name, each, False)
    if isinstance(value, list) and value and isinstance(value[0], Image.Image):
        return value if len(each) == 1 else each  # a video each
    if isinstance(value, list) and any(isinstance(v, list) for v in value):
        return each
    if name == "class_labels" and isinstance(value, list):
        return [v[i % len(v)] for i, v in enumerate(each)]
    if isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values()):
        return joined(name, each, False)
    return joined(name, each, True) if listed else value


@torch.no_grad()
def sample(
    pipe: Any, prompts: Prompts, sampling: Sampling, progress: Any = None, *, first: int = 0
) -> Tensor:
    """Final latents [N, ...] for the prompts, each with its own noise, that of the samples from
    number `first` on.

    Of a pipeline that hands over no latents, what it does hand over: pictures [N, 3, H, W] in [-1,
    1], embeddings, sound.

    Raises:
        QSearchError: the pipeline's call raises, or makes numbers that are not finite.
    """
    parts = []
    batch = 1 if takes_one_prompt(type(pipe).__call__) else sampling.batch
    for i in range(0, len(prompts), batch):
        part = prompts[i : i + batch]
        parts.append(call(pipe, arguments(pipe, part, first + i, sampling)).float().cpu())
        if progress is not None:
            progress(len(parts[-1]))
    latents = torch.cat(parts)
    if not torch.isfinite(latents).all():
        raise QSearchError(
            f"{type(pipe).__name__} made latents that are not finite; is the model whole, "
            "or the plan too coarse?"
        )
    return latents


def call(pipe: Any, given: Mapping[str, Any], *, gradients: bool = False) -> Tensor:
    """What a pipeline makes of the arguments [N, ...]; its parts are in evaluation mode, and its
    clock goes.

    Args:
        pipe: a diffusers pipeline.
        given: arguments of its call.
        gradients: call it without its own `torch.no_grad`.

    Raises:
        QSearchError: the call raises, in one line with what it was given.
    """
    own = inspect.unwrap(type(pipe).__call__)
    modules = [p for p in components(pipe).values() if isinstance(p, nn.Module)]
    with ExitStack() as stack:
        stack.enter_context(ticking(pipe))
        stack.enter_context(measuring(*modules))
        try:
            made = own(pipe, **given) if gradients else pipe(**given)
        except (QSearchError, torch.OutOfMemoryError, MemoryError, StopError):
            raise
        except Exception as error:  # whatever a pipeline raises is about what it was given
            raise _said(pipe, given, error) from error
    return result(made)


class StopError(Exception):
    """Ends a sampler from within, past those who turn exceptions into words."""


def _said(pipe: Any, given: Mapping[str, Any], error: Exception) -> QSearchError:
    text = " ".join((str(error).strip() or "no reason given").split())
    known = inspect.signature(type(pipe).__call__).parameters
    hints = (
        "image",
        "mask",
        "video",
        "audio",
        "embeds",
        "label",
        "strength",
        "control",
        "negative",
    )
    others = [n for n in known if n not in given and any(h in n for h in hints)]
    inner = error.__traceback__
    while inner is not None and inner.tb_next is not None:
        inner = inner.tb_next
    place = "" if inner is None else f" in {inner.tb_frame.f_code.co_name}"
    more = f"; what else it takes, by `call`: {', '.join(others[:8])}" if others else ""
    generators = given.get("generator")
    if isinstance(generators, list) and len(generators) > 1:
        more += "; if it takes one sample at a time, set sampling.batch and profile.batch to 1"
    return QSearchError(
        f"{type(pipe).__name__} was called with {', '.join(given)} and raised "
        f"{type(error).__name__}{place}: {text[:300]}{more}"
    )


def result(made: Any) -> Tensor:
    """The first of what a pipeline returns as a tensor [N, ...]; arrays and PIL pictures as [N, 3,
    H, W] in [-1, 1].
    """
    import numpy as np

    value = (
        made
        if isinstance(made, Tensor)
        else next(iter(made.values()), None)
        if isinstance(made, Mapping)
        else made[0]
    )
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple) and value:
        if isinstance(value[0], Tensor):
            return torch.stack([v.squeeze(0) if v.ndim > 3 and len(v) == 1 else v for v in value])
        value = np.stack([np.asarray(v) for v in value])
    if not isinstance(value, np.ndarray):
        raise QSearchError(
            "a pipeline hands over tensors, arrays or pictures; this one made "
            f"{type(value).__name__}"
        )
    array = torch.from_numpy(value.astype(np.float32) / (255 if value.dtype == np.uint8 else 1))
    picture = array.ndim in (4, 5) and array.shape[-1] in (1, 3)
    return array.movedim(-1, array.ndim - 3) * 2 - 1 if picture else array
