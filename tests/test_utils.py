"""Log lines, errors of one line, devices."""

import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from utils import utils
from utils.utils import pick_device, pick_dtype, run_script


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


def test_run_script_leaves_the_process_group_unless_there_was_an_error(tmp_path):
    def join(name: str) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / name}", rank=0, world_size=1)

    run_script(lambda: join("done"))
    assert not torch.distributed.is_initialized()

    def fail():
        join("failed")
        raise ValueError("no disk")

    try:
        with pytest.raises(SystemExit):
            run_script(fail)
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("gpus", "mps", "default"), [(2, False, "cuda"), (0, True, "mps"), (2, True, "cuda"), (0, False, "cpu")]
)
def test_pick_device(gpus, mps, default, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    here = ["cpu"] + ["mps"] * mps + [f"cuda:{i}" for i in range(gpus)] + ["cuda"] * (gpus > 0)
    assert pick_device() == torch.device(default)
    for name in ("cpu", "mps", "cuda", "cuda:0", "cuda:1", "cuda:2", "meta", "toaster", ""):
        if name in here:
            assert pick_device(name) == torch.device(name)
        else:
            with pytest.raises(ValueError, match=f"^--device {name} is not available here: use one of .*cpu$"):
                pick_device(name)


@pytest.mark.parametrize(
    ("bf16", "fp16", "device", "expected"),
    [
        (True, False, "cpu", torch.bfloat16),
        (False, True, "cuda", torch.float16),
        (False, False, "cuda", torch.bfloat16),
        (False, False, "cpu", torch.float32),
        (False, False, "mps", torch.float32),
    ],
)
def test_pick_dtype(bf16, fp16, device, expected):
    assert pick_dtype(SimpleNamespace(bf16=bf16, fp16=fp16), torch.device(device)) == expected


def test_logger_prints_once(capsys):
    for _ in range(2):
        logger = utils.get_logger("test_logger_prints_once")
    logger.info("%d pictures", 3)
    assert capsys.readouterr().out == "[test_logger_prints_once] 3 pictures\n"
