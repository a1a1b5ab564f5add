"""Headers, hashes and atomic writes: every file of a run begins with the same header.

One header for all artefacts (schema, graph, parents, seed, command, versions, key) lets a reader
refuse a file of another graph with both names in the message, and lets the pipeline see whether a
file still answers the question that is asked. Files are written beside their place and renamed, so
that a reader (or a killed process) never sees half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import ArtifactError, QSearchError
from .leftovers import beside, clear

#: id that a graph had by an earlier rule -> its id of today; filled when a graph's id is asked for
_RENAMED: dict[str, str] = {}
_RECORDED = (
    "qsearch-diffusion",
    "torch",
    "diffusers",
    "transformers",
    "scipy",
    "optuna",
    "xgboost",
    "numpy",
    "triton",
)


def canonical(content: Any) -> str:
    """JSON text that depends on the content alone: sorted keys, no spaces, no NaN."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(content: Any) -> str:
    """Sixteen hex digits of the SHA-256 of `canonical(content)`."""
    return hashlib.sha256(canonical(content).encode()).hexdigest()[:16]


def rename_graph(earlier: str, now: str) -> None:
    """Files that name the graph `earlier` belong to the graph `now` from here on."""
    _RENAMED[earlier] = now


def graph_name(graph: str) -> str:
    """Today's id of a graph that a file names, which may be by an earlier rule."""
    return _RENAMED.get(graph, graph) if isinstance(graph, str) else str(graph)


def versions() -> dict[str, str]:
    """Installed versions of what influences numbers, and Python's."""
    found = {"python": platform.python_version()}
    for name in _RECORDED:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@dataclass(frozen=True)
class Header:
    """What every artefact says of itself.

    `schema`: kind and version, e.g. "qsearch.plan/1". `graph`: id of the graph it belongs to.
    `parents`: name -> digest of what it was made from. `key`: digest of the question it answers
    (empty where there is none); equal keys mean that the work need not be done again.
    """

    schema: str
    graph: str = ""
    parents: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    key: str = ""
    command: str = field(default_factory=lambda: command_line(sys.argv))
    versions: dict[str, str] = field(default_factory=versions)


#: user and password of a URL, however the password is written, or a user alone
_USER = re.compile(r"(?<=://)(?:[^/@:\s]*:[^\s]*@|[^/@\s]*@)")
_SECRET = re.compile(r"(?i)((?:password|passwd|token|secret|api_?key)[\w-]*=)[^&\s]+")


def without_secrets(text: str) -> str:
    """A text for one's own terminal: no users or passwords of URLs."""
    return _SECRET.sub(r"\1***", _USER.sub("***@", text))


def redacted(text: str) -> str:
    """A text for files that people publish and lines that they paste: no users or passwords of
    URLs, no folder above the last.

    Paths below the working folder are written relative to it, those of the home folder from `~`,
    others by their name alone.
    """
    return " ".join(_without_folders(word) for word in without_secrets(text).split(" "))


def _without_folders(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    scheme, mark, rest = value.partition(":///")
    before, path = (f"{scheme}:///", f"/{rest.lstrip('/')}") if mark else ("", value)
    if mark and not rest.startswith("/"):
        return word
    if not Path(path).is_absolute():
        return word
    for folder, sign in ((Path.cwd(), ""), (Path.home(), "~")):
        if folder != Path(folder.anchor) and Path(path).is_relative_to(folder):
            return f"{option}{equals}{before}{Path(sign) / Path(path).relative_to(folder)}"
    return f"{option}{equals}{before}…/{Path(path).name}"


def command_line(argv: Sequence[str]) -> str:
    """The command of a process for a file's header, `redacted`."""
    return " ".join([Path(argv[0]).name if argv else "", *map(redacted, argv[1:])])


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a full disk or a forbidden folder raises, in any library's words, into one line
    about `path`.

    Raises:
        QSearchError: writing failed.
    """
    try:
        yield
    except QSearchError:
        raise
    except Exception as error:
        reason = _refused(error)
        if reason is None:
            raise
        raise QSearchError(
            f"cannot write {path}: {reason}; give a folder with room and write permission"
        ) from error


def _refused(error: BaseException | None) -> str | None:
    """What the operating system said, if it was that that failed: safetensors' own error is no
    OSError.
    """
    if error is None:
        return None
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if "(os error " in str(error):  # of libraries in Rust
        return str(error).rpartition(": ")[2].partition(" (os error")[0]
    return _refused(error.__cause__ or error.__context__)


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary neighbour of `path`, then rename it into place; on any failure
    nothing is left behind.
    """
    path = Path(path)
    temporary = beside(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            clear(path, "tmp")
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _check(
    path: Path,
    given: Mapping[str, Any],
    schema: str,
    graph: str | None,
    earlier: tuple[str, ...] = (),
) -> Header:
    kind, version = schema.split("/")
    found = str(given.get("schema", "nothing"))
    if found not in earlier and found.partition("/")[0] != kind:
        raise ArtifactError(
            f"{path} must be a {schema} file, its header says {found!r}; give the file "
            f"that holds the {kind.split('.')[-1]}"
        )
    if found != schema and found not in earlier:
        raise ArtifactError(
            f"{path} has schema {found!r}, this qsearch reads version {version}; make it "
            "again with this version"
        )
    known = {name: given[name] for name in Header.__dataclass_fields__ if name in given}
    try:
        header = Header(**known)
    except TypeError as error:
        raise ArtifactError(f"{path}: its header is broken ({error})") from error
    header = replace(header, graph=graph_name(header.graph))
    if graph is not None and header.graph != graph_name(graph):
        raise ArtifactError(
            f"{path} was made for graph {header.graph or 'unknown'}, the model here is "
            f"graph {graph}; make it again for this model"
        )
    return header


def write_json(
    path: Path, header: Header, content: Mapping[str, Any], *, lines: tuple[str, ...] = ()
) -> None:
    """Header and content as one JSON object. Entries of the sections named in `lines` get a line
    each, for diffs and for people.
    """
    parts = []
    for name, value in {"header": asdict(header), **content}.items():
        if name in lines and isinstance(value, Mapping):
            rows = ",\n".join(
                f"    {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in value.items()
            )
            text = "{\n" + rows + "\n  }" if rows else "{}"
        elif name in lines:
            rows = ",\n".join(f"    {json.dumps(v, allow_nan=False)}" for v in value)
            text = "[\n" + rows + "\n  ]" if rows else "[]"
        else:
            text = json.dumps(value, indent=2, allow_nan=False).replace("\n", "\n  ")
        parts.append(f"  {json.dumps(name)}: {text}")
    write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")


def read_json(
    path: Path, schema: str, graph: str | None = None, *, earlier: tuple[str, ...] = ()
) -> tuple[Header, dict[str, Any]]:
    """Header and content of a JSON artefact.

    Args:
        path: the file.
        schema: the schema that it must have, e.g. "qsearch.plan/2".
        graph: id of the graph that it must be for; any when left out.
        earlier: older schemas whose content the caller converts.

    Raises:
        ArtifactError: the file is missing, truncated, of another schema, or for another graph.
    """
    path = Path(path)
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} does not exist; make it with the verb before this one"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is not readable as JSON, perhaps truncated ({error}); make it again"
        ) from error
    if not isinstance(whole, dict) or not isinstance(whole.get("header"), dict):
        raise ArtifactError(f"{path} must be a {schema} file, it has no qsearch header")
    return _check(path, whole.pop("header"), schema, graph, earlier), whole


def write_parquet(path: Path, header: Header, frame: Any) -> None:
    """A pandas frame as Parquet, the header in the file's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata(
        {**(table.schema.metadata or {}), b"qsearch": canonical(asdict(header)).encode()}
    )
    write_atomic(path, lambda temporary: pq.write_table(table, temporary))


def read_parquet(path: Path, schema: str, graph: str | None = None) -> tuple[Header, Any]:
    """Header and pandas frame of a Parquet artefact; errors as in `read_json`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} does not exist; make it with the verb before this one"
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(
            f"{path} is not readable as Parquet, perhaps truncated "
            f"({str(error).splitlines()[0]}); make it again"
        ) from error
    try:
        given = json.loads((table.schema.metadata or {})[b"qsearch"])
    except (KeyError, ValueError):
        raise ArtifactError(f"{path} must be a {schema} file, it has no qsearch header") from None
    return _check(path, given, schema, graph), table.to_pandas()


def peek(path: Path) -> str:
    """The schema of any artefact, e.g. "qsearch.plan/1"; raises `ArtifactError` for a file that is
    none.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return str(json.loads((pq.read_schema(path).metadata or {})[b"qsearch"])["schema"])
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise ArtifactError(
                f"{path} is not a qsearch artefact ({str(error).splitlines()[0]})"
            ) from error
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["header"]["schema"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is not a qsearch artefact ({type(error).__name__}: {error})"
        ) from error
