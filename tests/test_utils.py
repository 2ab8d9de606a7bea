"""Log lines, errors of one line, devices, memory."""

import atexit
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from utils import utils
from utils.utils import memory_named, pick_device, pick_dtype, run_script


@pytest.mark.parametrize("error", [ValueError("two\nlines: do this"), OSError("disk"), SafetensorError("I/O error")])
def test_run_script_ends_in_one_line(error, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/script.py"])
    monkeypatch.delenv("TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as exit:
        run_script(main)
    assert exit.value.code == 1
    assert capsys.readouterr().err == f"script.py: error: {' '.join(str(error).split())}\n"

    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(type(error)):
        run_script(main)


@pytest.mark.parametrize("told", ["checkpoint-3 is saved; go on", lambda: "checkpoint-3 is saved; go on"])
def test_run_script_ends_in_one_line_on_ctrl_c(told, monkeypatch, capsys):
    def main():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["/somewhere/script.py"])
    monkeypatch.delenv("TRACEBACK", raising=False)
    for rank, lines in (("0", ["script.py: interrupted: checkpoint-3 is saved; go on"]), ("1", [])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as exit:
            run_script(main, told)
        assert exit.value.code == 130 and capsys.readouterr().err.splitlines() == lines
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(KeyboardInterrupt):
        run_script(main)


def test_run_script_leaves_bugs_alone():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


def test_run_script_leaves_the_process_group_unless_there_was_an_error(tmp_path, monkeypatch, capsys):
    """Then the process ends at once, whatever a collective waits for; else when its exit functions have run."""
    ended = []
    monkeypatch.setattr(os, "_exit", lambda status: ended.append(status) or sys.exit(status))
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: ended.append("exit functions"))

    def join(name: str) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / name}", rank=0, world_size=1)

    with pytest.raises(SystemExit):
        run_script(lambda: join("done"))
    assert not torch.distributed.is_initialized() and ended == ["exit functions", 0]
    ended.clear()

    for error in (ValueError("no disk"), ZeroDivisionError("a fault of the program")):

        def fail(error=error):
            join(type(error).__name__)
            raise error

        try:
            with pytest.raises(SystemExit):
                run_script(fail)
            assert ended == [1]
            assert torch.distributed.is_initialized()
        finally:
            torch.distributed.destroy_process_group()
        ended.clear()
    assert "ZeroDivisionError: a fault of the program" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpus", "mps", "default"), [(2, False, "cuda"), (0, True, "mps"), (2, True, "cuda"), (0, False, "cpu")]
)
def test_pick_device(gpus, mps, default, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    here = ["cpu"] + ["mps"] * mps + [f"cuda:{i}" for i in range(gpus)] + ["cuda"] * (gpus > 0)
    assert pick_device() == torch.device(default)
    for name in ("cpu", "mps", "cuda", "cuda:0", "cuda:1", "cuda:2", "meta", "toaster", ""):
        if name in here:
            assert pick_device(name) == torch.device(name)
        else:
            with pytest.raises(ValueError, match=f"^--device {name} is not available here: use one of .*cpu$"):
                pick_device(name)
    assert current == [torch.device("cuda", i) for i in range(gpus)]
    monkeypatch.setenv("LOCAL_RANK", "1")  # whose GPU accelerate chooses
    if gpus:
        pick_device("cuda:0")
    assert len(current) == gpus


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("bfloat16", "cpu", torch.bfloat16),
        ("float16", "cuda", torch.float16),
        ("float32", "cuda", torch.float32),
        (None, "cuda", torch.bfloat16),
        (None, "cpu", torch.float32),
        (None, "mps", torch.float32),
    ],
)
def test_pick_dtype(dtype, device, expected):
    assert pick_dtype(SimpleNamespace(dtype=dtype), torch.device(device)) == expected


def test_logger_prints_once(capsys):
    for _ in range(2):
        logger = utils.get_logger("test_logger_prints_once")
    logger.info("%d pictures", 3)
    assert capsys.readouterr().out == "[test_logger_prints_once] 3 pictures\n"


# ----- memory

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def too_much() -> None:
    torch.empty(2**60, dtype=torch.uint8)  # what the host's own allocator says


RESERVED = "78.5 GiB, 79.5 reserved, of 80.0"


def raising(error: BaseException):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    ("fail", "device", "peak"),
    [
        (raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), CUDA, RESERVED),
        (raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")), CUDA, RESERVED),
        (raising(RuntimeError("CUDA error: out of memory")), CUDA, RESERVED),
        (raising(MemoryError()), CUDA, "3.0 GiB of host memory"),
        (too_much, CUDA, "3.0 GiB of host memory"),
        (too_much, CPU, "3.0 GiB of host memory"),
    ],
    ids=["torch", "cuBLAS", "CUDA", "Python", "host of a GPU", "host"],
)
def test_out_of_memory_is_one_line(fail, device, peak, monkeypatch):
    """Of what was being done when it happened, not when the block began."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 78.5 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 79.5 * 2**30)
    monkeypatch.setattr(utils, "peak_rss", lambda: 3 * 2**30)
    monkeypatch.delenv("TRACEBACK", raising=False)
    doing = ["nothing"]
    with pytest.raises(ValueError) as caught, memory_named(lambda: doing[-1], "try --less", device):
        doing.append("a step is trained")
        fail()
    assert str(caught.value) == f"out of memory while a step is trained (peak {peak}): try --less"
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises((MemoryError, RuntimeError)), memory_named("a step is trained", "try --less", device):
        fail()


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("out of memory"), ValueError("no")])
def test_other_errors_are_not_taken_for_it(error):
    with pytest.raises(type(error)) as caught, memory_named("a step is trained", "try --less", CPU):
        raise error
    assert caught.value is error
