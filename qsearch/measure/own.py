"""Own: what a saved pipeline does where nothing is asked: steps, guidance and size, read from its
small files and its class.

Nothing is loaded: `model_index.json` names the class, whose call's signature has its defaults; the
scheduler's and the denoiser's configurations tell distilled models, which need few steps and no
guidance.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import zoo
from ..core.errors import QSearchError
from .sampling import Sampling, SamplingSettings

#: components that may say at which size they denoise
DENOISERS = ("transformer", "unet", "prior", "decoder")
#: keywords by which calls name the number of steps, the first that a call has
_STEPS = ("num_inference_steps", "prior_num_inference_steps", "decoder_num_inference_steps")
#: pixels that are sampled at once where nothing else is asked: one picture of 1024 x 1024, at most
#: `_MOST` pictures
_PIXELS = 2**20
_MOST = 32
#: pictures of the zoo at once: with guidance 32 rows, whose activations a processor's cache holds
#: (64 take a tenth longer a row)
_ZOO = 16
#: settings of an unknown class
_STEPS_ELSE, _GUIDANCE_ELSE = 20, 4.0
_DEFAULT_SIZE = re.compile(r"default_sample_size\s*=\s*(\d+)")


@dataclass(frozen=True)
class Own:
    """What a pipeline does by itself.

    Attributes:
        kind: name of its class; "" where the folder does not say.
        steps: sampler steps.
        guidance: guidance scale.
        size: (height, width) of what it makes; None where its files don't say.
        frames: of a video; None for pictures, and where its files don't say.
        makes: "pictures", "videos" or "other" (sound, embeddings); "" where the class is not
            diffusers'.
        zoo: whether it is a model of the zoo, with the zoo's captions and judge.
        why: where steps and guidance come from, in words.
        required: keywords of the call besides the prompt that it can't be without.
        untaken: of steps and guidance those that its call does not take.
    """

    kind: str
    steps: int
    guidance: float
    size: tuple[int, int] | None = None
    frames: int | None = None
    makes: str = "pictures"
    zoo: bool = False
    why: str = "the pipeline's own"
    required: tuple[str, ...] = ()
    untaken: tuple[str, ...] = ()

    def sampler(self, asked: SamplingSettings) -> Sampling:
        """The settings of a run's sampler, completed.

        Raises:
            QSearchError: steps or a guidance scale are asked of a call that takes none.
        """
        ignored = [name for name in self.untaken if getattr(asked, name) is not None]
        if ignored:
            raise QSearchError(
                f"the call of {self.kind} takes no {' and no '.join(ignored)}; leave "
                f"sampling.{' and sampling.'.join(ignored)} out: sampling.call has the keywords "
                "that it takes"
            )
        made = asked.of(self.steps, self.guidance, 1)
        made = asked.of(self.steps, self.guidance, self._batch(made))
        if self.zoo and self.frames is not None and self.size is not None:
            # WanPipeline's own size is that of Wan's models, whatever the transformer was trained
            # on
            height, width = made.size
            made = replace(
                made,
                frames=made.frames or self.frames,
                height=height or self.size[0],
                width=width or self.size[1],
                call={"max_sequence_length": zoo.CLIP_WORDS, **made.call},
            )
        return made

    def _batch(self, made: Sampling) -> int:
        if self.zoo:
            return _ZOO
        height, width = self.sized(made) or (1024, 1024)
        pixels = height * width * (made.frames or self.frames or 1)
        return max(1, min(_MOST, _PIXELS // max(1, pixels)))

    def sized(self, asked: Sampling) -> tuple[int, int] | None:
        """(height, width) of what is made with these settings; None where it is unknown."""
        height, width = asked.size
        height, width = asked.call.get("height", height), asked.call.get("width", width)
        own = self.size or (None, None)
        found = (height or own[0], width or own[1])
        return None if None in found else (int(found[0] or 0), int(found[1] or 0))

    def metrics(self) -> tuple[str, ...]:
        """Metrics that what it makes can have without anything besides."""
        if self.zoo:
            moving = ("temporal", "motion") if self.makes == "videos" else ()
            return ("sqnr", "ssim", "frechet", "alignment", *moving)
        videos = ("sqnr", "ssim", "temporal")
        return {"pictures": ("sqnr", "ssim"), "videos": videos}.get(self.makes, ("sqnr",))


def own_of(folder: Path) -> Own:
    """What the pipeline saved in `folder` does where nothing is asked."""
    name = str(read_config(folder / "model_index.json").get("_class_name") or "")
    known = zoo.folder(folder.name.replace("_", "-"))
    if known.parent == folder.resolve().parent and known.name == folder.name:
        moving = folder.name.replace("_", "-") in zoo.VIDEO_NAMES
        if moving:
            frames, *size = zoo.CLIP
            return Own(name, 20, 4.0, (size[0], size[1]), frames, "videos", True, "the zoo's")
        side = picture_side(folder)
        own_size = None if side is None else (side, side)
        steps = 12 if folder.name.replace("_", "-") in zoo.MULTISTAGE_NAMES else 20
        return Own(name, steps, 4.0, own_size, zoo=True, why="the zoo's")
    call = _call(name)
    if call is None:
        return Own(name, _STEPS_ELSE, _GUIDANCE_ELSE, None, makes="", why="nobody's own")
    steps = next((n for s in _STEPS if (n := _default(call, s)) is not None), _STEPS_ELSE)
    guidance = _default(call, "guidance_scale")
    few = _distilled(folder, name)
    if few is not None:
        steps, guidance = few[0], few[1]
    return Own(
        name,
        int(steps),
        1.0 if guidance is None else float(guidance),
        _size(folder, name, call),
        _frames(folder, call),
        _makes(folder, call),
        why="the pipeline's own" if few is None else f"{few[2]}'s own",
        required=_required(call),
        untaken=_untaken(call),
    )


def _untaken(call: Mapping[str, inspect.Parameter]) -> tuple[str, ...]:
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in call.values()):
        return ()
    taken = {"steps": any(name in call for name in _STEPS), "guidance": "guidance_scale" in call}
    return tuple(name for name, here in taken.items() if not here)


def _required(call: Mapping[str, inspect.Parameter]) -> tuple[str, ...]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return tuple(
        name
        for name, p in call.items()
        if p.default is inspect.Parameter.empty
        and p.kind not in kinds
        and name not in ("self", "prompt", "class_labels", "batch_size")
    )


def class_of(name: str) -> Any:
    """The class of diffusers by that name; None where it has none."""
    import diffusers

    return getattr(diffusers, name, None) if name.isidentifier() else None


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object; empty for a file that is missing or holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def denoiser_config(folder: Path) -> dict[str, Any]:
    """The configuration of a saved pipeline's denoiser; empty where there is none."""
    return next((c for n in DENOISERS if (c := read_config(folder / n / "config.json"))), {})


def picture_side(folder: Path) -> int | None:
    """Pixels of a side by the denoiser's and the VAE's configurations; None where they don't
    say.
    """
    size = denoiser_config(folder).get("sample_size")
    scale = _scale(folder)
    return size * scale if isinstance(size, int) and scale is not None else None


def _scale(folder: Path) -> int | None:
    """Pixels a latent, along a side."""
    vae = read_config(folder / "vae" / "config.json")
    levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
    return 2 ** (len(levels) - 1) if isinstance(levels, list) and levels else None


def _call(name: str) -> Mapping[str, inspect.Parameter] | None:
    kind = class_of(name) if name else None
    if kind is None:
        return None
    return inspect.signature(inspect.unwrap(kind.__call__)).parameters


def _default(call: Mapping[str, inspect.Parameter], name: str) -> Any:
    """The default of a keyword, where it is a number."""
    given = call[name].default if name in call else None
    return given if isinstance(given, int | float) and not isinstance(given, bool) else None


def _distilled(folder: Path, name: str) -> tuple[int, float, str] | None:
    """(steps, guidance, what it is) of a model that was distilled to few steps; None for others."""
    index = read_config(folder / "model_index.json")
    held = index.get("scheduler")
    scheduler = str(held[1]) if isinstance(held, list) and len(held) > 1 else ""
    settings = read_config(folder / "scheduler" / "scheduler_config.json")
    if "LatentConsistency" in name:
        return None  # its own call says it
    if scheduler == "LCMScheduler":
        return 4, 1.0, "the LCM scheduler"
    if scheduler == "TCDScheduler":
        return 4, 0.0, "the TCD scheduler"
    trailing = settings.get("timestep_spacing") == "trailing"
    if scheduler == "EulerAncestralDiscreteScheduler" and trailing:
        return 4, 0.0, "a turbo model"
    flux = read_config(folder / "transformer" / "config.json")
    if name.startswith("Flux") and flux.get("guidance_embeds") is False:
        return 4, 0.0, "a distilled Flux model"
    return None


def _size(folder: Path, name: str, call: Mapping[str, inspect.Parameter]) -> tuple[int, int] | None:
    height, width = _default(call, "height"), _default(call, "width")
    if height and width:
        return int(height), int(width)
    scale, config = _scale(folder), denoiser_config(folder)
    pair = config.get("sample_height"), config.get("sample_width")
    if scale is None:
        return None
    if all(isinstance(n, int) for n in pair):
        return int(pair[0] or 0) * scale, int(pair[1] or 0) * scale
    size = config.get("sample_size")
    if "height" not in call and not isinstance(size, int):
        return None
    if isinstance(size, list) and len(size) == 2:
        return int(size[0]) * scale, int(size[1]) * scale
    if not isinstance(size, int) or name.startswith("Flux"):  # Flux's configuration has none
        try:
            found = _DEFAULT_SIZE.search(inspect.getsource(class_of(name)))
        except (OSError, TypeError):
            return None
        size = int(found[1]) if found else None
    return None if size is None else (size * scale, size * scale)


def _frames(folder: Path, call: Mapping[str, inspect.Parameter]) -> int | None:
    frames = _default(call, "num_frames") or denoiser_config(folder).get("sample_frames")
    return int(frames) if frames and "num_frames" in call else None


def named_parts(folder: Path) -> dict[str, tuple[str | None, str | None]]:
    """The parts of a saved pipeline that are loaded -> (library, class); (None, None) of one that
    is left out.

    Besides, model_index.json holds settings, lists too, and parts that the class makes itself where
    nobody gives them (LongCat's scheduler), for which no folder is saved.
    """
    index = read_config(folder / "model_index.json")
    known = class_of(str(index.get("_class_name") or ""))
    made_by_class = set[str]()
    if known is not None:
        optional = getattr(known, "_optional_components", ())
        given = inspect.signature(known.__init__).parameters.items()
        empty = inspect.Parameter.empty
        made_by_class = {n for n, p in given if p.default is not empty and n not in optional}
    return {
        name: (held[0], held[1])
        for name, held in index.items()
        if not name.startswith("_")
        and name not in made_by_class
        and isinstance(held, list)
        and len(held) == 2
        and all(part is None or isinstance(part, str) for part in held)
    }


def _makes(folder: Path, call: Mapping[str, inspect.Parameter]) -> str:
    if "num_frames" in call:
        return "videos"
    index = read_config(folder / "model_index.json")
    decoders = ("vae", "movq", "vqvae", "vqgan")
    sound = any("audio" in word for word in call)
    if sound or not any(isinstance(index.get(d), list) and index[d][1] for d in decoders):
        return "other" if sound else "pictures" if "output_type" in call else "other"
    return "pictures"
