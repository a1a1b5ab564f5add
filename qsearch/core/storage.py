"""Storage: where trials lie: a SQLite file, a database server's URL, or a journal file on a shared
disk.

Optuna's storages do the work. A URL holds a password, so it may be named by an environment variable
or a file (`env:NAME`, `file:PATH`), and what is said of it is redacted. A server that stops answers
again later: whoever has measured something waits for it (`patiently`).
"""

from __future__ import annotations

import functools
import os
import sqlite3
import time
import warnings
import weakref
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .artifacts import redacted
from .errors import QSearchError

if TYPE_CHECKING:
    import optuna

#: metrics that are values of a study, each with whether more of it is better
Aims = tuple[tuple[str, bool], ...]
_SQLITE, _JOURNAL = "sqlite:///", "journal:///"
#: dialect -> the driver that our extra `databases` installs, where the URL names none
_DRIVERS = {
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
}
#: seconds that a worker waits for a database that went away while it measured
PATIENCE = 300.0
_PAUSES = (0.1, 0.4, 1.6, None)
Made = TypeVar("Made")


def storage_url(given: str) -> str:
    """The storage that a command names.

    Args:
        given: a URL, a path, `env:NAME` (an environment variable that holds either) or `file:PATH`
            (a file whose first line does).

    Returns:
        The URL or path.

    Raises:
        QSearchError: the variable or file is not there, or is empty.
    """
    kind, colon, name = given.partition(":")
    if not colon or kind not in ("env", "file") or name.startswith("//"):
        return given
    if kind == "env":
        found = os.environ.get(name, "").strip()
        what = f"the environment variable {name}"
    else:
        what = f"the file {redacted(name)}"
        try:
            found = Path(name).read_text(encoding="utf-8").strip().partition("\n")[0].strip()
        except (OSError, UnicodeDecodeError):
            found = ""
    if not found:
        raise QSearchError(
            f"a storage is a URL, or env:NAME or file:PATH that holds one; {what} holds none"
        )
    return found


def is_url(where: Path | str) -> bool:
    """Whether trials lie behind a URL, and not in a SQLite file that is named by its path."""
    return isinstance(where, str) and "://" in where


def place_of(where: Path | str) -> Path | str:
    """A URL with its driver, or the path of a SQLite file."""
    if not is_url(where):
        return Path(where).resolve()
    text = str(where)
    if text.startswith(_SQLITE) and "?" not in text:
        return Path(text.removeprefix(_SQLITE)).resolve()
    dialect, _, rest = text.partition("://")
    return f"{_DRIVERS.get(dialect, dialect)}://{rest}"


def connect(place: Path | str) -> optuna.storages.BaseStorage:
    """Optuna's storage at a place of `place_of`, with a cache of what is finished.

    Raises:
        Exception: whatever SQLAlchemy, a driver or Optuna raise.
    """
    import optuna
    from sqlalchemy import NullPool

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if isinstance(place, str) and place.startswith(_JOURNAL):
        return _journal(Path(place.removeprefix(_JOURNAL)))
    if isinstance(place, Path):
        _look(place)
        # A minute's patience with another writer, and no connection held open between calls. The
        # file is named to SQLite itself: in a URL, `?` and `#` would mean something else.
        creator = functools.partial(sqlite3.connect, place, timeout=60, check_same_thread=False)
        made = optuna.storages.RDBStorage(
            _SQLITE, engine_kwargs={"creator": creator, "poolclass": NullPool}
        )
    elif place.startswith("sqlite"):
        made = optuna.storages.RDBStorage(place)
    else:
        # Few connections a worker, and each looked at before it is used: a server may have stopped
        # and come back since.
        asked = {"pool_pre_ping": True, "pool_size": 2, "max_overflow": 2}
        made = optuna.storages.RDBStorage(place, engine_kwargs=asked)
        weakref.finalize(made, made.engine.dispose)  # its connections are closed with it
    return optuna.storages.get_storage(made)


def _journal(path: Path) -> optuna.storages.BaseStorage:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if file.read(1) != b"{":
                raise ValueError("it is no journal of Optuna's")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.storages.JournalStorage(JournalFileBackend(str(path)))


def open_study(storage: optuna.storages.BaseStorage, name: str, aims: Aims = ()) -> optuna.Study:
    """The study of that name, made where there is none; its values are the metrics of `aims`."""
    import optuna

    way = optuna.study.StudyDirection
    directions = [way.MAXIMIZE if up else way.MINIMIZE for _, up in aims] or [way.MINIMIZE]
    study = optuna.create_study(
        study_name=name, storage=storage, load_if_exists=True, directions=directions
    )
    if aims and study.metric_names is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([metric for metric, _ in aims])
    return study


def opened(make: Callable[[], Made]) -> Made:
    """`make()`, tried again for two seconds.

    Optuna makes its tables without a lock, so of two processes that begin at the same moment one
    may fail.
    """
    for pause in _PAUSES:
        try:
            return make()
        except Exception as error:
            if pause is None or not _passing(error):
                raise
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def patiently(call: Callable[[int], Made], patience: float | None = None) -> Made:
    """`call(attempt)`, tried again while the database is away, for `patience` seconds.

    Args:
        call: told how often it was tried: what it writes may have been written all the same.
        patience: seconds; `PATIENCE` when left out.

    Returns:
        What it returns.

    Raises:
        Exception: the last one, after `patience` seconds, or at once where waiting is of no use.
    """
    limit, attempt = time.monotonic() + (PATIENCE if patience is None else patience), 0
    while True:
        try:
            return call(attempt)
        except Exception as error:
            if time.monotonic() > limit or not _passing(error):
                raise
            time.sleep(min(2.0, 0.2 * 2**attempt))
            attempt += 1


def _passing(error: BaseException | None) -> bool:
    """Whether an error may be of a server that is away, or of another writer at the same moment."""
    import optuna
    from sqlalchemy import exc

    kinds = (
        exc.IntegrityError,
        exc.OperationalError,
        exc.InterfaceError,
        exc.TimeoutError,
        optuna.exceptions.StorageInternalError,
    )
    return isinstance(error, kinds) or (
        isinstance(error, exc.DBAPIError) and error.connection_invalidated
    )


def reason(error: BaseException) -> str:
    """What a database or Optuna said, in one line without secrets."""
    if isinstance(error, ImportError):
        return (
            "its driver is not installed; `pip install 'psycopg[binary]' pymysql` installs those "
            "of postgresql:// and mysql://"
        )
    words: Any = (str(error).strip() or "no reason given").splitlines()[0]
    return redacted(f"{type(error).__name__}: {words}")


def _look(path: Path) -> None:
    """Make the folder of a SQLite file; refuse a database with tables that are not Optuna's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        with closing(sqlite3.connect(path)) as database:
            tables = {
                name
                for (name,) in database.execute(
                    "select name from sqlite_master where type = 'table'"
                )
            }
        if tables and not tables & {"studies", "version_info", "alembic_version"}:
            raise ValueError(f"it is a database with the tables {', '.join(sorted(tables)[:5])}")
