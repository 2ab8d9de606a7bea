"""A forked script is told and ends as the interpreter's own process does, which is asked for comparison."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(forked.switched_off(), reason="every process is a real one here")


def both(*words, ranks: int = 1, **environment) -> list[subprocess.CompletedProcess]:
    """Of python *words: the forked process and the interpreter's."""
    words, variables = [str(word) for word in words], {"ONLY": "this", "HF_HUB_OFFLINE": "1"} | environment
    variables |= {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
    real = subprocess.run([sys.executable, *words], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)
    return [forked.run(words, variables, ranks), real]


TOLD = """
import json, multiprocessing, os, sys
names = sorted(name for name in globals() if name not in ("__cached__", "__annotations__"))
print(sys.argv, sys.path, os.getcwd(), os.environ.get("ONLY"), os.environ.get("HF_HUB_OFFLINE"), __name__, names)
print(multiprocessing.get_start_method(), sys.modules["__main__"].__dict__ is globals(), sys.flags.optimize)
print([name for name in sys.modules if name.split(".")[0] in ("models", "utils", "pytest", "_pytest", "conftest")])
print(__import__("signal").getsignal(2), repr(sys.stdin.read()), sys.stdout.encoding, sys.stdout.line_buffering)
"""


def test_it_is_told_the_same(tmp_path):
    (tmp_path / "script.py").write_text(TOLD)
    found, expected = both(tmp_path / "script.py", "--flag", "two words")
    assert found.stdout == expected.stdout and str(tmp_path) in found.stdout
    assert found.returncode == 0 and found.stderr == ""


@pytest.mark.parametrize(
    "text",
    [
        "import sys; sys.exit(3)",
        "import sys; sys.exit('one line')",
        "import sys; sys.exit()",
        "print('said', end='', flush=False)",
        "raise ValueError('what was wrong')",
        "import os; os._exit(5)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import atexit; atexit.register(print, 'last')\nprint('first')\nraise SystemExit(2)",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()",
        "import multiprocessing as m; p = m.Process(target=print, args=(__name__,)); p.start(); p.join()",
        "import sys; from models import nothing",
    ],
)
def test_it_ends_the_same(text, tmp_path):
    (tmp_path / "script.py").write_text(text)
    found, expected = both(tmp_path / "script.py")
    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout)
    assert found.stderr.splitlines()[-1:] == expected.stderr.splitlines()[-1:]


def test_a_module_too():
    for words in (["json.tool", "nowhere"], ["utils.nothing"]):
        found, expected = both("-m", *words)
        assert found.returncode == expected.returncode != 0 and found.stdout == expected.stdout == ""
        assert found.stderr.splitlines()[-1].split(":")[-1] == expected.stderr.splitlines()[-1].split(":")[-1]


def test_it_is_killed_by_its_own_pid(begin, tmp_path):
    (tmp_path / "script.py").write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    )
    process = begin(tmp_path / "script.py")
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    assert int((tmp_path / "pid").read_text()) == process.pid
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == process.poll() == -signal.SIGKILL


def test_ranks_find_each_other_and_one_that_fails_ends_the_rest(tmp_path):
    (tmp_path / "ranks.py").write_text(
        "import os, sys, time, torch\n"
        "torch.distributed.init_process_group('gloo')\n"
        "total = torch.tensor(torch.distributed.get_rank() + 1)\n"
        "torch.distributed.all_reduce(total)\n"
        "print(f'{total} of {torch.distributed.get_world_size()}\\n', end='', flush=True)\n"
        "if sys.argv[1:] == [os.environ['RANK']]: sys.exit(7)\n"
        "if sys.argv[1:]: time.sleep(60)\n"
        "torch.distributed.destroy_process_group()\n"
    )
    variables, script = dict(os.environ), str(tmp_path / "ranks.py")
    whole = forked.run([script], variables, 2)
    assert (whole.returncode, whole.stdout) == (0, "3 of 2\n" * 2), whole.stderr
    assert forked.run([script, "1"], variables, 2, timeout=30).returncode == 7


def test_one_that_takes_too_long_is_ended(tmp_path):
    (tmp_path / "script.py").write_text("import time; time.sleep(60)")
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run([str(tmp_path / "script.py")], dict(os.environ), 1, timeout=0.5)
    assert not forked.multiprocessing.active_children()
