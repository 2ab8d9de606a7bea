"""utils/rehearsal.py: what it measures and how it judges, on small commands; and its quickest steps for real."""

import dataclasses
import json
import os
import shlex
import sys
import threading
import time

import pytest

from utils import rehearsal
from utils.rehearsal import Stage, Step


@pytest.fixture
def stage(tmp_path):
    """In a folder whose name looks like a pattern."""
    return Stage(rehearsal.parse_args(["--output", str(tmp_path / "[out]"), "--scale", "small"]))


NO_GPU = {"gpus": [], "commit": "abc"}


def step(code: str, **settings) -> Step:
    """A step that runs `code` in Python, in which WORK is the folder that the steps share."""
    code = "import pathlib, os, sys, time; WORK = pathlib.Path('{work}'); " + code
    return Step("a_step", f"python -c {shlex.quote(code)}", **settings)


# ----- how a step is judged


@pytest.mark.parametrize(
    ("code", "settings", "problem"),
    [
        ("pass", {}, ""),
        ("print('going on from 5')", {"says": "going on from"}, ""),
        ("print('anew')", {"says": "going on from"}, 'did not say "going on from"'),
        ("sys.exit('a.py: error: out of memory')", {}, "ended 1: a.py: error: out of memory"),
        ("sys.exit('a.py: error: no room')", {"fails": "no room"}, ""),
        ("sys.exit('a.py: error: other')", {"fails": "no room"}, "must fail in one line, ended 1: a.py: error: other"),
        ("raise ValueError('error: no room')", {"fails": "no room"}, "must fail in one line, ended 1: ValueError"),
        ("pass", {"fails": "no room"}, "must fail in one line, ended 0: "),
        ("os.abort()", {"fails": "no room"}, "must fail in one line, ended -6: "),
        ("(WORK / 'a').write_text('12345')", {"holds": {"a": (9, 5)}}, ""),
        ("(WORK / 'a').write_text('123456')", {"holds": {"a": (9, 5)}}, "a has 0.0 MB, more than 0.0"),
        ("(WORK / 'a').write_text('1')", {"holds": {"a": None, "b*": None}}, "b* is missing"),
        ("(WORK / 'a.json').write_text('[1, NaN]')", {"holds": {"a.json": None}}, "a.json: a number is not finite"),
        ("(WORK / 'a.json').write_text('[[1.5, null]]')", {"holds": {"a.json": None}}, ""),
        ("time.sleep(60)", {"limit": 0.5}, "killed after 0.5 s"),
        ("pass", {"kill": "never"}, "was to be killed, ended 0: "),
    ],
)
def test_a_step_is_judged_by_what_it_must_do(stage, code, settings, problem):
    row = rehearsal.play(step(code, **settings), stage, NO_GPU)
    assert row["problem"].startswith(problem) and bool(row["problem"]) == bool(problem), row["problem"]


def test_a_killed_step_leaves_no_process(stage):
    """It is killed once the file is there, with what it started, in a session of its own as torchrun does."""
    child = "import time, pathlib; time.sleep(2); pathlib.Path('LATE').touch()"
    child = child.replace("LATE", str(stage.work / "late"))
    code = (
        f"import subprocess; subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True); "
        "time.sleep(0.3); (WORK / 'checkpoint-5').mkdir(); time.sleep(60)"
    )
    row = rehearsal.play(step(code, kill="checkpoint-{save_steps}"), stage, NO_GPU)
    assert (row["problem"], row["status"], row["killed"], row["must"]) == ("", -9, "as meant", "be killed")
    assert row["seconds"] < 30
    time.sleep(2)
    assert not (stage.work / "late").exists()


def test_on_a_gpu_that_is_too_small_it_must_fail_in_one_line(stage):
    stage.scale = "flux"
    machine = {"gpus": [{"name": "a GPU", "gib": 79.6}], "commit": None}
    fine, big = step("pass", gib=79), step("pass", gib=130)
    assert rehearsal.play(fine, stage, machine)["problem"] == ""
    assert rehearsal.play(big, stage, machine)["problem"].startswith("must fail in one line")
    short = step("sys.exit('train.py: error: --optim: takes 96 GiB')", gib=130, kill="checkpoint-5")
    row = rehearsal.play(short, stage, machine)
    assert (row["problem"], row["must"]) == ("", "fail in one line")


def test_what_cannot_run_is_skipped_with_its_reason(stage):
    assert rehearsal.play(step("pass", gpus=2), stage, NO_GPU)["skipped"] == "needs 2 GPUs"
    row = rehearsal.play(step("pass", reads=("cache",)), stage, NO_GPU)
    assert row["skipped"] == "needs cache of an earlier step"


def test_a_pipeline_that_is_there_is_used_and_never_deleted(stage):
    model = stage.output / "model"
    model.mkdir(parents=True)
    (model / "mine").touch()
    make = next(step for step in rehearsal.STEPS if step.name == "make")
    assert rehearsal.play(make, stage, NO_GPU)["skipped"] == f"{model} is there already"
    assert not any("{model}" in text for step in rehearsal.STEPS for text in (*step.clears, *step.drops))
    assert (model / "mine").exists()


def test_a_folder_of_someone_elses_is_left_alone(stage):
    (stage.work / "lora").mkdir(parents=True)
    with pytest.raises(ValueError, match="not of a rehearsal .*choose another --output"):
        rehearsal.rehearse([step("pass", clears=("lora",))], stage)
    assert (stage.work / "lora").exists()


# ----- what is measured


def test_memory_and_bytes_are_those_of_the_command_and_its_children(stage, monkeypatch):
    """200 MB in the command, 100 MB in a child; 3 kB are left of 5 MB written."""
    monkeypatch.setattr(rehearsal, "SAMPLE_SECONDS", 0.05)
    child = "import time; held = b'x' * 100_000_000; time.sleep(3)"
    code = (
        f"import subprocess; p = subprocess.Popen([sys.executable, '-c', {child!r}]); held = b'x' * 200_000_000; "
        "(WORK / 'large').write_bytes(bytes(5_000_000)); p.wait(); (WORK / 'large').unlink(); "
        "(WORK / 'small').write_bytes(bytes(3000))"
    )
    row = rehearsal.play(step(code), stage, NO_GPU)
    assert not row["problem"]
    assert 0.3 <= row["host_peak_without_files_gb"] <= row["host_peak_gb"] < 0.4
    assert (row["written_bytes"], row["disk_peak_bytes"]) == (3000, 5_000_000)
    assert 3 <= row["seconds"] < 20 and row["gpu_peak_gib"] == []


class FakeNvml:
    """Two GPUs of 80 GiB; what is taken of them follows `used`."""

    def __init__(self, used):
        self.used = used

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = 1 + index.value
        return 0

    def nvmlDeviceGetName(self, handle, name, length):
        name.value = b"NVIDIA H100"
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle, memory):
        memory._obj.total, memory._obj.used = 80 * 2**30, self.used(handle.value - 1)
        return 0


def test_gpu_memory_is_the_peak_above_what_was_taken_before(stage, monkeypatch):
    monkeypatch.setattr(rehearsal, "SAMPLE_SECONDS", 0.05)
    running = stage.work / "running"
    fake = FakeNvml(lambda index: (2**30 if index else 0) + (5 + index) * 2**30 * running.exists())
    monkeypatch.setattr(rehearsal, "nvml", lambda: fake)
    assert rehearsal.describe_machine()["gpus"] == [{"name": "NVIDIA H100", "gib": 80.0}] * 2
    code = "(WORK / 'running').touch(); time.sleep(1); (WORK / 'running').unlink()"
    assert rehearsal.play(step(code), stage, NO_GPU)["gpu_peak_gib"] == [5.0, 6.0]


def test_memory_of_a_killed_step_is_waited_for(stage, monkeypatch):
    """It goes some moments after the process; the next step must not count it as taken before."""
    monkeypatch.setattr(rehearsal, "SAMPLE_SECONDS", 0.05)
    held = stage.work / "held"
    monkeypatch.setattr(rehearsal, "nvml", lambda: FakeNvml(lambda index: 5 * 2**30 * held.exists()))
    driver = threading.Timer(2, held.unlink)
    monkeypatch.setattr(rehearsal, "kill_tree", lambda pid, kill=rehearsal.kill_tree: (kill(pid), driver.start()))
    row = rehearsal.play(step("(WORK / 'held').touch(); time.sleep(60)", kill="held"), stage, NO_GPU)
    assert row["killed"] == "as meant" and not held.exists() and row["seconds"] < 2
    assert rehearsal.play(step("pass"), stage, NO_GPU)["gpu_peak_gib"] == [0, 0]


def test_memory_that_another_process_took_meanwhile_is_not_waited_for_without_end(monkeypatch, tmp_path):
    used = iter([0, *[2**30] * 1000])
    monkeypatch.setattr(rehearsal, "look_at_gpus", lambda: [("a GPU", 2**36, next(used))])
    started = time.monotonic()
    rehearsal.Watch(os.getpid(), tmp_path).settle(seconds=0.3)
    assert 0.3 <= time.monotonic() - started < 3


def test_a_gpus_peak_beyond_the_bound_is_a_problem(stage):
    row = {"status": 0, "killed": "", "gpu_peak_gib": [3.0, 32.5]}
    lora = step("pass", peak=32)
    assert rehearsal.judge(lora, stage, row, "", False) == ""  # the bounds are those of FLUX.1-dev
    stage.scale = "flux"
    assert rehearsal.judge(lora, stage, row, "", False) == "took 32.5 GiB of a GPU, more than 32"
    killed = step("pass", peak=32, kill="checkpoint")
    assert rehearsal.judge(killed, stage, row | {"killed": "as meant"}, "", False).startswith("took 32.5 GiB")
    assert rehearsal.judge(lora, stage, row | {"status": 1}, "no memory", False) == "ended 1: no memory"
    row["gpu_peak_gib"] = [31.9]
    assert rehearsal.judge(lora, stage, row, "", False) == ""


def test_without_nvidias_library_there_are_no_gpus(monkeypatch):
    monkeypatch.setattr(rehearsal, "nvml", lambda: None)
    assert rehearsal.describe_machine()["gpus"] == []


def test_reports_are_copied_and_folders_go_when_they_are_said_to(stage):
    code = "(WORK / 'new').mkdir(); (WORK / 'new/metrics.json').write_text('{{\"seconds\": 1.5, \"other\": 2}}')"
    made = step(code, reports={"new/metrics.json": ("seconds", "unknown")}, clears=("new",), holds={"new": None})
    assert rehearsal.play(made, stage, NO_GPU)["reports"] == {"seconds": 1.5}
    again = rehearsal.play(dataclasses.replace(made, drops=("new",)), stage, NO_GPU)  # mkdir fails on what is left
    assert not again["problem"] and not (stage.work / "new").exists()


def writes(**files) -> str:
    """Code that writes JSON files into the steps' folder."""
    lines = [f"(WORK / {name + '.json'!r}).write_text({json.dumps(data)!r})" for name, data in files.items()]
    return "; ".join(lines).replace("{", "{{").replace("}", "}}")


@pytest.mark.parametrize(
    ("figures", "problem"),
    [
        ({"rows": [{"ratio": 9}, {"ratio": 1.2}]}, ""),
        ({"rows": [{"ratio": 1}, {"ratio": 1.21}]}, "rows.1.ratio is 1.21, to be at most 1.2"),
        ({"rows": [{"ratio": 1}]}, "rows.1.ratio is None, to be at most 1.2"),
        ({"rows": [{}, {"ratio": None}]}, "rows.1.ratio is None, to be at most 1.2"),
        ({"rows": 5}, "rows.1.ratio is None, to be at most 1.2"),
    ],
)
def test_a_figure_beyond_its_bound_is_a_problem_at_full_scale(figures, problem, stage):
    measured = step(writes(a=figures), reports={"a.json": ("rows.1.ratio",)}, most={"rows.1.ratio": 1.2})
    assert rehearsal.play(measured, stage, NO_GPU)["problem"] == ""  # the bounds are those of FLUX.1-dev
    stage.scale = "flux"
    row = rehearsal.play(measured, stage, NO_GPU)
    assert row["problem"] == problem
    assert rehearsal.figure(figures, "rows.1.ratio") == row["reports"].get("rows.1.ratio")


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (0.1, ""),
        (0.10009, ""),
        (0.09989, "final.nmse is 0.1, that of b.json 0.09989: further apart than 0.001 of it"),
        (None, "final.nmse is 0.1, that of b.json None"),
    ],
)
def test_two_runs_have_to_end_in_the_same(other, problem, stage):
    both = writes(a={"final": {"nmse": 0.1}}, b={"final": {"nmse": other}})
    found = rehearsal.play(step(both, agrees=("a.json", "b.json", "final.nmse", 1e-3)), stage, NO_GPU)["problem"]
    assert found.startswith(problem) and bool(found) == bool(problem)


def test_a_gpu_is_looked_at_while_the_host_still_is(monkeypatch, tmp_path):
    """Where processes map whole checkpoints the host takes seconds; a training's peak on the GPU lasts one."""
    seen, enough = [], threading.Event()

    def gpus() -> list:
        seen.append(0)
        if len(seen) > 4:
            enough.set()
        return [("a GPU", 100, 2**30 * (len(seen) == 4))]

    monkeypatch.setattr(rehearsal, "look_at_gpus", gpus)
    monkeypatch.setattr(rehearsal, "host_bytes", lambda pid: (0, enough.wait(60) - 1))
    monkeypatch.setattr(rehearsal, "SAMPLE_SECONDS", 0.01)
    with rehearsal.Watch(os.getpid(), tmp_path) as watch:
        assert enough.wait(60)
    assert watch.peaks()["gpu_peak_gib"] == [1.0]


# ----- the records


def test_records_are_written_after_every_step_and_only_replaces_rows(stage, monkeypatch):
    steps = [Step(name, "python -c pass") for name in ("one", "two", "three")]
    monkeypatch.setattr(rehearsal, "STEPS", steps)
    file = stage.output / "rehearsal.json"

    def play(step, stage, machine):
        if step.name == "three":
            raise KeyboardInterrupt
        return {"name": step.name, "skipped": f"not now, {stage.turn}"}

    monkeypatch.setattr(rehearsal, "describe_machine", lambda: {"cores": 8 * stage.turn, "commit": f"c{stage.turn}"})
    stage.turn = 1
    with pytest.raises(KeyboardInterrupt):
        rehearsal.rehearse(steps, stage, play)
    stage.turn = 2
    rehearsal.rehearse(steps[1:2], stage, play)
    found = json.loads(file.read_text())
    rows, machines = found["rows"], found["machines"]
    assert [(row["name"], row["skipped"]) for row in rows] == [("one", "not now, 1"), ("two", "not now, 2")]
    assert [(machines[row["machine"]]["cores"], row["commit"]) for row in rows] == [(8, "c1"), (16, "c2")]
    assert "| one | | not now, 1 |" in file.with_suffix(".md").read_text()
    stage.scale = "flux"
    with pytest.raises(ValueError, match="of --scale small; choose another --output for flux"):
        rehearsal.rehearse(steps, stage, play)


def test_every_step_is_well_formed(tmp_path):
    """Names are unique, placeholders known, and what a step reads or resumes was made by one before it."""
    assert len({step.name for step in rehearsal.STEPS}) == len(rehearsal.STEPS)
    for scale in rehearsal.SCALES:
        args = rehearsal.parse_args(["--output", str(tmp_path), "--scale", scale])
        stage, alive = Stage(args), set()
        for step in args.steps:
            stage.command(step)
            for text in (*step.holds, *step.reports, step.kill):
                stage.fill(text)
            assert set(step.most) <= {name for names in step.reports.values() for name in names}, step.name
            assert {path.split("/")[0] for path in step.reads} <= alive, step.name
            alive = (alive | set(step.clears)) - set(step.drops)


# ----- the program


def test_the_quickest_steps_for_real(run, tmp_path):
    result = run(
        "-m", "utils.rehearsal", "--output", tmp_path, "--scale", "small", "--only", "make", "mse", "not_twice"
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads((tmp_path / "rehearsal.json").read_text())
    assert [row["name"] for row in record["rows"]] == ["make", "mse", "not_twice"]
    make, mse, twice = record["rows"]
    assert make["written_bytes"] > 19e6 and 5e6 < mse["written_bytes"] < 10e6 and twice["written_bytes"] == 0
    assert mse["reports"]["seconds"] > 0 and mse["host_peak_gb"] > 0.1
    table = (tmp_path / "rehearsal.md").read_text()
    assert "| mse | succeed | ✓ |" in table and "| not_twice | fail in one line | ✓ |" in table


def test_a_step_that_breaks_ends_in_one_line(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rehearsal, "STEPS", [Step("broken", "python -c 'import sys; sys.exit(3)'")])
    assert start(rehearsal.main, "rehearsal.py", "--output", tmp_path, "--scale", "small") == 1
    assert "1 of 1 steps did not do what they must; first: broken ended 3" in capsys.readouterr().err


def test_unknown_steps_and_the_list(start, tmp_path, capsys):
    words = ("rehearsal.py", "--output", tmp_path / "none", "--scale", "small")
    assert start(rehearsal.main, *words, "--only", "curtain") == 2
    assert "--only curtain: no such step; use one of make, sanity" in capsys.readouterr().err
    assert start(rehearsal.main, *words, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum("small" in step.scales for step in rehearsal.STEPS)
    assert lines[0].split()[:4] == ["make", "python", "-m", "utils.make_random_flux"]
    assert not (tmp_path / "none").exists() and sys.executable not in "".join(lines)
