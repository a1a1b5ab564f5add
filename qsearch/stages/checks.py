"""Checks before work: model, memory, disk, prompts and metrics, in the first second and not after
minutes.

All is read from the saved pipeline's own small files and from the headers of its weights; no model
is loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..core import plugins
from ..core.components import is_denoiser
from ..core.errors import QSearchError, nearest

if TYPE_CHECKING:
    from ..measure.prompts import Prompts
    from .folder import Run

#: verbs that run the model, in the order of work
VERBS = ("extract", "profile", "allocate", "evaluate", "apply", "export")
_GB = 1e9


def check_run(run: Run) -> None:
    """What the whole job needs. Raises `QSearchError` as `check` does."""
    check(run, "extract", "profile", "evaluate")


def check(run: Run, *verbs: str) -> None:
    """What these verbs need of the run's model, machine, prompts and metrics.

    Args:
        run: the run.
        verbs: some of `VERBS`.

    Raises:
        QSearchError: the pipeline lacks files, its weights do not fit the memory, the disk is full,
            prompts can't be read or are too few, or a metric can't be taken of what the model
            makes.
    """
    _whole(run.model_folder)
    check_components(run)
    check_device(run)
    _memory(run)
    _clips(run, verbs)
    if "apply" in verbs or "export" in verbs:
        _disk(run)
    c = run.config
    prompts = run.prompts(c.first_prompts, part=0)
    if "profile" in verbs:
        check_metrics(run, c.profile.metrics, prompts, "profile.metrics")
        _bins(run)
    if "evaluate" in verbs:
        check_metrics(run, run.metrics, run.prompts(run.samples, part=1), "evaluate.metrics")


def _whole(folder: Path) -> None:
    """Refuse a pipeline that lacks a component's folder or weights.

    The pipeline's class, whose import takes seconds, is asked where a folder is missing alone: it
    declares which names are settings, or parts that it makes itself.
    """
    from ..measure.own import named_parts, read_config
    from ..measure.sizes import weight_files

    for name, held in read_config(folder / "model_index.json").items():
        if name.startswith("_") or not isinstance(held, list) or len(held) != 2 or held[1] is None:
            continue
        part = folder / name
        if not part.is_dir():
            if name not in named_parts(folder):
                continue
            there = [p.name for p in folder.iterdir() if p.is_dir()]
            near = nearest(name, there) if there else ""
            raise QSearchError(
                f"{folder} must hold a whole diffusers pipeline; its model_index.json names "
                f"{name}, and there is no such folder{near}"
            )
        if (part / "config.json").is_file() and not weight_files(part):
            raise QSearchError(
                f"{folder} must hold a whole diffusers pipeline; {name} has no weights "
                "(*.safetensors or *.bin)"
            )


def check_device(run: Run) -> None:
    """Refuse a device that this machine, or this build of torch, has not.

    Args:
        run: the run; `config.device` names the device.

    Raises:
        QSearchError: naming the devices that there are.
    """
    if run.config.device in (None, "auto", "cpu"):
        return
    import torch

    try:
        torch.empty(0, device=run.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        there = ["auto", "cpu", *([here.type] if here is not None else [])]
        raise QSearchError(
            f"device: this machine has {', '.join(there)}; given {run.device!r} "
            f"({str(error).splitlines()[0].rstrip('.')})"
        ) from None


def _memory(run: Run) -> None:
    """Refuse weights that are to be in memory and can't fit this machine's in the type that is
    asked for.
    """
    from ..measure.offloading import WIDTHS
    from ..measure.sizes import components_in, free_memory, total_memory

    if run.offload.kind != "none" or run.device.partition(":")[0] != "cpu":
        return
    count = sum(held.parameters for held in components_in(run.model_folder).values())
    need, free, total = count * WIDTHS[run.dtype], free_memory(), total_memory()
    if free is None or total is None or need <= free:
        return
    half = " or --dtype bfloat16, which takes half" if run.dtype == "float32" else ""
    words = (
        f"{run.model_name} has {count / 1e9:.1f} B weights, {need / _GB:.1f} GB in "
        f"{run.dtype} (take --offload auto{half}); {free / _GB:.1f} of {total / _GB:.1f} "
        "GB of memory are free"
    )
    if need > total:
        raise QSearchError(words)
    run.progress.say(f"warning: {words}")


def _clips(run: Run, verbs: Sequence[str]) -> None:
    """Refuse clips whose activations, kept for a backward pass, or whose frames, kept of full
    precision and of a plan, take more memory than there is.
    """
    from ..measure.sizes import free_on, total_memory
    from .estimates import activation_bytes, frames_of

    c, frames = run.config, frames_of(run)
    size = run.own.sized(run.sampling)
    if run.own.makes != "videos" or size is None:
        return
    cpu, total = run.device.partition(":")[0] == "cpu", total_memory()
    needs = []
    if "profile" in verbs and not c.profile.checkpointing:
        batch = min(c.profile.batch, c.profile.samples)
        room = total if cpu else free_on(run.device)
        needs.append((activation_bytes(run) * batch, room, "profile", "or checkpointing"))
    if "evaluate" in verbs:
        count = 2 * run.samples * frames * size[0] * size[1]
        needs.append((12.0 * count, total, "evaluate", "or fewer samples"))
    for need, room, verb, other in needs:
        if room is not None and need > room:
            raise QSearchError(
                f"{verb}: clips of {frames} frames of {size[0]}x{size[1]} take {need / _GB:.0f} GB "
                f"or more, and there are {room / _GB:.0f}; take fewer frames {other}"
            )


def _disk(run: Run) -> None:
    """Refuse to begin what the disk has no room for: the weights in 8 bits, at least."""
    from ..measure.sizes import components_in

    place = next(p for p in (run.folder, *run.folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    need = sum(held.parameters for held in components_in(run.model_folder).values()) // 2
    if need > free:
        raise QSearchError(
            f"{place} has {free / _GB:.2f} GB left, the plan's weights take {need / _GB:.2f} GB or "
            "more; make room, or give another folder with --output"
        )


def _bins(run: Run) -> None:
    asked = run.config.profile.bins
    if run.bins < asked and "bins" in run.config.profile.model_fields_set:
        run.progress.say(
            f"profile: {run.bins} step bins instead of {asked}, one for each sampler step"
        )


def check_components(run: Run) -> None:
    """Refuse components that the saved pipeline lacks, and settings of components that are not
    asked for.

    Raises:
        QSearchError: naming the key of the config, and the nearest component.
    """
    asked = run.config.components
    saved = saved_components(run.model_folder)
    for name in asked:
        if name not in saved:
            raise QSearchError(
                f"components: {run.model_name} has no component "
                f"{name!r}{nearest(name, saved)}; it has "
                f"{', '.join(saved)}"
            )
    check_patterns(run)


def check_patterns(run: Run, planned: Sequence[str] = ()) -> None:
    """Refuse budgets and rules for components that are not planned, where the model is at hand.

    Args:
        run: the run.
        planned: components of its graph; those that the config asks for when left out.

    Raises:
        QSearchError: naming the key of the config, and how the component is asked for.
    """
    asked, allocate = tuple(planned) or run.config.components, run.config.allocate
    try:
        saved = saved_components(run.model_folder)
    except QSearchError:  # a plan can be made from the run's own files
        return
    within = asked or tuple(name for name in saved if is_denoiser(name))
    places = {
        "groups": allocate.groups,
        "protected": allocate.protected,
        "allowed": allocate.allowed,
        "layers": allocate.layers,
        "inputs": allocate.inputs,
        "sites": allocate.sites,
    }
    for place, patterns in places.items():
        for pattern in patterns:
            head = pattern.partition(".")[0]
            if head in saved and head not in within:
                raise QSearchError(
                    f"allocate.{place}: {pattern!r} is of {head}, which is not in the "
                    "graph; it holds "
                    f"{', '.join(within)}: set components: [{', '.join((*within, head))}]"
                )


def saved_components(folder: Path) -> tuple[str, ...]:
    """The models of a saved pipeline: components with a config.json; tokenizers and schedulers have
    none.
    """
    from ..measure.own import read_config

    index = read_config(folder / "model_index.json")
    return tuple(name for name in index if (folder / name / "config.json").is_file())


def check_metrics(run: Run, metrics: Iterable[str], prompts: Prompts, place: str) -> None:
    """Refuse metrics that can't be taken of what the run's pipeline makes from `prompts`.

    Args:
        run: the run.
        metrics: names of plug-ins, and `noise`.
        prompts: what is sampled.
        place: key of the config that names them, for the error.

    Raises:
        QSearchError: naming the key and the metric.
    """
    shape = picture_shape(run)
    for name in metrics:
        if name == "noise":
            continue
        metric = plugins.load("metrics", name)
        check = getattr(metric, "check", None)  # optional: most metrics take anything
        try:
            if metric.needs_video and run.own.makes not in ("videos", ""):
                raise QSearchError(
                    f"{name} compares frames of a video; this pipeline makes {run.own.makes}"
                )
            if getattr(metric, "needs_pictures", False) and run.own.makes == "other":
                raise QSearchError(
                    f"{name} looks at pictures; {run.own.kind} makes none: measure sqnr"
                )
            if check is not None:
                check(shape, prompts)
            if place == "profile.metrics" and not hasattr(metric, "features"):
                raise QSearchError(
                    f"{name} has no gradients that a sensitivity could be measured by; it is for "
                    "evaluate.metrics"
                )
        except QSearchError as error:
            raise QSearchError(f"{place}: {error}") from None


def picture_shape(run: Run) -> tuple[int, int, int] | None:
    """Shape [3, H, W] of what the run's pipeline makes; None where its configurations don't say."""
    size = run.own.sized(run.sampling)
    return None if size is None else (3, *size)
