"""Loading: a saved diffusers pipeline, or a checkpoint in one file, on a device and in a type.

Models that a class keeps in fp32 (`_keep_in_fp32_modules`) stay so in fp16 and bf16, since
diffusers itself casts while it loads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.components import DECODERS, is_denoiser
from ..core.errors import QSearchError, nearest
from .components import components, denoisers_of
from .own import named_parts, read_config
from .placement import is_placed
from .skeletons import empty_component
from .streaming import Stream, streams_of
from .units import Files

#: name -> (type of the weights as diffusers loads them, type that the denoiser's weights are stored
#: in)
TYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "float8_e4m3fn": (torch.bfloat16, torch.float8_e4m3fn),
    "float8_e5m2": (torch.bfloat16, torch.float8_e5m2),
}
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)"
    r"(?:\.safetensors\.index)?(?:\.(?P<variant>(?!safetensors|index)[\w-]+?))?"
    r"(?:-\d+-of-\d+)?\.(?:safetensors|bin|json)"
)
#: bytes of a block of what is no denoiser: most text encoders and VAEs have few of these
_SMALL = 2**28
_SINGLE = (".safetensors", ".ckpt", ".gguf")


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading without the libraries' bars and advice, which would drown our own lines; errors are
    raised all the same.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    logs = (diffusers_logging, transformers_logging)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
            log.enable_progress_bar()


def load_pipeline(
    folder: Path,
    device: str = "cpu",
    dtype: str = "float32",
    variant: str | None = None,
    config: Path | None = None,
    offload: str = "none",
) -> Any:
    """A diffusers pipeline on `device`.

    Args:
        folder: of a saved pipeline, or a checkpoint in one file (.safetensors).
        device: a torch device.
        dtype: type of all its models, whatever their files are in: float32, bfloat16, float16;
            float8_e4m3fn and float8_e5m2 store the denoiser's weights so and compute in bfloat16
            (diffusers' layerwise casting).
        variant: of the files (fp16); where a component has files of one variant alone, that one is
            taken.
        config: for a checkpoint in one file, the folder of a pipeline whose configuration it has;
            left out, the file's own folder where that holds one, else diffusers' own.
        offload: none (all weights in memory), disk (the models stay in their files, and come a
            block at a time) or block (they stay in RAM, and blocks come to the device).

    Raises:
        QSearchError: an unknown type, or nothing that loads.
    """
    if dtype not in TYPES:
        raise QSearchError(
            f"a pipeline is loaded in one of {', '.join(TYPES)}; given "
            f"{dtype!r}{nearest(dtype, TYPES)}"
        )
    computed, stored = TYPES[dtype]
    folder = Path(folder)
    with _quiet():
        try:
            if folder.is_file():
                pipe = _single_file(folder, computed, config)
            else:
                variant = variant or only_variant(folder)
                # some pipelines load without a part only where that is said
                parts: dict[str, Any] = {
                    n: None for n, p in named_parts(folder).items() if None in p
                }
                if offload != "none":
                    hold = offload == "block"
                    parts |= _streamed(folder, device, dtype, variant, hold=hold)
                pipe = pipeline_class(folder).from_pretrained(
                    str(folder), local_files_only=True, dtype=computed, variant=variant, **parts
                )
        except QSearchError:
            raise
        except (
            Exception
        ) as error:  # diffusers and transformers raise many kinds for a broken folder
            reason = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            raise QSearchError(
                f"{folder} must hold a whole diffusers pipeline; loading it failed: {reason}"
            ) from error
        pipe.set_progress_bar_config(disable=True)
        for part in components(pipe).values():
            if isinstance(part, nn.Module):
                if not (streams_of(part) or is_placed(part)):
                    part.to(device, computed if computed == torch.float32 else None)
                part.eval()
        if stored is not None:
            for model in denoisers_of(pipe).values():
                model.enable_layerwise_casting(storage_dtype=stored, compute_dtype=computed)  # type: ignore[operator]
        return pipe


def pipeline_class(folder: Path) -> Any:
    """What loads a saved pipeline: diffusers' own choice by `model_index.json`, or our class where
    the zoo has it.
    """
    if read_config(folder / "model_index.json").get("_class_name") == "EcarPipeline":
        from ..zoo.ecar.pipeline import EcarPipeline

        return EcarPipeline
    from diffusers import DiffusionPipeline

    return DiffusionPipeline


def _streamed(
    folder: Path, device: str, dtype: str, variant: str | None, *, hold: bool
) -> dict[str, nn.Module]:
    """The models of a saved pipeline without their weights, which come a block at a time; those
    that can't be streamed are left out.

    Raises:
        QSearchError: a type that is stored and not computed in, or a denoiser whose files aren't
            those of its model.
    """
    computed, stored = TYPES[dtype]
    if stored is not None:
        raise QSearchError(
            f"streamed weights are computed with in the type that they come in; {dtype} "
            "is cast for each call: "
            "take dtype bfloat16, or offload none"
        )
    found: dict[str, nn.Module] = {}
    for path in sorted(folder.glob("*/config.json")):
        name = path.parent.name
        own = variant if any(path.parent.glob(f"*.{variant}.*")) else None
        remembers = not (is_denoiser(name) or name in DECODERS)
        try:
            model = empty_component(folder, name, computed)
            source = Files(path.parent, own)
            largest = None if is_denoiser(name) else _SMALL
            Stream(model, source, device, computed, largest=largest, hold=hold, remembers=remembers)
        except QSearchError:
            if is_denoiser(name):
                raise
            continue  # of another library, or stored under other names: loaded whole
        found[name] = model
    return found


def variants_of(folder: Path) -> dict[str, set[str]]:
    """Component -> variants of its weight files, "" for the plain ones."""
    found: dict[str, set[str]] = {}
    for path in Path(folder).glob("*/*"):
        match = _WEIGHTS.fullmatch(path.name)
        if match:
            found.setdefault(path.parent.name, set()).add(match["variant"] or "")
    return found


def only_variant(folder: Path) -> str | None:
    """The variant to load where a component has no plain files: the one that all such components
    have.

    Raises:
        QSearchError: there are several.
    """
    lacking = [names for names in variants_of(folder).values() if "" not in names]
    if not lacking:
        return None
    shared = sorted(set.intersection(*lacking))
    if len(shared) == 1:
        return shared[0]
    held = sorted(set.union(*lacking))
    raise QSearchError(
        f"{folder} has components without plain weight files, and the variants "
        f"{', '.join(held)}: say which"
    )


#: what diffusers calls a kind of checkpoint begins with one of these -> the pipeline that it is
_KINDS = {
    "xl_inpaint": "StableDiffusionXLInpaintPipeline",
    "xl_refiner": "StableDiffusionXLImg2ImgPipeline",
    "xl": "StableDiffusionXLPipeline",
    "playground": "StableDiffusionXLPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
}


def _single_file(path: Path, dtype: torch.dtype, config: Path | None) -> Any:
    import diffusers

    if path.suffix.lower() not in _SINGLE:
        raise QSearchError(
            f"a model is a folder or a checkpoint in one file ({', '.join(_SINGLE)}); given {path}"
        )
    home = config or (path.parent if (path.parent / "model_index.json").is_file() else None)
    if home is not None:
        name = str(json.loads((home / "model_index.json").read_text("utf-8"))["_class_name"])
    else:
        from diffusers.loaders import single_file_utils as utils

        kind = utils.infer_diffusers_model_type(utils.load_single_file_checkpoint(str(path)))
        name = next((n for begins, n in _KINDS.items() if kind.startswith(begins)), "")
        if not name:
            raise QSearchError(
                f"{path} holds a checkpoint of the kind {kind}; give the folder of a "
                "pipeline of that kind as `config`"
            )
    made = getattr(diffusers, name)
    more = {} if home is None else {"config": str(home)}
    return made.from_single_file(str(path), torch_dtype=dtype, local_files_only=True, **more)
