"""Run: a config's folder, model and prompts, and the keys that say which question a file answers.

Every artefact carries the key of the question it answers (settings, parents, the model's own
bytes). A stage whose artefact has the wanted key is skipped; a killed run starts again at the stage
it was in, and within a sweep or an evaluation at the next item.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
    from ..measure.offloading import Offload
    from ..measure.own import Own
    from ..measure.prompts import Prompts
    from ..measure.sampling import Sampling

#: lie beside a model's weights and say nothing that is computed with
_RECORDS = ("scores.json", "recipe.json")
#: samples of evaluation where nothing is asked: of the zoo's models, of others, at least
_ZOO_SAMPLES, _SAMPLES, _LEAST = 96, 8, 3
#: the noise of calibration and of evaluation is not that of profiling: added to the seed of each
NOISES = {"profile": 0, "calibrate": 250_000, "evaluate": 500_000}


@dataclass
class Run:
    """A run's folder and config, and the model, which is loaded only when a stage needs it."""

    config: Config
    progress: Progress = field(default_factory=Silent)
    #: lines that were said about this run, so that none is said twice
    said: set[str] = field(default_factory=set)
    #: whether a whole job is done, so that no stage names the next command
    whole: bool = False

    def __post_init__(self) -> None:
        if self.config.folder is None:
            raise QSearchError(
                "a run needs a folder; give `folder` in the config, or load the config from a file"
            )
        self.folder = Path(self.config.folder)

    @cached_property
    def model_folder(self) -> Path:
        """Folder of the saved pipeline that `model` names.

        It is a name of the zoo, a local folder, a checkpoint in one file or a hub id. Raises
        `QSearchError` for anything else, and for a card, which has no weights.
        """
        from ..measure.single_file import unpacked

        model = self.config.model
        if (made := unpacked(model)) is not None:
            return made
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
        from ..zoo import PIPELINES

        if Path(model).is_dir():
            part = (Path(model) / "config.json").is_file()
            whole = ": it looks like one component, give the folder that it lies in" if part else ""
            raise QSearchError(
                "a model's folder is a whole diffusers pipeline with a model_index.json; given "
                f"{model!r}, which has none{whole}"
            )
        if cards.has(model):
            raise QSearchError(
                f"{model} is a card, shapes without weights: `qsearch extract` reads its graph, "
                "what is measured needs the zoo or a local diffusers folder"
            )
        raise QSearchError(
            "a model is a name of the zoo, a card, a local diffusers folder, a checkpoint in one "
            "file (.safetensors) or a hub id; "
            f"given {model!r}{nearest(model, [*PIPELINES, *cards.names()])}"
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
        """Digest of the saved pipeline: its files' names, sizes and contents (up to 64 MiB
        each).
        """
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

    @property
    def model_key(self) -> str:
        """Digest of what is measured: the saved pipeline, and the type that it is loaded in."""
        c = self.config
        parts = [self.fingerprint, self.dtype if self.dtype != "float32" else "", c.variant or ""]
        return " ".join(part for part in parts if part)

    @cached_property
    def pipe(self) -> Any:
        """The diffusers pipeline, loaded."""
        from ..measure.decoding import tell_of_tiles
        from ..measure.pipelines import load_pipeline
        from ..measure.sizes import growing

        c, offload = self.config, self.offload.kind
        bar = growing(self.model_folder, self.dtype, self.progress, self.model_name)
        with bar if offload == "none" else nullcontext():
            pipe = load_pipeline(
                self.model_folder, self.device, self.dtype, c.variant, offload=offload
            )
        tell_of_tiles(pipe, self.progress.say)
        return pipe

    @contextmanager
    def ticks(self, title: str, samples: int, batch: int, times: int = 1) -> Iterator[None]:
        """Inside, a bar goes by the sampler's steps: those of `samples` prompts, `batch` at once,
        `times` over.
        """
        from ..measure.components import counted

        total = -(-samples // max(1, min(batch, samples))) * self.sampling.steps * times
        left = total
        with self.progress.track(title, total) as advance:

            def at_most(count: int) -> None:  # decoding by the pipeline's own call counts as a step
                nonlocal left
                advance(min(count, left))
                left -= min(count, left)

            with counted(self.pipe, at_most):
                yield

    @contextmanager
    def blocks(self, title: str, passes: int) -> Iterator[None]:
        """Inside, a bar goes by the blocks of streamed denoisers, in so many passes through all of
        them; none where all weights are in memory.
        """
        from ..measure.pipelines import denoisers_of
        from ..measure.streaming import streams_of

        if self.offload.kind == "none":
            yield
            return
        streams = [s for part in denoisers_of(self.pipe).values() for s in streams_of(part)]
        left = total = passes * sum(len(stream.units) for stream in streams)
        with self.progress.track(title, total) as advance:

            def at_most(count: int) -> None:
                nonlocal left
                advance(min(count, left))
                left -= min(count, left)

            for stream in streams:
                stream.passed.append(at_most)
            try:
                yield
            finally:
                for stream in streams:
                    stream.passed.remove(at_most)

    @cached_property
    def own(self) -> Own:
        """What the model does where nothing is asked."""
        from ..measure.own import own_of

        return own_of(self.model_folder)

    @cached_property
    def device(self) -> str:
        """The torch device: the config's, or the GPU where there is one."""
        if self.config.device not in (None, "auto"):
            return str(self.config.device)
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @cached_property
    def dtype(self) -> str:
        """The type of the weights: the config's, or that of the denoiser's files."""
        if self.config.dtype != "auto":
            return self.config.dtype
        from ..measure.offloading import own_type

        return own_type(self.model_folder)

    @cached_property
    def offload(self) -> Offload:
        """Where the weights stay while the model is at work, and what that takes."""
        from ..measure.offloading import offload_of

        return offload_of(self.model_folder, self.device, self.dtype, self.config.offload)

    @property
    def sampling(self) -> Sampling:
        """Sampler settings of profiling: the section's, with the run's seed."""
        return self.sampling_for("profile")

    @property
    def bins(self) -> int:
        """Step bins of profiling: no more than there are sampler steps."""
        return min(self.config.profile.bins, self.sampling.steps)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics of evaluation: the config's, or those that the model's pictures can have."""
        return self.config.evaluate.metrics or self.own.metrics()

    @property
    def samples(self) -> int:
        """Samples of evaluation: the config's, the zoo's, or as many as the file has left."""
        asked = self.config.evaluate.samples
        if asked is not None:
            return asked
        if self.own.zoo:
            return _ZOO_SAMPLES
        return max(_LEAST, min(_SAMPLES, len(self.prompt_parts[1])))

    @cached_property
    def prompt_parts(self) -> tuple[Prompts, Prompts]:
        """Prompts of profiling (the first half of the file at most), and those after them."""
        from ..measure.prompts import SHIPPED, read_prompts

        held = read_prompts(self.config.prompts or SHIPPED)
        half = max(1, len(held) // 2)
        own = self.config.prompts is not None
        first = min(self.config.first_prompts, half) if own else half
        return held[:first], held[first:] if len(held) > first else held

    def sampling_for(self, verb: str) -> Sampling:
        """Sampler settings with the noise of a verb: "profile", "calibrate" or "evaluate"."""
        s = self.own.sampler(self.config.sampling)
        return replace(s, seed=self.config.seed + s.seed + NOISES[verb])

    def prompts(self, count: int, *, part: int) -> Prompts:
        """`count` prompts of part 0 (profiling, calibration) or 1 (evaluation).

        They are those of the file, in turn; without one, captions of scenes that no training saw
        (models of the zoo), or those that ship. Raises `QSearchError` where evaluation asks for
        more prompts than the file has beside those of profiling.
        """
        from ..measure.prompts import in_turn, scene_prompts
        from ..measure.protocols import protocol_prompts

        if part and (protocol := self.config.protocol) is not None:
            return protocol_prompts(protocol.name, protocol.prompts, self.config.seed * 2 + part)
        if self.config.prompts is None and self.own.zoo:
            moving = self.own.makes == "videos"
            return scene_prompts(count, self.config.seed * 2 + part, moving=moving)
        first, rest = self.prompt_parts
        if part and self.config.evaluate.samples is not None and len(rest) < count:
            held = len(first) + len(rest) if rest.texts != first.texts else len(first)
            fewer = f", or fewer (--samples {len(rest)})" if len(rest) >= _LEAST else ""
            raise QSearchError(
                f"{self.prompts_name} holds {held} prompt{'s' if held > 1 else ''}; profiling and "
                f"evaluation need {len(first) + count}: give a longer file (--prompts){fewer}"
            )
        return in_turn(rest if part else first, count)

    @property
    def prompts_name(self) -> str:
        """What the prompts are, for people."""
        if self.config.prompts is not None:
            return str(self.config.prompts)
        return "captions of the zoo" if self.own.zoo else "the prompts that ship"

    def say_done(self, line: str, then: str) -> None:
        """The last line of a stage, with the next command unless a whole job is done."""
        self.progress.say(line if self.whole else f"{line}; next: {then}")

    def key(self, verb: str, **question: Any) -> str:
        """Digest of the question that a stage answers; another version of qsearch asks again."""
        version = versions().get("qsearch-diffusion", "")
        return digest({"verb": verb, "qsearch": version, **question})

    def path(self, name: str) -> Path:
        """A file of the run."""
        return self.folder / name

    def found(self, name: str, key: str, load: Callable[[Path], Any]) -> Any:
        """What an earlier call left in a file, where it is whole and answers that key; else
        None.
        """
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

    def offered(self, graph: OpGraph) -> tuple[str, ...]:
        """Schemes that drawn plans choose from: those of the run's table, else those of its
        config.
        """
        sites = {layer.name for layer in graph}
        for table in self.tables(graph):
            rows = table.frame[table.frame["site"].isin(sites)]
            if found := [s for s in map(str, rows["scheme"].unique()) if s != "keep"]:
                return tuple(found)
        return self.config.profile.schemes

    def tables(self, graph: OpGraph) -> tuple[SensitivityTable, ...]:
        """The run's sensitivity table, or nothing where it was not profiled."""
        return (self.table(graph),) if self.path("sensitivity.parquet").is_file() else ()
