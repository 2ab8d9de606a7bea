"""The repository's scripts as processes, several at a time on every GPU."""

import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from utils.utils import ROOT


def run_logged(words: Sequence[object], log: Path, environment: Mapping[str, str] | None = None) -> None:
    """Run one of the repository's scripts (words: file name and flags, or what starts it), its output added to `log`.

    `environment` adds variables (see spread). Raises ValueError, with the last line of the output, if it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        command = [sys.executable, *map(str, words)]
        variables = {**os.environ, **(environment or {})}
        status = subprocess.run(command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT).returncode
    if status:
        lines = log.read_text().splitlines()
        script = next(word for word in words if str(word).endswith(".py"))
        raise ValueError(f"{script} failed, see {log}: {lines[-1] if lines else 'no output'}")


def quantize_and_judge(
    folder: Path, model: str, flags: Sequence[object], environment: Mapping[str, str], *,
    w_bits: int, num_images: int, batch_size: int,
) -> dict:
    """The figures of run.py with `flags`, under "run", and those of test.py; in `folder`, unless they are there."""
    figures, pipeline, log = folder / "test" / "metrics.json", (folder / "pipeline").absolute(), folder / "log.txt"
    if not figures.exists():
        own = ["--model_id", model, "--output_path", pipeline, "--num_images", 0, "--batch_size", batch_size]
        if not (pipeline / "metrics.json").exists():  # an interrupted run has left the folder, and goes on there
            run_logged(["run.py", *own, "--w_bits", w_bits, *flags], log, environment)
        own = ["--model", model, "--num_images", num_images, "--batch_size", batch_size]
        run_logged(["test.py", pipeline, w_bits, *own, "--output_dir", (folder / "test").absolute()], log, environment)
    return json.loads(figures.read_text()) | {"run": json.loads((pipeline / "metrics.json").read_text())}


def visible_gpus() -> list[str]:
    """What to put into CUDA_VISIBLE_DEVICES for each GPU that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def spread(work: Callable[[object, dict[str, str]], object], items: Sequence[object], parallel: int) -> list:
    """[work(item, environment) for every item], `parallel` at a time on each GPU (without one: at all).

    `environment` holds the variables by which what `work` starts sees one GPU and takes its share of the cores.
    """
    slots = (visible_gpus() or [None]) * parallel
    # were each to start a thread per core, the CPU's part (grading, SSIM) would crawl
    share = (os.cpu_count() or 1) // max(1, min(len(slots), len(items)))
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, share)))
    free: queue.Queue[dict[str, str]] = queue.Queue()
    for gpu in slots:
        free.put({"OMP_NUM_THREADS": threads} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}))

    def one(item: object) -> object:
        environment = free.get()
        try:
            return work(item, environment)
        finally:
            free.put(environment)

    with ThreadPoolExecutor(len(slots)) as pool:
        return list(pool.map(one, items))
