"""Imported by every script before all else: Ctrl-C while torch and diffusers are imported, for seconds, is a line too.

From then on run_script (utils/utils.py) says what Ctrl-C has ended.
"""

import os
import signal
import sys
import time
from pathlib import Path

STARTED = time.time()  # of the script, near enough

def _end(*_) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: interrupted: nothing has begun", file=sys.stderr, flush=True)
    os._exit(130)


# Not where a script is a module of something else, such as a test, nor where the shell has Ctrl-C ignored.
_here = Path(__file__).resolve().parent
_started = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve().parent
if _started in (_here, _here.parent) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)


def begun() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, as usual."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
