"""Options that every verb which runs the model has; they hold for one call, what a run keeps is in
its config.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

_PANEL = "The model, for this call"


def _option(help_: str) -> Any:
    return typer.Option(help=help_, show_default=False, rich_help_panel=_PANEL)


#: option -> (type, help)
OPTIONS: dict[str, tuple[Any, str]] = {
    "prompts": (Path, "text file, one prompt a line"),
    "steps": (int, "sampler steps"),
    "guidance": (float, "guidance scale"),
    "height": (int, "pixels"),
    "width": (int, "pixels"),
    "frames": (int, "of a video"),
    "device": (str, "torch device, or auto"),
    "dtype": (str, "type of the weights: auto (that of their files), float32, bfloat16, float16"),
    "offload": (str, "where the weights stay: auto, none (all in memory), block, disk"),
    "metrics": (str, "what is measured, e.g. sqnr,ssim; see `qsearch list metrics`"),
    "samples": (int, "how many samples"),
}
#: option -> key of the config, where it is the same for all verbs
_KEYS = {
    "prompts": "prompts",
    "steps": "sampling.steps",
    "guidance": "sampling.guidance",
    "height": "sampling.height",
    "width": "sampling.width",
    "frames": "sampling.frames",
    "device": "device",
    "dtype": "dtype",
    "offload": "offload",
}


def model_options(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of `OPTIONS` but some; they come as the keyword `given`, a
    mapping of those that were given.
    """
    names = [name for name in OPTIONS if name not in left_out]

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command)
        hints = get_type_hints(command, include_extras=True)
        kept = [
            p.replace(annotation=hints.get(p.name, p.annotation))
            for p in own.parameters.values()
            if p.name != "given"
        ]
        more = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[OPTIONS[name][0] | None, _option(OPTIONS[name][1])],
            )
            for name in names
        ]

        @functools.wraps(command)
        def call(*args: Any, **kwargs: Any) -> None:
            asked = {name: kwargs.pop(name, None) for name in names}
            given = {name: value for name, value in asked.items() if value is not None}
            command(*args, given=given, **kwargs)

        signature = own.replace(parameters=[*kept, *more])
        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        del call.__wrapped__
        return call

    return wrap


def settings_of(given: Mapping[str, Any], samples: str, metrics: str = "") -> dict[str, Any]:
    """Options as keys of the config.

    Args:
        given: of `model_options`.
        samples: the key that `--samples` means for this verb, e.g. "profile.samples".
        metrics: likewise for `--metrics`.

    Returns:
        Key such as `sampling.steps` -> value.
    """
    keys = {**_KEYS, "samples": samples, "metrics": metrics}
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name == "metrics":
            value = words(value)
        elif isinstance(value, Path):
            value = str(value.resolve())
        found[keys[name]] = value
    return found


def words(text: str | None) -> list[str] | None:
    """`a, b` as a list; None where nothing was given."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]
