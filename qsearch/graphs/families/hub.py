"""Any diffusers pipeline on the Hugging Face hub, by its id OWNER/NAME: diffusers fetches it, or
finds what it fetched before.
"""

from __future__ import annotations

import re
from pathlib import Path

from ...core.errors import QSearchError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def folder(model: str) -> Path | None:
    """Folder of the fetched pipeline; None for what looks like no id, or like the path of a file
    here. Raises `QSearchError` where it can't be had.
    """
    if not _ID.fullmatch(model) or Path(model).exists() or Path(model).parent.is_dir():
        return None
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(model))
    except Exception as error:  # the hub's, requests' and diffusers' own kinds
        reason = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        ).strip()
        raise QSearchError(
            f"{model!r} is no folder here, and as an id of the hub it can't be fetched: {reason}"
        ) from error
