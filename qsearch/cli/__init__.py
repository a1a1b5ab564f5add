"""The `qsearch` command: argv -> one stage each; no arithmetic."""

from __future__ import annotations

import signal


def main() -> None:
    """Entry point of the script.

    Ctrl-C is answered in words while a command works (`terminal.interruptible`). While Python
    imports, and after the command has ended, there is nothing to say or to keep: there it ends the
    process as the system does, without a traceback.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from ..core.allocator import keep_freed_buffers
    from . import commands

    keep_freed_buffers()
    commands.main()
