"""Run: a config's folder, model and prompts, and the keys that say which question each of its files answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .config import Config
from .core import plugins
from .core.artifacts import digest, versions
from .core.errors import QSearchError, nearest

if TYPE_CHECKING:
    from .measure.pipelines import Prompts, Sampling

_RECORDS = (
    "scores.json",
    "recipe.json",
)  # lie beside a model's weights and say nothing that is computed with


class Progress(Protocol):
    """How a run speaks: `say` a line, `track` a loop (the context gives a function that advances it)."""

    def say(self, line: str) -> None: ...  # noqa: D102 (the class says it)

    def track(self, title: str, total: int) -> Any: ...  # noqa: D102


class Silent:
    """A `Progress` that says nothing; the default from Python."""

    def say(self, line: str) -> None:
        """Nothing."""

    @contextmanager
    def track(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Nothing."""
        yield lambda n: None


@dataclass
class Run:
    """A run's folder and config, and the model, which is loaded only when a stage needs it."""

    config: Config
    progress: Progress = field(default_factory=Silent)

    def __post_init__(self) -> None:
        if self.config.folder is None:
            raise QSearchError(
                "a run needs a folder; give `folder` in the config, or load the config from a file"
            )
        self.folder = Path(self.config.folder)

    @cached_property
    def model_folder(self) -> Path:
        """Folder of the saved pipeline that `model` names: a name of the zoo, a local folder or a hub id."""
        for family in plugins.names("families"):
            found = plugins.load("families", family).folder(self.config.model)
            if found is not None:
                if not (found / "model_index.json").is_file():
                    raise QSearchError(
                        f"{self.config.model} has no weights in {found}; train them with `python -m qsearch.zoo.train {self.config.model}`"
                    )
                return Path(found)
        from .graphs.families import cards
        from .zoo import NAMES

        model = self.config.model
        if cards.has(model):
            raise QSearchError(
                f"{model} is a card, shapes without weights: `qsearch extract` reads its graph, what is measured needs the zoo or a local diffusers folder"
            )
        raise QSearchError(
            f"a model is a name of the zoo, a card, a local diffusers folder or a hub id; given {model!r}{nearest(model, [*NAMES, *cards.names()])}"
        )

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the saved pipeline: names, sizes and contents of its files (contents up to 64 MiB each)."""
        sha = hashlib.sha256()
        loaded = (
            p
            for p in self.model_folder.rglob("*")
            if p.suffix in (".json", ".safetensors", ".bin", ".txt") and p.name not in _RECORDS
        )
        for path in sorted(loaded):
            size = path.stat().st_size
            sha.update(f"{path.relative_to(self.model_folder)} {size} ".encode())
            sha.update(
                path.read_bytes() if size <= 2**26 else str(path.stat().st_mtime_ns).encode()
            )
        return sha.hexdigest()[:16]

    @cached_property
    def pipe(self) -> Any:
        """The diffusers pipeline, loaded."""
        from .measure.pipelines import load_pipeline

        return load_pipeline(self.model_folder, self.config.device)

    @property
    def sampling(self) -> Sampling:
        """Sampler settings; the noise of evaluation is not that of profiling."""
        from .measure.pipelines import Sampling

        s = self.config.sampling
        return Sampling(s.steps, s.guidance, self.config.seed, s.batch, s.resolution, s.frames)

    def prompts(self, count: int, *, part: int) -> Prompts:
        """`count` prompts of part 0 (profiling, calibration) or 1 (evaluation): of the file, or captions of scenes no training saw."""
        from .measure.pipelines import Prompts, scene_prompts

        if self.config.prompts is None:
            return scene_prompts(count, self.config.seed * 2 + part)
        try:
            lines = [
                line.strip()
                for line in self.config.prompts.read_text(encoding="utf-8").splitlines()
                if line.strip()
            ]
        except (OSError, UnicodeDecodeError) as error:
            raise QSearchError(
                f"prompts must be a text file, one a line; {self.config.prompts} can't be read ({error})"
            ) from error
        start = max(self.config.profile.samples, self.config.calibrate.samples or 0) if part else 0
        if len(lines) < start + count:
            raise QSearchError(
                f"{self.config.prompts} holds {len(lines)} prompts; profiling and evaluation need {start + count}"
            )
        return Prompts(tuple(lines[start : start + count]))

    def key(self, verb: str, **question: Any) -> str:
        """Digest of the question that a stage answers, and of who answers it: another version asks again."""
        return digest(
            {"verb": verb, "qsearch": versions().get("qsearch-diffusion", ""), **question}
        )

    def path(self, name: str) -> Path:
        """A file of the run."""
        return self.folder / name

    def found(self, name: str, key: str, load: Callable[[Path], Any]) -> Any:
        """What an earlier call left in a file, when it is whole and answers the question with that key; else None, and it is made again."""
        try:
            noun = load(self.path(name))
        except QSearchError:
            return None
        return noun if noun.header is not None and noun.header.key == key else None
