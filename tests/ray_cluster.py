"""A Ray cluster of several nodes on this machine, as people start one, ended by its own process
ids.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

PATIENCE = 600.0  # seconds for a node to come up
STORE = 100 * 2**20  # bytes of each node's object store
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AUTH_MODE": "disabled",  # on loopback alone
    "RAY_worker_niceness": "0",  # not behind what else runs here
    # No process is started that nothing here needs.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_metrics_collection": "0",
}
_PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")


def environment(**more: str) -> dict[str, str]:
    """Of this process, without proxies: gRPC would send Ray's own calls through them."""
    kept = {k: v for k, v in os.environ.items() if k.lower() not in _PROXIES}
    return {**kept, **_QUIET, **more}


def processes() -> dict[int, tuple[int, str]]:
    """Process id -> (its parent's, its command)."""
    command = ["ps", "-eo", "pid=,ppid=,args="]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = {}
    for line in lines:
        process, parent, *words = line.split(maxsplit=2)
        found[int(process)] = int(parent), words[0] if words else ""
    return found


def below(process: int) -> dict[int, str]:
    """The descendants of a process: id -> command."""
    known, found, wanted = processes(), dict[int, str](), {process}
    while wanted:
        wanted = {p for p, (parent, _) in known.items() if parent in wanted} - set(found)
        found |= {p: known[p][1] for p in wanted}
    return found


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Cluster:
    """A head and nodes, each `ray start --block` at a loopback address of its own.

    127.0.0.1 would not do: Ray takes the machine's outward address in its place.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.nodes: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        return f"127.0.0.2:{self.port}"

    def head(self, cores: int = 1) -> None:
        """A head with a raylet, once it is there."""
        where = ["--head", "--port", str(self.port), "--temp-dir", str(self.folder / "r")]
        self._start([*where, "--include-dashboard=false", "--no-monitor"], cores)

    def node(self, cores: int = 1, *, hidden: Path | None = None) -> None:
        """Another raylet, once it is there; `hidden`: a folder that it sees empty, as on a machine
        without it.
        """
        before = []
        if hidden is not None:
            mount = f'mount -t tmpfs none "{hidden}" && exec "$@"'
            before = ["unshare", "--mount", "--propagation", "private", "bash", "-c", mount, "-"]
        self._start([f"--address={self.address}"], cores, before)

    def _start(self, where: list[str], cores: int, before: list[str] | None = None) -> None:
        ports = [
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--include-log-monitor=false",
            # A raylet ends where an agent takes longer than 15 seconds to choose a port.
            f"--dashboard-agent-listen-port={free_port()}",
            f"--dashboard-agent-grpc-port={free_port()}",
            f"--runtime-env-agent-port={free_port()}",
            f"--metrics-export-port={free_port()}",
        ]
        memory = f"--object-store-memory={STORE}"
        size = [f"--num-cpus={cores}", memory, f"--node-ip-address=127.0.0.{2 + len(self.nodes)}"]
        start = [str(Path(sys.executable).with_name("ray")), "start"]
        log = self.folder / f"log-{len(self.nodes)}-{time.monotonic_ns()}"
        with log.open("wb") as written:
            node = subprocess.Popen(
                [*(before or []), *start, *where, *size, *ports, "--block"],
                stdout=written,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment(PYTHONUNBUFFERED="1"),
            )
        self.nodes.append(node)
        limit = time.monotonic() + PATIENCE
        while "Ray runtime started" not in (said := log.read_text(errors="replace")):
            assert node.poll() is None, said
            assert time.monotonic() < limit, said
            time.sleep(0.2)

    def workers(self) -> list[int]:
        """Processes of our actors."""
        found = []
        for node in self.nodes:
            found += [p for p, args in below(node.pid).items() if args.startswith("ray::_Worker")]
        return found

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """A node with all that it started, at once, without a word."""
        for process in [node.pid, *below(node.pid)]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        node.wait()
        self.nodes.remove(node)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster without nodes; those that are started are killed after."""
    folder = Path(tempfile.mkdtemp(prefix="qr-", dir="/tmp"))  # sockets have short names
    made = Cluster(folder)
    try:
        yield made
    finally:
        for node in [*made.nodes]:
            made.kill(node)
        shutil.rmtree(folder, ignore_errors=True)
