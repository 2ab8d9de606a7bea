"""What every script needs: log lines, errors of one line, the device and what to compute in on it."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

ROOT = Path(__file__).parents[1]


def get_logger(name: str) -> logging.Logger:
    """A logger that prints "[name] message" lines."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


def run_script(main: Callable[[], None]) -> None:
    """Call `main`; ValueError, OSError and SafetensorError, which name their cause, end in one line and status 1.

    With TRACEBACK=1 in the environment they are raised as usual. At the end a process that torchrun started leaves its
    group, whose threads could otherwise outlive the interpreter and abort it, and torchrun would then end the other
    ranks, whatever they are writing. Not after an error: leaving may wait for a rank that is in a collective.
    """
    try:
        main()
    except (ValueError, OSError, SafetensorError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, else cuda if there is one, else mps, else cpu.

    Raises ValueError if this machine has no such device.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ["cuda"] * (gpus > 0) + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name is None:
        return torch.device(here[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in here or (device.type == "cuda" and (device.index or 0) >= gpus):
        raise ValueError(f"--device {name} is not available here: use one of {', '.join(here)}")
    return device


def pick_dtype(training_args, device: torch.device) -> torch.dtype:
    """bfloat16 with --bf16, float16 with --fp16; with neither, bfloat16 on CUDA and float32 elsewhere."""
    if training_args.fp16:
        return torch.float16
    return torch.bfloat16 if training_args.bf16 or device.type == "cuda" else torch.float32


def device_name(device: torch.device) -> str:
    """For the records, such as "NVIDIA H100 80GB HBM3" or "2 CPU cores"."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"


def empty_cache(device: torch.device) -> None:
    """Give memory that nothing uses any more back to the device."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()
