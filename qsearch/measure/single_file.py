"""A checkpoint of a whole pipeline in one file (.safetensors, .ckpt), with the names of its first
publication or diffusers' own.

It is unpacked once, in the type that it is stored in, as a folder that diffusers reads, so that
every verb reads it tensor by tensor as it does any other; the folder lies in the cache
($XDG_CACHE_HOME/qsearch/checkpoints) under a digest of the file. Its configuration is that of the
pipeline's folder that the file lies in (model_index.json, no weights needed), else the one that
diffusers knows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from ..core.errors import QSearchError

_ENDINGS = (".safetensors", ".ckpt")
#: what names of tensors begin with where a file holds more than a denoiser
_OTHERS = ("cond_stage_model.", "conditioner.", "first_stage_model.", "text_encoder", "vae.")
_TYPES = {"F16": "float16", "BF16": "bfloat16"}


def unpacked(model: str) -> Path | None:
    """The diffusers folder that a checkpoint is unpacked into; None for what is no file of that
    kind.

    Raises:
        QSearchError: it can't be read, or nowhere unpacked.
    """
    path = Path(model)
    if path.suffix.lower() not in _ENDINGS or not path.is_file():
        return None
    made = _cache() / _digest(path)
    if (made / "model_index.json").is_file():
        return made
    _whole(path)
    from .loading import load_pipeline

    pipe = load_pipeline(path, dtype=_stored(path))
    partial = made.with_name(f".{made.name}.{os.getpid()}")
    try:
        pipe.save_pretrained(partial)
        partial.rename(made)
    except OSError as error:
        if not (made / "model_index.json").is_file():  # else another process was first
            raise QSearchError(
                f"{path} is unpacked into {made}, and that can't be written ({error}); "
                "set XDG_CACHE_HOME to a "
                "folder with room"
            ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return made


def _whole(path: Path) -> None:
    """Refuse the weights of one component, of a saved pipeline or of a fine-tune."""
    home = path.parent.parent
    if (path.parent / "config.json").is_file() and (home / "model_index.json").is_file():
        raise QSearchError(
            f"a checkpoint in one file holds a whole pipeline; {path} holds one component, give "
            f"the folder of the pipeline, {home}"
        )
    if path.suffix.lower() == ".safetensors" and not any(
        n.startswith(_OTHERS) for n in _held(path)
    ):
        raise QSearchError(
            f"a checkpoint in one file holds a whole pipeline; {path} has neither a VAE nor a text "
            "encoder. Load it into its pipeline with diffusers' `from_single_file`, save that with "
            '`save_pretrained` and give the folder (page "Your own model": a denoiser alone)'
        )


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~").expanduser() / ".cache")
    return Path(base) / "qsearch" / "checkpoints"


def _digest(path: Path) -> str:
    """Of the file (of one of more than 64 MiB: where it lies, its size and date), and of the
    configuration beside it.
    """
    size = path.stat().st_size
    big = f"{path.resolve()} {size} {path.stat().st_mtime_ns}".encode()
    sha = hashlib.sha256(big if size > 2**26 else path.read_bytes())
    for config in sorted(path.parent.rglob("*.json")) if _has_home(path) else ():
        sha.update(config.read_bytes())
    return sha.hexdigest()[:16]


def _has_home(path: Path) -> bool:
    return (path.parent / "model_index.json").is_file()


def _held(path: Path) -> dict[str, dict[str, str]]:
    """Name of a tensor -> what the header of a safetensors file says of it."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= path.stat().st_size - 8:
                raise ValueError(f"a header of {size} bytes")
            held: dict[str, dict[str, str]] = json.loads(file.read(size))
    except (OSError, ValueError) as error:
        raise QSearchError(
            f"{path} is not readable as safetensors ({error}); copy it again"
        ) from error
    return {name: tensor for name, tensor in held.items() if name != "__metadata__"}


def _stored(path: Path) -> str:
    """The type of most of the tensors, as `load_pipeline` names it."""
    if path.suffix.lower() != ".safetensors":
        return "float32"
    kinds = [tensor["dtype"] for tensor in _held(path).values()]
    most = max(set(kinds), key=kinds.count, default="F32")
    return _TYPES.get(most, "float32")
