"""Networks of metrics: loaded once a device, and what is missing is said in one line, with where to
put it.

Weights lie where their own libraries keep them: torchvision's and torch-fidelity's in
`torch.hub.get_dir()`/checkpoints (moved by TORCH_HOME), models of the hub in huggingface_hub's
cache (moved by HF_HOME), CLIP in a folder that QSEARCH_CLIP names. Where a file is missing there,
the library downloads it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor

from ..core.errors import QSearchError, first_line

#: packages whose modules have another name
_PACKAGES = {"cv2": "opencv-python-headless"}


@dataclass(frozen=True)
class Needs:
    """What a metric needs besides the project's own packages.

    Attributes:
        metric: its name.
        modules: modules that must be installed.
        weights: the weights in words, with their size.
        file: name of the file in torch.hub's folder, or the repository on the hub; "" for none.
    """

    metric: str
    modules: tuple[str, ...]
    weights: str = ""
    file: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """Modules that are not installed."""
        return tuple(m for m in self.modules if find_spec(m) is None)

    def check(self) -> None:
        """Refuse before work starts.

        Raises:
            QSearchError: a module is not installed, or the weights lie nowhere and there is no
                network by the user's own word (HF_HUB_OFFLINE).
        """
        if self.missing:
            names = " ".join(_PACKAGES.get(m, m.replace("_", "-")) for m in self.missing)
            raise QSearchError(
                f"{self.metric} needs {', '.join(self.missing)}: pip install {names}, or leave "
                f"{self.metric} out"
            )
        if self.file.endswith((".pth", ".pt")) and not self.path.is_file() and _offline():
            raise QSearchError(self._advice("HF_HUB_OFFLINE is set"))

    @property
    def path(self) -> Path:
        """Where torch.hub keeps the file."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.file

    def _advice(self, reason: str) -> str:
        place = (
            f"put {self.file} into {self.path.parent}"
            if self.file.endswith((".pth", ".pt"))
            else f"download {self.file} with `hf download {self.file}`"
        )
        return (
            f"{self.metric} needs {self.weights}, and they can't be had ({reason}): {place}, "
            f"or leave {self.metric} out"
        )

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Turn what a library says of missing packages, files and networks into one line.

        Raises:
            QSearchError: names the metric, what it needs, and where to put it.
        """
        self.check()
        try:
            yield
        except ImportError as error:
            raise QSearchError(f"{self.metric}: {first_line(error)}") from error
        except (URLError, OSError, RuntimeError, ValueError) as error:
            raise QSearchError(self._advice(first_line(error))) from error
        except (AttributeError, TypeError) as error:
            raise QSearchError(
                f"{self.metric}: {self.modules[0]} does not work with the packages that are "
                f"installed ({first_line(error)}); update it, or leave {self.metric} out"
            ) from error


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def each_frame(pictures: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] as they are; frames of videos [N, T, 3, H, W] as [N * T, 3, H, W]."""
    return pictures.flatten(0, 1) if pictures.ndim == 5 else pictures


def a_sample(values: Tensor, count: int) -> Tensor:
    """Values of frames [N * T] as their mean a sample [N], for N = `count`."""
    return values.reshape(count, -1).mean(1)


def as_bytes(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] as the bytes that a PNG holds."""
    return ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().byte()
