"""Redaction: what must not stand in files that people publish: passwords, and where things lie.

Commands and messages are kept in headers and pages. Of a URL the user-info goes, of an absolute path
all but its last part.
"""

from __future__ import annotations

import re

_USER = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/@\s'\"]*@")
#: an absolute path of a POSIX or Windows machine, not the part of a URL behind its scheme
_PATH = re.compile(
    r"(?<![\w:/.\\~-])(?:[A-Za-z]:[\\/]|/)(?:[^\s/\\'\",;:=]+[\\/])+(?=[^\s/\\'\",;:]|$)"
)


def redacted(text: str) -> str:
    """`text` without user names and passwords of URLs."""
    return _USER.sub(r"\g<scheme>***@", text)


def published(text: str) -> str:
    """`text` as it may stand in a file that is passed on: redacted, and absolute paths by their ends."""
    return _PATH.sub("…/", redacted(text))
