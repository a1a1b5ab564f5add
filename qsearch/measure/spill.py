"""Spill: copies of tensors that are kept for long, in temporary files that are mapped into memory,
once many bytes are kept.

The arguments of a large model's recorded calls (text embeddings, latents, ControlNet's residuals)
add up over samples and steps. A file is reserved whole before it is written, so that a full disk is
an error and not a crash, and it has no name once it is mapped: it is gone with the process.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import QSearchError

#: smaller tensors stay in memory
_SMALL = 2**16


@dataclass
class Spill:
    """Keeps copies in memory up to `limit` bytes, and those after that on disk.

    Attributes:
        limit: bytes; an eighth of the machine's memory when left out.
        kept: bytes that are kept in memory.
        mapped: bytes that are kept on disk.
    """

    limit: int | None = None
    kept: int = 0
    mapped: int = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy that shares nothing with `tensor`, on its device and in its type.

        Raises:
            QSearchError: the disk has no room for it.
        """
        size = tensor.numel() * tensor.element_size()
        limit = _memory() // 8 if self.limit is None else self.limit
        plain = tensor.device.type != "cpu" or size < _SMALL or not hasattr(os, "posix_fallocate")
        if plain or self.kept + size <= limit:
            self.kept += size
            return tensor.detach().clone()
        self.mapped += size
        return _mapped(tensor, size)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _mapped(tensor: Tensor, size: int) -> Tensor:
    try:
        with tempfile.NamedTemporaryFile(prefix="qsearch-calls-") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            held = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    except OSError as error:
        raise QSearchError(
            f"recorded calls are kept in {tempfile.gettempdir()}, and {size:,} bytes "
            f"don't fit there ({error}); set "
            "TMPDIR to a folder with room, or record fewer samples at a time"
        ) from error
    return held.view(tensor.shape).copy_(tensor.detach())
