"""Pages in headless Chromium: does each load, at two widths, light and dark, without a word on the
console and nothing wider than the screen?
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
        if (path := shutil.which(name))
    ),
    None,
)
WIDTHS = (1400, 390)
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--no-first-run",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    *(
        f"--disable-{what}"
        for what in (
            "gpu",
            "quic",
            "background-networking",
            "component-update",
            "sync",
            "dev-shm-usage",
        )
    ),
]
#: loads page after page in a few frames, measures each, and posts what it found
_HARNESS = """<!doctype html><title>-</title><script>
const pages = PAGES, widths = WIDTHS, found = [];
const settled = w => new Promise(r =>
  w.requestAnimationFrame(() => w.requestAnimationFrame(() => w.setTimeout(r, 30))));
async function look(frame, page) {
  frame.width = widths[0];
  await new Promise(r => { frame.onload = r; frame.src = '/' + page; });
  const doc = frame.contentDocument, rows = [];
  for (const width of widths) {
    frame.width = width;
    await settled(frame.contentWindow);
    for (const scheme of ['default', 'slate']) {
      if (doc.body.dataset.mdColorScheme !== undefined) doc.body.dataset.mdColorScheme = scheme;
      await settled(frame.contentWindow);
      const [r, g, b] = getComputedStyle(doc.body).backgroundColor.match(/[0-9]+/g).map(Number);
      rows.push({width, scheme, wide: doc.documentElement.scrollWidth, light: (r + g + b) / 3});
    }
  }
  const broken = [...doc.images].filter(i => i.loading !== 'lazy' && i.complete && !i.naturalWidth)
    .map(i => i.src);
  found.push({page, title: doc.title, text: doc.body.innerText.length, rows, broken});
}
async function work() {
  const frame = document.body.appendChild(document.createElement('iframe'));
  frame.height = 900;
  while (pages.length) await look(frame, pages.shift());
}
onload = async () => {
  await Promise.all([...Array(FRAMES)].map(work));
  await fetch('/found', {method: 'POST', body: JSON.stringify(found)});
};
</script><body>"""


class _Site(SimpleHTTPRequestHandler):
    """The folder, the page that looks at all others, and what that page found."""

    harness = b""
    found: list[dict[str, Any]] | None = None
    done = threading.Event()
    searched = False

    def do_GET(self) -> None:
        if self.path == "/harness.html":
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(type(self).harness)
        elif self.path.endswith("/search_index.json") and type(self).searched:
            self._small_index()
        else:
            type(self).searched |= self.path.endswith("/search_index.json")
            super().do_GET()

    def _small_index(self) -> None:
        """After the first time, a small part of the index: parsing all of it takes longer than the
        page.
        """
        whole = json.loads((Path(self.directory) / "search" / "search_index.json").read_text())
        text = json.dumps(whole | {"docs": whole["docs"][:3]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(text)

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).found = json.loads(text)
        self.send_response(204)
        self.end_headers()
        type(self).done.set()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def look_at(
    folder: Path, pages: list[str], profile: Path, seconds: float = 600
) -> tuple[list[dict[str, Any]], list[str]]:
    """Open pages of a folder in Chromium.

    Args:
        folder: what is served on a free port of this machine.
        pages: paths below it.
        profile: an empty folder for the browser.
        seconds: after which it is given up.

    Returns:
        A row for each page (title, length of its text, widths and brightness, broken pictures), and
        the lines that appeared on the console.
    """
    assert CHROMIUM is not None
    fields = {"PAGES": json.dumps(pages), "WIDTHS": json.dumps(WIDTHS), "FRAMES": "3"}
    harness = _HARNESS
    for name, value in fields.items():
        harness = harness.replace(name, value)
    handler = type(
        "Served", (_Site,), {"harness": harness.encode(), "found": None, "done": threading.Event()}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    log = profile / "log"
    profile.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "--window-size=1500,1000"]
        command += ["--remote-debugging-port=0", f"{address}/harness.html"]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stream)
        try:
            handler.done.wait(seconds)  # type: ignore[attr-defined]
        finally:
            browser.terminate()
            browser.wait(30)
            server.shutdown()
            server.server_close()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = handler.found or []  # type: ignore[attr-defined]
    return found, [line for line in lines if ":CONSOLE" in line]


def screenshot(folder: Path, page: str, to: Path, profile: Path, width: int, dark: bool) -> None:
    """A picture of a page of a folder, as it looks to a reader who likes it light or dark."""
    assert CHROMIUM is not None
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Site, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},1000"]
    command += [f"--screenshot={to}", "--virtual-time-budget=4000"]
    command += ["--blink-settings=preferredColorScheme=" + ("0" if dark else "1")]
    command += [f"http://127.0.0.1:{server.server_address[1]}/{page}"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    finally:
        server.shutdown()
        server.server_close()
