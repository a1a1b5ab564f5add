"""Database servers of Debian's, thrown away after: PostgreSQL and MariaDB, started on loopback,
stopped and started again.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Protocol

PASSWORD = "h0rse/b@ttery"  # of the kind that a redaction has to look at twice
URL_PASSWORD = "h0rse%2Fb%40ttery"


class AbstractServer(Protocol):
    """A running server of the user `tester`."""

    port: int

    def url(self, database: str = "trials", password: str = URL_PASSWORD) -> str:
        """Of a database of this server."""

    def create(self, database: str) -> None:
        """Make another database."""

    def start(self) -> None:
        """Start it again, and wait until it answers."""

    def stop(self) -> None:
        """Stop it without a word to its clients."""


class PostgreSQL:
    """A server below a folder."""

    missing = "PostgreSQL is not installed: `apt-get install postgresql`"
    driver = "psycopg"

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        password = folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        arguments = ("-U", "tester", "--auth=scram-sha-256", f"--pwfile={password}", "--no-sync")
        self._run("initdb", "-D", folder / "data", "-E", "UTF8", *arguments)

    @staticmethod
    def binaries() -> Path | None:
        """The folder of `initdb` and `pg_ctl`, of the newest version; None where there is none."""
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
        on_path = shutil.which("pg_ctl")
        return found[-1].parent if found else Path(on_path).resolve().parent if on_path else None

    def url(self, database: str = "trials", password: str = URL_PASSWORD) -> str:
        return f"postgresql://tester:{password}@127.0.0.1:{self.port}/{database}"

    def create(self, database: str) -> None:
        where = ("-h", "127.0.0.1", "-p", self.port, "-U", "tester")
        _quietly([self._tool("createdb"), *where, database], PGPASSWORD=PASSWORD)

    def start(self) -> None:
        log = self.folder / "log"
        options = f"-p {self.port} -h 127.0.0.1 -k {self.folder} -c fsync=off"
        self._run("pg_ctl", "-D", self.folder / "data", "-l", log, "-o", options, "-w", "start")

    def stop(self) -> None:
        with suppress(subprocess.CalledProcessError):  # stopped already
            self._run("pg_ctl", "-D", self.folder / "data", "-m", "immediate", "-w", "stop")

    def _tool(self, name: str) -> Path:
        folder = self.binaries()
        assert folder is not None, self.missing
        return folder / name

    def _run(self, name: str, *arguments: object) -> None:
        _quietly([*_as("postgres"), self._tool(name), *arguments])


class MariaDB:
    """A server below a folder, as MySQL speaks."""

    missing = "MariaDB is not installed: `apt-get install mariadb-server`"
    driver = "pymysql"

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.process: subprocess.Popen[bytes] | None = None
        how = ("--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db")
        _quietly([*_as("mysql"), "mariadb-install-db", *how, f"--datadir={folder / 'data'}"])

    @staticmethod
    def binaries() -> Path | None:
        """The folder of the server; None where there is none."""
        found = shutil.which("mariadbd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        return Path(found).parent if found else None

    def url(self, database: str = "trials", password: str = URL_PASSWORD) -> str:
        return f"mysql://tester:{password}@127.0.0.1:{self.port}/{database}"

    def create(self, database: str) -> None:
        self._say(f"create database {database}; grant all on {database}.* to tester@127.0.0.1")

    def start(self) -> None:
        folder = self.binaries()
        assert folder is not None, self.missing
        options = {
            "datadir": self.folder / "data",
            "port": self.port,
            "bind-address": "127.0.0.1",
            "socket": self.folder / "socket",
            "pid-file": self.folder / "pid",
            "innodb-flush-log-at-trx-commit": 0,
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        command = [*_as("mysql"), folder / "mariadbd", "--no-defaults", "--skip-name-resolve"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            [*map(str, command), *words], stdin=quiet, stdout=quiet, stderr=quiet, cwd="/"
        )
        _wait(lambda: self._say("select 1"))
        self._say(f"create user if not exists tester@127.0.0.1 identified by '{PASSWORD}'")

    def stop(self) -> None:
        if self.process is None:
            return
        with suppress(OSError, ValueError):
            os.kill(int((self.folder / "pid").read_text()), 9)
        self.process.wait()
        self.process = None

    def _say(self, words: str) -> None:
        where = ("--no-defaults", "-u", "root", f"--socket={self.folder / 'socket'}")
        _quietly(["mariadb", *where, "-e", words])


#: what URLs call it -> its server
SERVERS: dict[str, type[PostgreSQL | MariaDB]] = {"postgresql": PostgreSQL, "mysql": MariaDB}


@contextmanager
def server(kind: str = "postgresql") -> Iterator[AbstractServer]:
    """A new server with the database `trials`, deleted after."""
    folder = Path(tempfile.mkdtemp(prefix="qsearch-db-", dir="/tmp"))
    if os.getuid() == 0:  # neither runs as root, so there they run as Debian's users
        user = {"postgresql": "postgres", "mysql": "mysql"}[kind]
        shutil.chown(folder, user, user)
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made: AbstractServer | None = None
    try:
        made = SERVERS[kind](folder, port)
        made.start()
        made.create("trials")
        yield made
    finally:
        if made is not None:
            made.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _as(user: str) -> list[str]:
    return ["runuser", "-u", user, "--"] if os.getuid() == 0 else []


def _wait(call: Callable[[], None], seconds: float = 120.0) -> None:
    limit = time.monotonic() + seconds
    while True:
        try:
            return call()
        except subprocess.CalledProcessError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.2)


def _quietly(command: list[object], **environment: str) -> None:
    # a server that is started keeps what it is given open: it is given nothing
    quiet = subprocess.DEVNULL
    subprocess.run(
        [*map(str, command)],
        check=True,
        stdin=quiet,
        stdout=quiet,
        stderr=quiet,
        cwd="/",
        env={**os.environ, **environment},
    )
