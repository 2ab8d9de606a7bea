"""utils/setup.sh: which Python the shell scripts take."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def chosen(**environment: str) -> list[str]:
    """The Python and the folder that a script has once it has sourced setup.sh."""
    command = ["bash", "-c", f"source '{ROOT}/utils/setup.sh'; echo \"$PYTHON\"; pwd"]
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "VIRTUAL_ENV")}
    result = subprocess.run(command, env=inherited | environment, cwd="/", capture_output=True, text=True, check=True)
    return result.stdout.split()


def test_a_python_that_is_named_is_taken_as_it_is():
    """Even one that lacks packages: a machine without ruff need not install everything anew."""
    assert chosen(PYTHON="/no/such/python") == ["/no/such/python", str(ROOT)]


def test_else_the_one_on_the_path_that_has_the_packages():
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    python, folder = chosen(PATH=path)
    assert Path(python).samefile(sys.executable) and folder == str(ROOT)
