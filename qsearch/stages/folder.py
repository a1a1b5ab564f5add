"""Run: a config's folder, model and prompts, and the keys that say which question a file answers.

Every artefact carries the key of the question it answers (settings, parents, the model's own
bytes). A stage whose artefact has the wanted key is skipped; a killed run starts again at the stage
it was in, and within a sweep or an evaluation at the next item.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import plugins
from ..core.artifacts import digest, versions
from ..core.errors import QSearchError, nearest
from ..core.progress import Progress, Silent
from .config import Config

if TYPE_CHECKING:
    from ..core.graph import OpGraph
    from ..core.table import SensitivityTable
    from ..measure.pipelines import Prompts, Sampling

#: lie beside a model's weights and say nothing that is computed with
_RECORDS = ("scores.json", "recipe.json")
#: the noise of calibration and of evaluation is not that of profiling: added to the seed of each
NOISES = {"profile": 0, "calibrate": 250_000, "evaluate": 500_000}


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
        """Folder of the saved pipeline that `model` names.

        It is a name of the zoo, a local folder or a hub id. Raises `QSearchError` for anything
        else, and for a card, which has no weights.
        """
        model = self.config.model
        for family in plugins.names("families"):
            found = plugins.load("families", family).folder(model)
            if found is not None:
                if not (found / "model_index.json").is_file():
                    raise QSearchError(
                        f"{model} has no weights in {found}; train them with "
                        f"`python -m qsearch.zoo.train {model}`"
                    )
                return Path(found)
        from ..graphs.families import cards
        from ..zoo import NAMES

        if cards.has(model):
            raise QSearchError(
                f"{model} is a card, shapes without weights: `qsearch extract` reads its graph, "
                "what is measured needs the zoo or a local diffusers folder"
            )
        raise QSearchError(
            "a model is a name of the zoo, a card, a local diffusers folder or a hub id; "
            f"given {model!r}{nearest(model, [*NAMES, *cards.names()])}"
        )

    @property
    def model_name(self) -> str:
        """The model's name for people: of a local folder its last part, not where it lies."""
        return (
            Path(self.config.model).name
            if Path(self.config.model).is_absolute()
            else (self.config.model)
        )

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the saved pipeline: its files' names, sizes and contents (up to 64 MiB each)."""
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
        from ..measure.pipelines import load_pipeline

        return load_pipeline(self.model_folder, self.config.device)

    @property
    def sampling(self) -> Sampling:
        """Sampler settings of profiling: the section's, with the run's seed."""
        return self.sampling_for("profile")

    def sampling_for(self, verb: str) -> Sampling:
        """Sampler settings with the noise of a verb: "profile", "calibrate" or "evaluate"."""
        s = self.config.sampling
        return replace(s, seed=self.config.seed + s.seed + NOISES[verb])

    def prompts(self, count: int, *, part: int) -> Prompts:
        """`count` prompts of part 0 (profiling, calibration) or 1 (evaluation).

        They are those of the file, or captions of scenes that no training saw. Raises
        `QSearchError` where the file holds too few.
        """
        from ..measure.pipelines import read_prompts, scene_prompts

        if self.config.prompts is None:
            return scene_prompts(count, self.config.seed * 2 + part)
        held = read_prompts(self.config.prompts)
        start = self.config.first_prompts if part else 0
        if len(held) < start + count:
            raise QSearchError(
                f"{self.config.prompts} holds {len(held)} prompts; profiling and evaluation need "
                f"{start + count}"
            )
        return held[start : start + count]

    def key(self, verb: str, **question: Any) -> str:
        """Digest of the question that a stage answers; another version of qsearch asks again."""
        version = versions().get("qsearch-diffusion", "")
        return digest({"verb": verb, "qsearch": version, **question})

    def path(self, name: str) -> Path:
        """A file of the run."""
        return self.folder / name

    def found(self, name: str, key: str, load: Callable[[Path], Any]) -> Any:
        """What an earlier call left in a file, where it is whole and answers that key; else None."""
        try:
            noun = load(self.path(name))
        except QSearchError:
            return None
        return noun if noun.header is not None and noun.header.key == key else None

    def graph(self) -> OpGraph:
        """The graph that `extract` left here."""
        from ..core.graph import OpGraph

        return OpGraph.load(self.path("graph.json"))

    def table(self, graph: OpGraph) -> SensitivityTable:
        """The sensitivity table that `profile` left here."""
        from ..core.table import SensitivityTable

        return SensitivityTable.load(self.path("sensitivity.parquet"), graph.id)

    def tables(self, graph: OpGraph) -> tuple[SensitivityTable, ...]:
        """The run's sensitivity table, or nothing where it was not profiled."""
        return (self.table(graph),) if self.path("sensitivity.parquet").is_file() else ()
