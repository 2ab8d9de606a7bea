"""Scripts as processes, without the seconds in which each of them imports torch, diffusers and transformers.

Each of pytest's workers has a server (multiprocessing's) that imports the libraries once and forks a process for every
script. The server computes nothing, as threads do not survive a fork, and imports nothing of this repository. The
process has its own arguments, environment, standard streams and pid, and ends as the interpreter would.

What it cannot show: how libraries are imported, what they read from the environment meanwhile, memory, other seeds of
hash(). `run` (conftest.py) starts a real process for code (-c) and where it is given environment variables;
FLUX158_TEST_REAL_PROCESSES=1 makes every process a real one. So they are outside Linux and where there is a GPU: CUDA
does not survive a fork either.
"""

import atexit
import functools
import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARIES = [
    "diffusers.pipelines.flux.pipeline_flux", "diffusers.pipelines.flux2.pipeline_flux2_klein", "transformers.trainer",
    "transformers.models.clip.modeling_clip", "transformers.models.t5.modeling_t5", "torchmetrics.functional.image",
    "torch.utils.tensorboard",
]  # fmt: skip

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(LIBRARIES)


@functools.cache
def switched_off() -> bool:
    """Whether processes are real ones here."""
    import torch  # not in the process that only hands out the tests

    asked = os.environ.get("FLUX158_TEST_REAL_PROCESSES")
    return bool(asked) or sys.platform != "linux" or torch.cuda.is_available()


class Script(_context.Process):
    """python *words, begun in the repository root; what it prints is added to the two files."""

    def __init__(self, words: list[str], variables: dict[str, str], stdout: Path, stderr: Path) -> None:
        path = [entry for entry in sys.path if entry not in ("", str(ROOT), str(ROOT / "tests"))]  # which pytest adds
        super().__init__(target=_as_the_interpreter, args=(words, variables, [stdout, stderr], path))
        self.start()

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> int:
        self.join()
        return self.exitcode


def run(words: list[str], variables: dict[str, str], ranks: int, timeout: float = 300) -> subprocess.CompletedProcess:
    """As subprocess.run. Several ranks are told who they are as by torchrun; when one fails, the others are killed."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        running = scripts = [Script(words, variables | names, *outputs) for names in _of_ranks(ranks)]
        deadline, status = time.monotonic() + timeout, 0
        while running and not status and time.monotonic() < deadline:
            wait([script.sentinel for script in running], deadline - time.monotonic())
            status = next((script.exitcode for script in scripts if script.exitcode), 0)
            running = [script for script in running if script.poll() is None]
        for script in running:
            script.kill()
            script.wait()
        if running and not status:
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, status, *(file.read_text() for file in outputs))


def _of_ranks(count: int) -> list[dict[str, str]]:
    if count == 1:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as free:
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    group |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
    return [group | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(count)]


def _as_the_interpreter(words: list[str], variables: dict[str, str], outputs: list[Path], path: list[str]) -> None:
    gc.freeze()  # what is not looked at need not be copied
    multiprocessing.set_start_method(None, force=True)
    for number, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(variables)
    module = words[0] == "-m"
    sys.argv = words[1:] if module else words
    sys.path = [str(ROOT if module else Path(words[0]).resolve().parent), *path]
    try:
        if module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
