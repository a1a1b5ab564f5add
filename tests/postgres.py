"""A PostgreSQL server of Debian's, thrown away after: started on loopback, stopped and started
again.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

PASSWORD = "h0rse/b@ttery"  # of the kind that a redaction has to look at twice
URL_PASSWORD = "h0rse%2Fb%40ttery"


def binaries() -> Path | None:
    """The folder of `initdb` and `pg_ctl`, of the newest version; None where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    on_path = shutil.which("pg_ctl")
    return found[-1].parent if found else Path(on_path).resolve().parent if on_path else None


class Server:
    """A running server; `url()` names its database `trials`."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port

    def url(self, password: str = URL_PASSWORD) -> str:
        return f"postgresql://tester:{password}@127.0.0.1:{self.port}/trials"

    def start(self) -> None:
        log = self.folder / "log"
        options = f"-p {self.port} -h 127.0.0.1 -k {self.folder} -c fsync=off"
        _run("pg_ctl", "-D", self.folder / "data", "-l", log, "-o", options, "-w", "start")

    def stop(self) -> None:
        _run("pg_ctl", "-D", self.folder / "data", "-m", "immediate", "-w", "stop")

    def wait(self, seconds: float = 30.0) -> None:
        """Until a connection is taken."""
        limit = time.monotonic() + seconds
        while True:
            try:
                with closing(socket.create_connection(("127.0.0.1", self.port), timeout=1)):
                    return
            except OSError:
                if time.monotonic() > limit:
                    raise
                time.sleep(0.1)


@contextmanager
def server() -> Iterator[Server]:
    """A new server, deleted after. It does not run as root, so there it runs as Debian's
    `postgres`.
    """
    folder = Path(tempfile.mkdtemp(prefix="qsearch-pg-", dir="/tmp"))
    if os.getuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        made = Server(folder, free.getsockname()[1])
    password = folder / "password"
    password.write_text(PASSWORD)
    password.chmod(0o644)
    arguments = ("-U", "tester", "--auth=scram-sha-256", f"--pwfile={password}", "--no-sync")
    _run("initdb", "-D", folder / "data", "-E", "UTF8", *arguments)
    try:
        made.start()
        environment = {**os.environ, "PGPASSWORD": PASSWORD}
        where = ("-h", "127.0.0.1", "-p", str(made.port), "-U", "tester")
        create = [str(_tool("createdb")), *where, "trials"]
        subprocess.run(create, check=True, env=environment, capture_output=True)
        yield made
    finally:
        try:
            made.stop()
        except subprocess.CalledProcessError:
            pass  # a test stopped it
        shutil.rmtree(folder, ignore_errors=True)


def _tool(name: str) -> Path:
    folder = binaries()
    assert folder is not None, "there is no PostgreSQL here"
    return folder / name


def _run(name: str, *arguments: object) -> None:
    command = [str(_tool(name)), *map(str, arguments)]
    if os.getuid() == 0:
        command = ["runuser", "-u", "postgres", "--", *command]
    # pg_ctl's server keeps what it is given open: it is given nothing
    subprocess.run(
        command,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
    )
