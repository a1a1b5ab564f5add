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

PATIENCE = 600.0  # seconds for nodes to come up
STORE = 100 * 2**20  # bytes of each node's object store
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AUTH_MODE": "disabled",  # on loopback alone
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
        """A head with a raylet."""
        where = ["--head", "--port", str(self.port), "--temp-dir", str(self.folder / "r")]
        self._start([*where, "--include-dashboard=false"], cores)
        limit = time.monotonic() + PATIENCE
        while time.monotonic() < limit:
            self._again()
            with suppress(OSError), closing(socket.create_connection(("127.0.0.2", self.port), 1)):
                return
            time.sleep(0.2)
        raise AssertionError("Ray's head does not come up")

    def node(self, cores: int = 1, *, hidden: Path | None = None) -> None:
        """Another raylet; `hidden`: a folder that it sees empty, as on a machine without it."""
        before = []
        if hidden is not None:
            mount = f'mount -t tmpfs none "{hidden}" && exec "$@"'
            before = ["unshare", "--mount", "--propagation", "private", "bash", "-c", mount, "-"]
        self._start([f"--address={self.address}"], cores, before)

    def _start(self, where: list[str], cores: int, before: list[str] | None = None) -> None:
        ports = [
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--dashboard-agent-listen-port={free_port()}",
        ]
        memory = f"--object-store-memory={STORE}"
        size = [f"--num-cpus={cores}", memory, f"--node-ip-address=127.0.0.{2 + len(self.nodes)}"]
        ray = str(Path(sys.executable).with_name("ray"))
        command = [*(before or []), ray, "start", *where, *size, *ports, "--block"]
        self.nodes.append(self._run(command))

    def _run(self, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"log-{time.monotonic_ns()}").open("wb") as log:
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment(),
            )

    def _again(self) -> None:
        """Start nodes again that gave up: on a busy machine Ray's own half minute is too short."""
        for i, node in enumerate(self.nodes):
            if node.poll() is not None:
                self.nodes[i] = self._run([str(word) for word in node.args])  # type: ignore[union-attr]

    def cores(self, wanted: int) -> None:
        """Wait until all nodes are there."""
        script = (
            "import ray, sys, time\n"
            f"ray.init({self.address!r}, log_to_driver=False, logging_level='error')\n"
            f"while ray.cluster_resources().get('CPU', 0) < {wanted}: time.sleep(0.3)\n"
        )
        limit, waiting = time.monotonic() + PATIENCE, self._wait(script)
        while waiting.poll() != 0:
            assert time.monotonic() < limit, "Ray's nodes do not come up"
            self._again()
            if waiting.poll() is not None:
                waiting = self._wait(script)
            time.sleep(1)

    @staticmethod
    def _wait(script: str) -> subprocess.Popen[bytes]:
        quiet = subprocess.DEVNULL
        command = [sys.executable, "-c", script]
        return subprocess.Popen(command, env=environment(), stdout=quiet, stderr=quiet)

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
