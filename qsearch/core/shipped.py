"""YAML that ships with the project (cards of models and devices, methods, protocols), found in the
source tree and in a wheel alike.

In the source tree these files lie in `configs/`, where people look for them; hatch puts the same
folder inside the package when it builds a wheel, so that `pip install` brings them. A path to a
file of one's own does wherever a name does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import QSearchError, nearest
from .settings import shortened

if TYPE_CHECKING:
    from pydantic import BaseModel

    Model = TypeVar("Model", bound=BaseModel)

KINDS = ("devices", "methods", "models", "protocols")
_PACKAGE = Path(__file__).parents[1]


def folder(kind: str) -> Path:
    """Where the files of a kind ("models", "devices", "methods", "protocols") lie."""
    return _configs() / kind


def here(path: Path) -> Path:
    """A file as docs name it, `configs/methods/mixdq-w8a8.yaml`, wherever one stands: one's own
    first, then what ships.

    Args:
        path: of a file; what does not begin with `configs/` stays as it is.

    Returns:
        The path of a file that is there, or `path`.
    """
    if path.exists() or path.parts[:1] != ("configs",):
        return path
    inside = _configs().joinpath(*path.parts[1:])
    return inside if inside.is_file() else path


def _configs() -> Path:
    """`configs/` in a wheel, or in the source tree."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def names(kind: str) -> list[str]:
    """Sorted names of what ships."""
    return sorted(path.stem for path in folder(kind).glob("*.yaml"))


def caption(kind: str, name: str) -> str:
    """The title that the file gives itself; a config's, which has none, is what its first comment
    begins with.
    """
    import yaml

    text = path_of(kind, name).read_text(encoding="utf-8")
    title = yaml.safe_load(text).get("title", "")
    return str(title) or text.splitlines()[0].removeprefix("#").partition(":")[0].strip()


def path_of(kind: str, name: str) -> Path:
    """The file of a name, or the file that `name` is a path of. Raises `QSearchError` with the
    nearest name.
    """
    given = Path(name)
    if given.suffix == ".yaml":
        if not given.is_file():
            raise QSearchError(
                f"{name} does not exist; give one of `qsearch list {kind}` or the path of "
                "a YAML file"
            )
        return given
    if name not in names(kind):
        raise QSearchError(f"there is no {name!r} among the {kind}{nearest(name, names(kind))}")
    return folder(kind) / f"{name}.yaml"


def read(kind: str, name: str, model: type[Model]) -> Model:
    """A file of a kind, checked against `model`. Raises `QSearchError` that names the key and the
    nearest known one.
    """
    import yaml
    from pydantic import ValidationError

    path = path_of(kind, name)
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise QSearchError(
            f"{path} is not readable as YAML: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(content, dict):
        raise QSearchError(f"{path} must hold a mapping, it holds {type(content).__name__}")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        if first["type"] == "extra_forbidden":
            known = [field.alias or name for name, field in model.model_fields.items()]
            raise QSearchError(
                f"{path}: unknown key {place!r}{nearest(str(first['loc'][-1]), known)}"
            ) from None
        raise QSearchError(
            f"{path}: {place}: {first['msg'].lower()}; given {shortened(first.get('input'))}"
        ) from None
