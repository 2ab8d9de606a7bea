"""Ctrl-C from a script's first moment on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SLOW = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"  # in the place of torch


def interrupted(tmp_path, *words, **environment):
    """Status and stderr of a script that gets SIGINT while it imports torch."""
    (tmp_path / "torch.py").write_text(SLOW)
    variables = os.environ | {"PYTHONPATH": str(tmp_path)} | environment
    script = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert script.stdout.readline() == "importing\n"
    time.sleep(0.1)
    script.send_signal(signal.SIGINT)
    _, said = script.communicate(timeout=20)
    return script.returncode, said


@pytest.mark.parametrize("name", ["bench", "run", "sanity", "test", "train"])
def test_while_a_script_is_imported_it_is_a_line(name, tmp_path):
    assert interrupted(tmp_path, f"{name}.py") == (130, f"{name}.py: interrupted: nothing has begun\n")


@pytest.mark.parametrize("name", ["plan", "launch", "rehearsal", "make_random_flux"])
def test_so_it_is_for_the_programs(name, tmp_path):
    assert interrupted(tmp_path, "-m", f"utils.{name}") == (130, f"{name}.py: interrupted: nothing has begun\n")


def test_of_several_ranks_the_first_says_it(tmp_path):
    assert interrupted(tmp_path, "train.py", RANK="1") == (130, "")


def test_what_only_imports_a_script_keeps_its_own_handler():
    assert signal.getsignal(signal.SIGINT).__module__ != "utils.interrupt"
    code = "import signal, utils.interrupt; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
