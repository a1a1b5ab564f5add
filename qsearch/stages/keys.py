"""Keys: digests of files and tables, by which a stage sees that nothing has changed."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.artifacts import digest, read_json
from ..core.errors import ArtifactError

if TYPE_CHECKING:
    from ..core.table import SensitivityTable
    from ..measure.sampling import Sampling


def file_key(path: Path, schema: str) -> str:
    """The key in a JSON artefact's header; "" where there is none."""
    try:
        return read_json(path, schema)[0].key
    except ArtifactError:
        return ""


def file_digest(path: Path | None) -> str:
    """Digest of a file's content; of what is no file, its name; "" for None."""
    if path is None:
        return ""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else str(path)


def table_key(table: SensitivityTable) -> str:
    """Digest of what a sensitivity table says."""
    columns = ["site", "scheme", "step", "metric", "estimate"]
    return digest(table.frame[columns].to_dict("list"))


def sampled(sampling: Sampling) -> dict[str, Any]:
    """Of the sampler's settings those that change what is made: not how many at once."""
    return {name: value for name, value in asdict(sampling).items() if name != "batch"}
