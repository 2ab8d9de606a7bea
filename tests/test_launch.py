"""Which of several failed ranks is named, and that two processes under torchrun end as it says."""

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from utils.launch import cause

TERM, KILL = -signal.SIGTERM, -signal.SIGKILL


@pytest.mark.parametrize(
    ("failures", "rank"),
    [
        ({0: (1, 5)}, 0),
        ({0: (1, 5), 1: (TERM, 5)}, 0),
        ({0: (TERM, 5), 1: (1, 5)}, 1),
        ({0: (1, 5), 1: (KILL, 5)}, 1),  # the kernel killed it, and the other lost it
        ({0: (1, 5), 1: (KILL, 36)}, 0),  # torchrun did, when asking had not helped
        ({0: (TERM, 6), 1: (KILL, 5), 2: (1, 5)}, 1),
        ({0: (TERM, 5), 1: (TERM, 5)}, 0),
        ({2: (-signal.SIGSEGV, 5), 0: (TERM, 5)}, 2),
    ],
)
def test_the_rank_for_which_the_others_ended(failures, rank):
    found = {name: SimpleNamespace(exitcode=code, timestamp=when) for name, (code, when) in failures.items()}
    assert cause(found) == rank


@pytest.mark.parametrize(
    ("last", "status", "line"),
    [
        ("sys.exit('rank 1 says why')", 1, "rank 1 says why"),
        ("os.kill(os.getpid(), 9)", 137, "rank 1 was killed (SIGKILL); the others were ended"),
    ],
    ids=["an error", "killed"],
)
def test_a_failed_rank_has_the_last_word_while_the_other_runs(last, status, line, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(f"import os, sys, time\ntime.sleep(60 if os.environ['RANK'] == '0' else 1)\n{last}\n")
    command = [sys.executable, "-m", "utils.launch", "--standalone", "--nproc_per_node=2", str(script)]
    result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert result.returncode == status and result.stderr.strip().splitlines()[-1] == line, result.stderr
