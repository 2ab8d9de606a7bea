"""What every script needs: log lines, errors of one line, flags checked, the device and what to compute in on it."""

from utils.interrupt import begun

import argparse
import atexit
import logging
import math
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError

ROOT = Path(__file__).parents[1]
DTYPES = ("float32", "bfloat16", "float16")
LARGEST_SEED = 2**32 - 1  # numpy, which Trainer seeds too, takes no larger ones
GRACE = 3  # seconds in which the first rank may say what the others would say too; then torchrun ends them
LARGEST_PICTURE = 8192  # pixels a side: 262,144 tokens
# What errors say that are no torch.OutOfMemoryError: of cuBLAS, cuDNN, NCCL, CUDA itself and the host.
NO_MEMORY = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "can't allocate memory", "not enough memory")


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


class ArgumentParser(argparse.ArgumentParser):
    """argparse's with errors of one line, where its own prints all flags first, and from one of several ranks.

    Flags are given whole: 1_run_train.sh and utils/plan.py read some of them too, and would miss `--w_b 2`.
    """

    def __init__(self, *args, allow_abbrev: bool = False, **kwargs):
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    def error(self, message: str) -> NoReturn:
        line = f"{self.prog}: error: {' '.join(message.split())} (see --help)\n"
        self.exit(2, line if is_first_rank() else None)


def is_first_rank() -> bool:
    """Whether this is the process, of those that torchrun started, that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def run_script(
    main: Callable[[], None],
    interrupted: str | Callable[[], str] = "nothing unfinished is left; the same command starts again",
) -> None:
    """Call `main`; ValueError, OSError and SafetensorError, which name their cause, end in one line and status 1.

    So does Ctrl-C, with status 130 and `interrupted`: what is saved, and how to go on. With TRACEBACK=1 in the
    environment all are raised as usual. At the end a process that torchrun started leaves its group and ends without
    taking the interpreter down: threads of groups that FSDP2 still holds would want it and abort, and torchrun would
    then end the other ranks, whatever they are writing. After an error, one of another kind included, it ends at once:
    leaving may wait for a rank that is in a collective.
    """
    script = Path(sys.argv[0]).name
    begun()
    try:
        main()
    except (ValueError, OSError, SafetensorError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        if not is_first_rank():
            time.sleep(GRACE)
        print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr)
        _end(1)
    except KeyboardInterrupt:
        if os.environ.get("TRACEBACK"):
            raise
        if is_first_rank():
            if sys.stderr.isatty():
                print(file=sys.stderr)  # after ^C, or what stands of a progress bar
            print(f"{script}: interrupted: {interrupted() if callable(interrupted) else interrupted}", file=sys.stderr)
        _end(130)
    except Exception:
        if os.environ.get("TRACEBACK") or not _in_group():
            raise
        traceback.print_exc()
        _end(1)
    if _in_group():
        torch.distributed.destroy_process_group()
        atexit._run_exitfuncs()
        _leave(0)


def _in_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _end(status: int) -> NoReturn:
    """End the process, at once if it is one of a group: a collective that waits for others may keep the interpreter."""
    if _in_group():
        _leave(status)
    sys.exit(status)


def _leave(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, else cuda if there is one, else mps, else cpu; one of several GPUs is torch's current
    one from here on, which streams, events and graphs belong to. (Those that torchrun started have each their own.)

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
    if device.type == "cuda" and device.index is not None and "LOCAL_RANK" not in os.environ:
        torch.cuda.set_device(device)
    return device


def pick_dtype(training_args, device: torch.device) -> torch.dtype:
    """What --dtype, --bf16 or --fp16 name; else bfloat16 on CUDA and float32 elsewhere."""
    if training_args.dtype is not None:
        return getattr(torch, training_args.dtype)
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def from_root(name: str) -> str:
    """A folder of the repository, such as assets/tiny-flux, wherever the caller is; any other name as it stands."""
    inside = ROOT / name
    return name if Path(name).exists() or not inside.is_dir() else str(inside)


def check_counts(args: object, *names: str, least: int = 1) -> None:
    """ValueError unless the whole numbers among these attributes are at least `least`; None is none of them."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")


def check_resolution(pixels: int | None) -> None:
    """ValueError unless a picture can have this side: FLUX cuts it into patches of 16 pixels."""
    if pixels is not None and pixels % 16:
        raise ValueError(f"--resolution must be a multiple of 16, got {pixels}")
    if pixels is not None and not 16 <= pixels <= LARGEST_PICTURE:
        raise ValueError(f"--resolution must be at least 16 and at most {LARGEST_PICTURE}, got {pixels}")


def check_guidance(scale: float | None) -> None:
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"--guidance_scale must be a finite number, got {scale}")


def check_seed(seed: int | None, flag: str = "--seed") -> None:
    if seed is not None and not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"{flag} must be at least 0 and at most {LARGEST_SEED}, got {seed}")


def device_name(device: torch.device) -> str:
    """For the records, such as "NVIDIA H100 80GB HBM3" or "2 CPU cores"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"


def empty_cache(device: torch.device) -> None:
    """Give memory that nothing uses any more back to the device."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


# -------------------------------------------------------------------------------------------------------- memory


def peak_rss() -> int:
    """The most bytes of memory that this process has had so far, files mapped into it included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def lacks_memory(error: BaseException) -> bool:
    """Whether it says that a device or the host has no memory left, to torch or to a library under it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


@contextmanager
def memory_named(
    what: str | Callable[[], str], advice: str | Callable[[], str], device: torch.device
) -> Iterator[None]:
    """Out of memory within the block is a ValueError that says while `what` it was, the peak, and `advice`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error) or os.environ.get("TRACEBACK"):
            raise
        what, advice = (words() if callable(words) else words for words in (what, advice))
        on_host = isinstance(error, MemoryError) or "CPUAllocator" in str(error)
        peak = peak_words(torch.device("cpu") if on_host else device)
        raise ValueError(f"out of memory while {what} ({peak}): {advice}") from None


def peak_words(device: torch.device) -> str:
    """The most memory that this process took, of a GPU or else of the host."""
    if device.type != "cuda":
        return f"peak {peak_rss() / 2**30:.1f} GiB of host memory"
    total = torch.cuda.get_device_properties(device).total_memory
    taken, kept = torch.cuda.max_memory_allocated(device) / 2**30, torch.cuda.max_memory_reserved(device) / 2**30
    return f"peak {taken:.1f} GiB, {kept:.1f} reserved, of {total / 2**30:.1f}"
