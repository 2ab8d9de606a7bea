"""utils/datautils.py: what the teacher cache holds, what it survives, what it refuses, and how it is read.

References: the stock FluxPipeline with hooks and callbacks of its own, undisturbed caches compared byte for byte, and
counting in plain Python.
"""

import copy
import errno
import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from torch.utils.data import DataLoader
from transformers import CLIPTextModel, T5EncoderModel

from utils import datautils, scenes
from utils.datautils import (
    OnlineTeacher,
    ShuffledSamples,
    TeacherCache,
    collate,
    default_folder,
    fill_cache,
    rebuild_latents,
    trajectory_bytes,
)
from utils.teacher import Teacher, TeacherSettings, prompt_seeds
from utils.tokenizers import TEXT_LENGTH

ROOT = Path(__file__).parents[1]
STEPS, SIZE, SEED = 3, 64, 11
SETTINGS = {"resolution": SIZE, "num_inference_steps": STEPS, "guidance_scale": 2.5}
PROMPTS = scenes.train_prompts(5)
ASKED = TeacherSettings(**SETTINGS)
CPU = torch.device("cpu")
LONG_AGO = 10**18  # ns: when the files of `pristine` were written, so that whatever is written later is seen to be


def load(folder: Path, dtype: torch.dtype = torch.float32) -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(pipeline_folder) -> FluxPipeline:
    return load(pipeline_folder)


@pytest.fixture(scope="module")
def teacher(pipeline_folder) -> Teacher:
    return Teacher(str(pipeline_folder), torch.float32)


@pytest.fixture
def variant(pipeline_folder, tmp_path):
    """variant({"shift": 2.0}, transformer=model) is a folder with that pipeline, some settings of its scheduler and
    some of its models exchanged."""

    def make(scheduler: dict | None = None, **models) -> Path:
        folder = Path(shutil.copytree(pipeline_folder, tmp_path / "variant", dirs_exist_ok=True))
        edit(folder / "scheduler/scheduler_config.json", **scheduler or {})
        for part, model in models.items():
            model.save_pretrained(folder / part)
        return folder

    return make


def edit(file: Path, **fields) -> None:
    """Exchange fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def request(folder: Path, teacher: Teacher, prompts=PROMPTS, seeds=None, **settings) -> TeacherCache:
    """A cache that is not filled yet; by default prompt i from the noise of SEED + i."""
    seeds = range(SEED, SEED + len(prompts)) if seeds is None else seeds
    return TeacherCache(folder, teacher.describe(TeacherSettings(**SETTINGS | settings)), prompts, seeds)


def fill(folder: Path, teacher: Teacher, *asked, batch_size=1, **more) -> TeacherCache:
    cache = request(folder, teacher, *asked, **more)
    fill_cache(cache, teacher, batch_size, CPU)
    return cache


@pytest.fixture(scope="module")
def pristine(teacher, tmp_path_factory) -> Path:
    """A finished cache, to be copied before anything is done to it; pairs of prompts, so that the last is alone."""
    folder = tmp_path_factory.mktemp("pristine") / "cache"
    fill(folder, teacher, batch_size=2)
    for file in folder.iterdir():
        os.utime(file, ns=(LONG_AGO, LONG_AGO))
    return folder


@pytest.fixture
def cache(pristine, tmp_path) -> Path:
    return shutil.copytree(pristine, tmp_path / "cache")  # with its times


def contents(folder: Path) -> dict[str, bytes]:
    """The trajectories in `folder`, file by file."""
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def same_samples(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------- recording, rebuilding


def stock_run(pipe: FluxPipeline, prompts: list[str]) -> SimpleNamespace:
    """What stock diffusers does with a batch of prompts, their noise drawn by itself from SEED, SEED + 1, …

    `inputs` and `velocities` are the transformer's at every step, `latents` those after every step.
    """
    seen = SimpleNamespace(inputs=[], velocities=[], latents=[])

    def after_step(pipe, step, timestep, tensors):
        seen.latents.append(tensors["latents"].clone())
        return {}

    handles = [
        pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.inputs.append(kwargs), with_kwargs=True
        ),
        pipe.transformer.register_forward_hook(lambda module, args, output: seen.velocities.append(output[0])),
    ]
    pipe(
        prompts,
        generator=[torch.Generator().manual_seed(SEED + i) for i in range(len(prompts))],
        height=SIZE,
        width=SIZE,
        num_inference_steps=STEPS,
        guidance_scale=SETTINGS["guidance_scale"],
        max_sequence_length=TEXT_LENGTH,
        output_type="latent",
        callback_on_step_end=after_step,
    )
    for handle in handles:
        handle.remove()
    return seen


def without_guidance(pipe: FluxPipeline) -> FluxTransformer2DModel:
    """As FLUX.1-schnell's."""
    torch.manual_seed(1)
    return FluxTransformer2DModel.from_config(pipe.transformer.config, guidance_embeds=False)


SCHEDULERS = {
    "FLUX.1-dev": {},
    "FLUX.1-schnell": {"shift": 1.0, "use_dynamic_shifting": False},
    "static": {"shift": 3.0, "use_dynamic_shifting": False},
    "linear": {"time_shift_type": "linear"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "terminal": {"shift_terminal": 0.02},
    "inverted": {"invert_sigmas": True},
    "static_karras": {"shift": 3.0, "use_dynamic_shifting": False, "use_karras_sigmas": True},
}
CASES = [pytest.param(settings, True, id=name) for name, settings in SCHEDULERS.items()] + [
    pytest.param(
        {"use_beta_sigmas": True},
        True,
        id="beta",
        marks=pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="beta sigmas need scipy"),
    ),
    pytest.param(SCHEDULERS["FLUX.1-schnell"], False, id="no_guidance"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("scheduler", "guidance_embeds"), CASES)
def test_samples_are_what_the_stock_pipeline_hands_its_transformer_bit_for_bit(
    scheduler, guidance_embeds, dtype, pipe, variant, tmp_path
):
    dtype, prompts = getattr(torch, dtype), PROMPTS[:2]
    folder = variant(scheduler, **({} if guidance_embeds else {"transformer": without_guidance(pipe)}))
    stock = stock_run(load(folder, dtype), prompts)
    cached = fill(tmp_path / "cache", Teacher(str(folder), dtype), prompts, batch_size=2)

    assert len(stock.inputs) == len(stock.latents) == STEPS and len(cached) == 2 * STEPS
    per_prompt = {"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"}
    per_prompt |= {"guidance"} if guidance_embeds else set()
    for i in range(2):
        for step, (inputs, velocity) in enumerate(zip(stock.inputs, stock.velocities, strict=True)):
            sample = cached[i * STEPS + step]
            assert set(sample) == per_prompt | {"img_ids", "txt_ids", "velocity"}
            for name in per_prompt:
                assert same(sample[name], inputs[name][i]), name
            for name in ("img_ids", "txt_ids"):
                assert same(sample[name], inputs[name]), name
            assert same(sample["velocity"], velocity[i])

        kept = cached.trajectory(i)
        first, *later = rebuild_latents(kept["noise"], kept["velocities"], kept["sigmas"])
        assert same(first, stock.inputs[0]["hidden_states"][i])
        for rebuilt, latents in zip(later, stock.latents, strict=True):  # the last of them is the picture
            assert same(rebuilt, latents[i])


def test_stochastic_sampling_is_refused(variant, tmp_path):
    teacher = Teacher(str(variant({"stochastic_sampling": True})), torch.float32)
    with pytest.raises(ValueError, match="stochastic_sampling"):
        fill(tmp_path / "cache", teacher)
    assert not contents(tmp_path / "cache")


def test_velocities_that_are_not_finite_are_refused(pipe, variant, tmp_path):
    broken = copy.deepcopy(pipe.transformer)
    broken.proj_out.bias.data[0] = float("nan")
    teacher = Teacher(str(variant(transformer=broken)), torch.float32)
    with pytest.raises(ValueError, match="velocities hold NaN or inf in torch.float32"):
        fill(tmp_path / "cache", teacher)
    assert not contents(tmp_path / "cache")


# ---------------------------------------------------------------------------------------------------- the files


def random_cache(
    folder: Path, prompts: list[str], steps: int, tokens: int, channels: int, text: int, width: int, pooled: int
) -> TeacherCache:
    """A cache in bfloat16 of which the file of the first trajectory is written, with random values."""
    folder.mkdir()
    manifest = {"num_inference_steps": steps, "guidance_embeds": True, "guidance_scale": 3.5, "dtype": "bfloat16"}
    manifest |= {"latents_shape": [tokens, channels], "text_shape": [text, width], "pooled_shape": [pooled]}
    cached = TeacherCache(folder, manifest, prompts, range(len(prompts)))
    shapes = {"noise": [tokens, channels], "velocities": [steps, tokens, channels], "prompt_embeds": [text, width]}
    shapes["pooled_prompt_embeds"] = [pooled]
    tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    tensors["sigmas"] = torch.linspace(1, 0, steps + 1)
    tensors["timesteps"] = tensors["sigmas"][:-1] * 1000
    cached.store(0, tensors)
    return cached


def test_a_trajectory_of_flux_1_dev_takes_less_than_20_mib(tmp_path):
    shape = {"steps": 28, "tokens": 4096, "channels": 64, "text": 512, "width": 4096, "pooled": 768}
    cached = random_cache(tmp_path / "cache", ["a cat"], **shape)
    (file,) = cached.folder.glob("*.safetensors")
    assert cached.holds(0)
    # 29 tensors of latents' size and the text once; nothing else is of any size.
    assert 0 < file.stat().st_size - 2 * (29 * 4096 * 64 + 512 * 4096 + 768) < 2048
    assert file.stat().st_size <= 20 * 2**20
    assert 0 <= trajectory_bytes(cached.manifest) - file.stat().st_size < 1024


def test_what_is_to_be_written_is_known_before(teacher, pristine, tmp_path):
    size = trajectory_bytes(teacher.describe(TeacherSettings(**SETTINGS)))
    actual = [len(data) for data in contents(pristine).values()]
    assert all(0 <= size - each < 1024 for each in actual)
    assert request(tmp_path, teacher).bytes_to_write() == len(PROMPTS) * size
    assert request(pristine, teacher, [*PROMPTS, "one more"]).bytes_to_write() == size


def test_a_flipped_bit_anywhere_in_a_file_is_seen(tmp_path):
    cached = random_cache(tmp_path / "cache", ["a cat"], steps=2, tokens=2, channels=2, text=2, width=2, pooled=2)
    (file,) = cached.folder.glob("*.safetensors")
    whole = file.read_bytes()
    for position in range(len(whole)):
        altered = bytearray(whole)
        altered[position] ^= 1 << position % 8
        file.write_bytes(altered)
        assert not cached.holds(0), f"byte {position} of {len(whole)}"
    file.write_bytes(whole)
    assert cached.holds(0)


@torch.no_grad()
def test_any_prompt_can_be_cached_and_none_shows_in_a_file_name(pipe, teacher, tmp_path):
    prompts = [
        "🎨 a 👩‍👩‍👧‍👦 under a 🏳️‍🌈",
        "שלום עולם, نجمة حمراء \u202eupside down",
        "三つの星",
        "two\nlines\r\n\tand a tab\u2028and a separator\0",
        "quotes \" ' ` and \\ and {0} %s $HOME",
        "../../etc/passwd",
        ("a red star and a blue ring " * 200)[:5000],
        "x" * 5000,
        "",
        " ",
        "\u200b",
        "a star",
        "a star",
    ]  # fmt: skip
    cached = fill(tmp_path, teacher, prompts, num_inference_steps=1)
    names = [cached.file(i).name for i in range(len(prompts))]
    assert sorted(times(tmp_path)) == sorted([*names, "manifest.json"])
    assert all(re.fullmatch("[0-9a-f]{16}.safetensors", name) for name in names)

    before = times(tmp_path)
    fill(tmp_path, teacher, prompts, num_inference_steps=1)
    assert times(tmp_path) == before
    for i, prompt in enumerate(prompts):
        with safe_open(cached.file(i), "pt") as file:  # a file says for whom it is
            said = json.loads(file.metadata()["trajectory"])
        assert (said["prompt"], said["seed"]) == (prompt, SEED + i)
        embeds, pooled, _ = pipe.encode_prompt(prompt, None, max_sequence_length=TEXT_LENGTH)
        assert same(cached[i]["encoder_hidden_states"], embeds[0])
        assert same(cached[i]["pooled_projections"], pooled[0])
    assert not same(cached[11]["hidden_states"], cached[12]["hidden_states"])  # the same prompt from other noise


# ------------------------------------------------------------------------------------- interrupted, damaged, shared


# Fills a cache as train.py does. Each drawing takes `seconds` longer, for someone who wants to come in between, and
# which rank made which prompts is written to LOG.RANK. The disk has as many bytes left as FREE says, if it says any.
SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
""" + """
import collections, json, os, shutil, time
from pathlib import Path
import torch
from accelerate import PartialState
from utils.datautils import TeacherCache, fill_cache
from utils.teacher import Teacher, TeacherSettings

model, folder, log, seconds, batch_size, prompts, seeds, settings, free = sys.argv[1:]
state, settings, draw, store = PartialState(cpu=True), json.loads(settings), Teacher.draw, TeacherCache.store

def drawn(teacher, text, noise, asked):
    if os.environ.get("FAILS") == str(state.process_index):
        raise ValueError("this rank fails")
    time.sleep(float(seconds_of[asked.num_inference_steps]))
    return draw(teacher, text, noise, asked)

def stored(cache, i, tensors):
    store(cache, i, tensors)
    with open(f"{log}.{state.process_index}", "a") as file:
        file.write(f"{cache.prompts[i]}\\n")

if free:
    usage = collections.namedtuple("usage", "total used free")(10**12, 0, int(free))
    shutil.disk_usage = lambda path: usage
seconds_of = collections.defaultdict(float, {settings["num_inference_steps"]: seconds})
Teacher.draw, TeacherCache.store = drawn, stored
teacher = Teacher(model, torch.float32)
description = teacher.describe(TeacherSettings(**settings))
cache = TeacherCache(Path(folder), description, json.loads(prompts), json.loads(seeds))
fill_cache(cache, teacher, int(batch_size), state.device)
state.destroy_process_group()
"""


@pytest.fixture
def script(pipeline_folder, tmp_path):
    """script(cache, seconds, batch_size, free) is the command that fills a cache with PROMPTS in its own process."""
    (tmp_path / "fill.py").write_text(SCRIPT)

    def command(cache: Path, seconds: float, batch_size: int, free: str = "") -> list[str]:
        words = (tmp_path / "fill.py", pipeline_folder, cache, tmp_path / "log", seconds, batch_size)
        seeds = list(range(SEED, SEED + len(PROMPTS)))
        return [*map(str, words), json.dumps(PROMPTS), json.dumps(seeds), json.dumps(SETTINGS), free]

    return command


def test_a_killed_run_goes_on_with_what_is_missing(script, begin, teacher, tmp_path):
    fill(tmp_path / "undisturbed", teacher)
    folder = tmp_path / "killed"
    process = begin(*script(folder, 0.6, batch_size=1))
    deadline = time.monotonic() + 120
    while len(contents(folder)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = {name: time for name, time in times(folder).items() if not name.endswith(".tmp")}
    assert "manifest.json" in done and 2 <= len(contents(folder)) < len(PROMPTS)

    # What a run leaves that is killed while it writes: half a file, or a whole one not yet renamed.
    cache = request(folder, teacher)
    whole = cache.file(0).read_bytes()
    for name, data in ((cache.file(3).stem, whole[:5000]), (cache.file(4).stem, whole), ("manifest", b"{")):
        (folder / f"{name}.4242.tmp").write_bytes(data)
    (folder / "notes.tmp").write_text("mine")
    fill(folder, teacher)
    assert contents(folder) == contents(tmp_path / "undisturbed")
    assert {name: times(folder)[name] for name in done} == done
    assert [file.name for file in folder.glob("*.tmp")] == ["notes.tmp"]


@pytest.fixture
def claim():
    """claim(cache, 0, 3) starts another process that claims these trajectories as one does that draws them."""
    started = []
    script = """
import fcntl, sys
file = open(sys.argv[1], "rb+", buffering=0)
for key in sys.argv[2:]:
    fcntl.lockf(file, fcntl.LOCK_EX, 1, int(key[:7], 16))
print("claimed", flush=True)
sys.stdin.read()
"""

    def claim(cache: TeacherCache, *numbers: int) -> subprocess.Popen:
        words = [cache.folder / "manifest.json", *(cache.file(i).stem for i in numbers)]
        process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout.readline() == b"claimed\n"
        return process

    yield claim
    for process in started:
        process.kill()
        process.communicate()


def test_an_unfinished_file_of_a_run_that_goes_on_is_left_alone(claim, cache, teacher):
    asked = request(cache, teacher)
    others, nobodys = (cache / f"{asked.file(i).stem}.4242.tmp" for i in (0, 1))
    for file in (others, nobodys):
        file.touch()
    process = claim(asked, 0)
    fill(cache, teacher)
    assert others.exists() and not nobodys.exists()
    process.kill()
    process.wait()
    fill(cache, teacher)
    assert not others.exists()


def test_what_another_run_draws_is_not_drawn_here_unless_it_dies(claim, teacher, pristine, tmp_path, monkeypatch):
    """The other one draws 1 and 3; it finishes the one and is killed over the other."""
    finished = TeacherCache(pristine, teacher.describe(ASKED), PROMPTS, range(SEED, SEED + len(PROMPTS)))
    fill(tmp_path, teacher, PROMPTS[:1], batch_size=2)
    asked, looks, made = request(tmp_path, teacher), [], []
    process = claim(asked, 1, 3)

    def other(seconds: float) -> None:
        looks.append(seconds)
        assert sorted(made) == [2, 4]  # all that is free comes before any waiting
        if len(looks) == 2:
            shutil.copy(finished.file(1), tmp_path)
        if len(looks) == 4:
            process.kill()
            process.wait()

    def stored(cache, i, tensors, store=TeacherCache.store):
        made.append(i)
        store(cache, i, tensors)

    monkeypatch.setattr(TeacherCache, "store", stored)
    monkeypatch.setattr(datautils, "time", SimpleNamespace(sleep=other, time=time.time))
    fill(tmp_path, teacher, batch_size=2)
    assert made[2:] == [3] and len(looks) == 4
    assert contents(tmp_path) == contents(pristine)


@pytest.fixture
def run_two_ranks(script, run):
    """run_two_ranks(cache, NAME="value") fills a cache with two processes of gloo, in pairs of prompts."""

    def call(cache: Path, seconds: float = 1, free: str = "", **environment: str) -> subprocess.CompletedProcess:
        return run(*script(cache, seconds, 2, free), ranks=2, **environment)

    return call


def test_ranks_share_the_prompts_and_write_what_one_rank_would(run_two_ranks, pristine, tmp_path):
    result = run_two_ranks(tmp_path / "shared")
    assert result.returncode == 0, result.stderr
    shares = [(tmp_path / f"log.{rank}").read_text().splitlines() for rank in range(2)]
    assert all(shares) and sorted(shares[0] + shares[1]) == sorted(PROMPTS)
    assert contents(tmp_path / "shared") == contents(pristine)
    assert times(tmp_path / "shared").keys() == times(pristine).keys()


def test_a_disk_that_is_too_small_stops_every_rank(run_two_ranks, tmp_path):
    result = run_two_ranks(tmp_path / "shared", free="1000")
    assert result.returncode != 0 and "the teacher cache takes" in result.stderr
    assert list(times(tmp_path / "shared")) == ["manifest.json"]
    assert not list(tmp_path.glob("log.*"))  # nothing was drawn for nothing either


def test_a_rank_that_fails_ends_the_other_in_the_middle_of_its_work(run_two_ranks, tmp_path):
    """Which would take half an hour; the call itself is given five minutes."""
    result = run_two_ranks(tmp_path / "shared", seconds=1800, FAILS="1")
    assert result.returncode != 0 and "ValueError: this rank fails" in result.stderr
    assert not contents(tmp_path / "shared")


def test_a_second_run_that_fills_the_same_cache_at_the_same_time_does_no_harm(teacher, pristine, tmp_path, monkeypatch):
    """The other run overtakes this one between the writing of the manifest and its renaming."""
    replace, others = os.replace, []

    def overtaken(source, target):
        if not others:
            others.append(source)
            fill(tmp_path, teacher, batch_size=2)
        replace(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    # The other run is another process in earnest: what it calls its unfinished files must not matter.
    monkeypatch.setattr(os, "getpid", lambda: 4242 + len(others))
    fill(tmp_path, teacher, batch_size=2)
    assert contents(tmp_path) == contents(pristine)


def test_without_locks_a_cache_is_filled_all_the_same(teacher, pristine, tmp_path, monkeypatch):
    """As on network file systems that are mounted without them; unfinished files may then be somebody's."""

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(datautils.fcntl, "lockf", no_locks)
    fill(tmp_path, teacher, PROMPTS[:2], batch_size=2)
    (tmp_path / "0123456789abcdef.4242.tmp").touch()
    fill(tmp_path, teacher, batch_size=2)
    assert contents(tmp_path) == contents(pristine) and (tmp_path / "0123456789abcdef.4242.tmp").exists()


def cut(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])


def flip_a_byte_in_the_middle(files: list[Path]) -> list[int]:
    data = bytearray(files[1].read_bytes())
    data[len(data) // 2] ^= 0xFF
    files[1].write_bytes(data)
    return [1]


def empty(files: list[Path]) -> list[int]:
    cut(files[0], 0)
    return [0]


def cut_in_the_middle(files: list[Path]) -> list[int]:
    for file in files[2:4]:  # a whole batch
        cut(file, file.stat().st_size // 2)
    return [2, 3]


def cut_the_last_byte(files: list[Path]) -> list[int]:
    cut(files[4], -1)
    return [4]


def swap(files: list[Path]) -> list[int]:
    first, second = files[0].read_bytes(), files[3].read_bytes()
    files[0].write_bytes(second)
    files[3].write_bytes(first)
    return [0, 3]


def remove(files: list[Path]) -> list[int]:
    files[2].unlink()
    return [2]


DAMAGES = [flip_a_byte_in_the_middle, empty, cut_in_the_middle, cut_the_last_byte, swap, remove]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_and_no_others_are_made_again(damage, cache, pristine, teacher):
    files = [request(cache, teacher).file(i) for i in range(len(PROMPTS))]
    damaged = damage(files)
    fill(cache, teacher, batch_size=2)
    assert contents(cache) == contents(pristine)
    assert [i for i in range(len(PROMPTS)) if times(cache)[files[i].name] != LONG_AGO] == damaged
    assert times(cache)["manifest.json"] == LONG_AGO


def test_a_file_of_another_cache_is_made_again(cache, pristine, teacher, tmp_path):
    """Whole, of the right shape and for the same prompt and noise, but by another scheduler's settings or steps."""
    other = fill(tmp_path / "other", teacher, batch_size=2, guidance_scale=1.0)
    shutil.copy(other.file(1), cache)
    fill(cache, teacher, batch_size=2)
    assert contents(cache) == contents(pristine)


@pytest.fixture
def loads(monkeypatch) -> Counter:
    """How often each model is loaded."""
    counted = Counter()
    for kind in (FluxTransformer2DModel, CLIPTextModel, T5EncoderModel, AutoencoderKL):

        def count(cls, *args, load=kind.from_pretrained.__func__, **more):
            counted[cls.__name__] += 1
            return load(cls, *args, **more)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(count))
    return counted


def test_a_complete_cache_does_not_load_the_teacher(cache, pipeline_folder, tmp_path, loads):
    before = times(cache)
    fill(cache, Teacher(str(pipeline_folder), torch.float32), batch_size=2)
    assert times(cache) == before and loads == {"AutoencoderKL": 1}
    teacher = Teacher(str(pipeline_folder), torch.float32)
    fill(tmp_path / "new", teacher, batch_size=2)
    assert loads == {"AutoencoderKL": 2, "CLIPTextModel": 1, "T5EncoderModel": 1, "FluxTransformer2DModel": 1}
    assert teacher.pipe.transformer is teacher.pipe.text_encoder is teacher.pipe.text_encoder_2 is None  # and dropped


def test_text_encoders_and_transformer_are_never_there_together(teacher, pristine, tmp_path, monkeypatch):
    """In rounds of two prompts, so that each comes more than once."""
    encode, draw, seen = Teacher.encode, Teacher.draw, []

    def encoded(self, *args):
        seen.append("text")
        assert self.pipe.transformer is None or self.pipe.transformer.device.type == "cpu"
        return encode(self, *args)

    def drawn(self, *args):
        seen.append("pictures")
        assert self.pipe.text_encoder is None and self.pipe.text_encoder_2 is None
        return draw(self, *args)

    monkeypatch.setattr(Teacher, "encode", encoded)
    monkeypatch.setattr(Teacher, "draw", drawn)
    monkeypatch.setattr(datautils, "ROUND", 2)
    fill(tmp_path, teacher, batch_size=2)
    # Two short runs say how long it will take.
    assert seen == ["text", "pictures", "pictures", "pictures", "text", "pictures", "text", "pictures"]
    assert contents(tmp_path) == contents(pristine)


def test_blocks_are_compiled_where_that_saves_time(teacher, pristine, tmp_path, monkeypatch):
    """With a compiler that changes nothing: what counts is which modules are compiled, and when. Five prompts of 60
    seconds are worth it on a GPU, of 40 they are not."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *args, **more: compiled.append(type(self).__name__))
    blocks = ["FluxSingleTransformerBlock", "FluxTransformerBlock"]
    fill_cache(request(tmp_path / "asked", teacher), teacher, 2, CPU, compile_blocks=True)
    assert sorted(compiled) == blocks and contents(tmp_path / "asked") == contents(pristine)

    on_gpu, text = SimpleNamespace(type="cuda"), None
    for seconds, device, expected in ((60, on_gpu, blocks), (40, on_gpu, []), (60, CPU, [])):
        compiled.clear()
        cache = fill(tmp_path / "whole", teacher)
        filling = datautils.Filling(cache, teacher, 2, device, None, dict.fromkeys(range(len(PROMPTS))))
        monkeypatch.setattr(filling, "seconds", lambda text, seconds=seconds: seconds)
        teacher.load("transformer", device=CPU)
        with filling:
            filling.prepare(text)
        assert sorted(compiled) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_fills_a_cache_that_the_cpu_rebuilds(compiled, dtype, pipeline_folder, tmp_path):
    """Every state is rebuilt before it is written; grown step by step it is, to the last byte, what it is at once."""
    teacher, device = Teacher(str(pipeline_folder), dtype), torch.device("cuda")
    for name, counts in (("at once", [5]), ("grown", [1, 4, 5])):
        for count in counts:
            fill_cache(request(tmp_path / name, teacher, PROMPTS[:count]), teacher, 2, device, compiled)
    assert len(contents(tmp_path / "grown")) == 5
    assert contents(tmp_path / "grown") == contents(tmp_path / "at once")
    assert all(sample["velocity"].isfinite().all() for sample in request(tmp_path / "grown", teacher))


# -------------------------------------------------------------------------------------- growing, used in part


@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_cache_grows_and_what_is_there_is_used(batch_size, teacher, tmp_path, monkeypatch):
    """To the same bytes as one made at once, whatever the batches were."""
    prompts = scenes.train_prompts(7)
    fill(tmp_path / "at once", teacher, prompts, batch_size=batch_size)
    fill(tmp_path / "grown", teacher, prompts[:3], batch_size=batch_size)
    before = contents(tmp_path / "grown")
    stored = []
    monkeypatch.setattr(TeacherCache, "store", lambda *args, store=TeacherCache.store: stored.append(store(*args)))
    fill(tmp_path / "grown", teacher, prompts, batch_size=batch_size)
    assert len(before) == 3 and len(stored) == 4
    assert contents(tmp_path / "grown") == contents(tmp_path / "at once")
    assert (tmp_path / "grown/manifest.json").read_bytes() == (tmp_path / "at once/manifest.json").read_bytes()


def nothing_drawn(monkeypatch) -> None:
    monkeypatch.setattr(Teacher, "draw", lambda *args: pytest.fail("drawn again"))


def test_a_part_of_a_cache_is_used_as_it_is(cache, teacher, monkeypatch):
    nothing_drawn(monkeypatch)
    whole = request(cache, teacher)
    part = fill(cache, teacher, PROMPTS[:2], batch_size=2)
    assert len(part) == 2 * STEPS
    assert all(same_samples(part[i], whole[i]) for i in range(len(part)))


def test_prompts_in_another_order_are_other_places_of_the_same_trajectories(cache, teacher, monkeypatch):
    """If their noise goes with them; see prompt_seeds."""
    nothing_drawn(monkeypatch)
    whole = request(cache, teacher)
    last = len(PROMPTS) - 1
    turned = fill(cache, teacher, PROMPTS[::-1], seeds=[SEED + last - i for i in range(len(PROMPTS))], batch_size=2)
    for i in range(len(PROMPTS)):
        assert same_samples(turned[i * STEPS], whole[(last - i) * STEPS])


def test_another_prompt_or_other_noise_at_a_place_costs_that_place_alone(cache, teacher, pristine):
    before = contents(pristine)
    seeds = [SEED, SEED + 1, 999, SEED + 3, SEED + 4]
    changed = fill(cache, teacher, [*PROMPTS[:3], "two\nlines", PROMPTS[4]], seeds=seeds, batch_size=2)
    new = contents(cache).keys() - before.keys()
    assert new == {changed.file(2).name, changed.file(3).name}
    assert {name: contents(cache)[name] for name in before} == before
    assert not same(changed[2 * STEPS]["hidden_states"], request(cache, teacher)[2 * STEPS]["hidden_states"])


def test_the_same_prompt_from_the_same_noise_is_drawn_once(teacher, tmp_path):
    cached = fill(tmp_path, teacher, ["a", "b", "a"], seeds=[5, 5, 5], batch_size=3)
    assert len(contents(tmp_path)) == 2 and cached.file(0) == cached.file(2) != cached.file(1)


def test_the_noise_of_training_prompts_goes_with_the_prompt_not_with_its_place(teacher, tmp_path, monkeypatch):
    prompts = ["a", "b", "a", "c"]
    fill(tmp_path, teacher, prompts, seeds=prompt_seeds(prompts, 7))
    nothing_drawn(monkeypatch)
    for other in (prompts[::-1], ["c", "a"], ["a", "a", "b"]):
        fill(tmp_path, teacher, other, seeds=prompt_seeds(other, 7))


def test_the_default_folder_is_named_after_model_and_contents(teacher, pipeline_folder, variant, tmp_path):
    manifest = teacher.describe(TeacherSettings(**SETTINGS))
    folder = default_folder(tmp_path, manifest)
    assert folder.parent == tmp_path and re.fullmatch(f"{pipeline_folder.name}-[0-9a-f]{{8}}", folder.name)
    assert default_folder(tmp_path, manifest | {"model": "owner/FLUX.1-dev"}).name.startswith("FLUX.1-dev-")
    others = {default_folder(tmp_path, teacher.describe(TeacherSettings(**SETTINGS | s))) for _, s, _ in REQUESTS}
    others.add(default_folder(tmp_path, Teacher(str(pipeline_folder), torch.bfloat16).describe(ASKED)))
    others.add(default_folder(tmp_path, Teacher(str(variant({"shift": 2.0})), torch.float32).describe(ASKED)))
    assert len(others) == len(REQUESTS) + 2 and folder not in others
    folder.mkdir()
    assert default_folder(tmp_path, manifest | {"model": "owner/FLUX.1-dev"}) == folder  # the same weights, renamed


# --------------------------------------------------------------------------------------------------- refusals


def shifted(pipe: FluxPipeline, part: str) -> dict:
    """Other weights for one of the models."""
    model = copy.deepcopy(getattr(pipe, part))
    for parameter in model.parameters():
        parameter.data += 0.01
    return {part: model}


TEACHERS = {
    "transformer": ("weights", {}, "transformer", "those of .*random-flux"),
    "text_encoder": ("weights", {}, "text_encoder", "those of .*random-flux"),
    "text_encoder_2": ("weights", {}, "text_encoder_2", "those of .*random-flux"),
    "shift": ("scheduler", {"shift": 2.0}, None, "3.0.*2.0"),
    "sigmas": ("scheduler", {"use_karras_sigmas": True}, None, "'use_karras_sigmas': True"),
}
REQUESTS = [
    ("resolution", {"resolution": 2 * SIZE}, f"{SIZE}, asked for {2 * SIZE}"),
    ("num_inference_steps", {"num_inference_steps": STEPS + 1}, f"{STEPS}, asked for {STEPS + 1}"),
    ("guidance_scale", {"guidance_scale": 3.5}, "2.5, asked for 3.5"),
]
def refused(message: str, folder: Path, teacher: Teacher, **asked) -> None:
    """Assert that a cache in `folder` is refused by one line that names the folder, and that nothing there changes."""
    before = times(folder) if folder.is_dir() else None
    with pytest.raises(ValueError, match=message) as error:
        fill(folder, teacher, batch_size=2, **asked)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(folder))
    assert before is None or times(folder) == before


@pytest.mark.parametrize(("field", "scheduler", "part", "message"), TEACHERS.values(), ids=TEACHERS)
def test_a_cache_of_another_teacher_is_refused(field, scheduler, part, message, cache, pipe, variant, loads):
    folder = variant(scheduler, **({} if part is None else shifted(pipe, part)))
    refused(f"made with another {field}: found .*{message}", cache, Teacher(str(folder), torch.float32))
    assert loads == {"AutoencoderKL": 1}  # before anything is loaded


def test_a_cache_for_another_length_of_text_is_refused(cache, variant):
    folder = variant()
    edit(folder / "tokenizer_2/tokenizer_config.json", model_max_length=TEXT_LENGTH + 8)
    message = rf"another text_shape: found \[{TEXT_LENGTH}, 32\], asked for \[{TEXT_LENGTH + 8}, 32\]"
    refused(message, cache, Teacher(str(folder), torch.float32))


def test_a_cache_of_another_dtype_is_refused(cache, pipeline_folder):
    bf16 = Teacher(str(pipeline_folder), torch.bfloat16)
    refused("made with another dtype: found float32, asked for bfloat16", cache, bf16)


@pytest.mark.parametrize(("field", "asked", "message"), REQUESTS)
def test_a_cache_made_for_another_asked_is_refused(field, asked, message, cache, teacher):
    refused(f"made with another {field}: found .*{message}", cache, teacher, **asked)


def test_guidance_that_the_model_does_not_embed_is_no_difference(pipe, variant, tmp_path, monkeypatch):
    teacher = Teacher(str(variant(transformer=without_guidance(pipe))), torch.float32)
    fill(tmp_path / "cache", teacher)
    nothing_drawn(monkeypatch)
    fill(tmp_path / "cache", teacher, guidance_scale=7.0)


def test_the_same_weights_under_another_name_are_accepted(cache, variant):
    before = times(cache)
    fill(cache, Teacher(str(variant()), torch.float32), batch_size=2)
    assert times(cache) == before


def test_a_cache_of_an_earlier_version_is_named(cache, teacher, tmp_path):
    """Refused in its own folder; beside the new ones it is mentioned."""
    edit(cache / "manifest.json", format=1)
    refused(r"format 1, which this version \(format 2\) cannot use; delete the folder or choose", cache, teacher)
    cache.rename(tmp_path / "train")
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    datautils.log.addHandler(handler)
    fill(tmp_path / "random-flux-01234567", teacher, PROMPTS[:1])
    datautils.log.removeHandler(handler)
    assert any(f"{tmp_path / 'train'}: made by an earlier version" in message for message in messages)


@pytest.mark.parametrize(
    "content", [b"", b'{"format": 1, "mod', b"\xff\xfe\0", b"[]", b"null", b"7", b"{}", b'{"prompts": 7}', None]
)
def test_an_unreadable_manifest_is_refused(content, cache, teacher):
    (cache / "manifest.json").unlink()
    if content is None:
        (cache / "manifest.json").mkdir()
    else:
        (cache / "manifest.json").write_bytes(content)
    refused("delete the folder or choose another --teacher_cache$", cache, teacher)


def test_safetensors_files_without_a_manifest_are_refused(cache, teacher):
    (cache / "manifest.json").unlink()
    refused("holds safetensors files but no manifest.json; choose another --teacher_cache$", cache, teacher)


@pytest.mark.parametrize("place", ["file", "file/cache", "file/deep/cache"])
def test_a_folder_that_cannot_be_written_is_refused(place, teacher, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(r"the teacher cache cannot be written \(.+\); choose another --teacher_cache$", tmp_path / place, teacher)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("share", "fits"), [(0.9, False), (1.2, True)])
def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    share, fits, teacher, pristine, tmp_path, monkeypatch
):
    needed = sum(map(len, contents(pristine).values()))
    usage = namedtuple("usage", "total used free")(10**12, 0, int(share * needed))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    if fits:
        fill(tmp_path, teacher, batch_size=2)
    else:
        with pytest.raises(ValueError, match=f"^{tmp_path}: the teacher cache takes .* GB but only .* are free"):
            fill(tmp_path, teacher, batch_size=2)
        assert list(times(tmp_path)) == ["manifest.json"]


# ------------------------------------------------------------------------------------------------------- reading


def test_samples_do_not_depend_on_the_order_of_reading(pristine, teacher):
    in_order = request(pristine, teacher)
    expected = [in_order[i] for i in range(len(in_order))]
    shuffled = request(pristine, teacher)
    for i in torch.randperm(len(shuffled), generator=torch.Generator().manual_seed(0)).tolist() * 2:
        assert same_samples(shuffled[i], expected[i])


def test_batches_are_stacked_samples_whatever_the_number_of_workers(pristine, teacher):
    cached = request(pristine, teacher)
    order = list(ShuffledSamples(len(PROMPTS), STEPS, seed=3))
    for workers in (0, 2):
        loader = DataLoader(cached, batch_size=4, sampler=order, collate_fn=collate, num_workers=workers)
        batches = list(loader)
        assert [len(batch["velocity"]) for batch in batches] == [4, 4, 4, 3]
        for start, batch in zip(range(0, len(order), 4), batches, strict=True):
            samples = [cached[i] for i in order[start : start + 4]]
            assert batch.keys() == samples[0].keys()
            for name, tensor in batch.items():
                if name in ("img_ids", "txt_ids"):
                    assert same(tensor, samples[0][name])
                else:
                    assert len(tensor) == len(samples)
                    assert all(same(row, sample[name]) for row, sample in zip(tensor, samples, strict=True)), name


# Reads the last step of every trajectory, which takes the whole file, and prints by how much the memory grew at most.
MEMORY = """
import json, os, sys
from pathlib import Path
from utils.datautils import TeacherCache

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024

def cache(folder, count, manifest):
    prompts = [f"prompt {i}" for i in range(int(count))]
    return TeacherCache(Path(folder), json.loads(manifest), prompts, range(len(prompts)))

caches = [cache(*sys.argv[i : i + 3]) for i in range(1, len(sys.argv), 3)]
caches[0][0]  # what is loaded with the first sample
for cache in caches:
    before, most = resident(), 0
    for number in range(len(cache.prompts)):
        assert cache[number * cache.steps + cache.steps - 1]["velocity"].isfinite().all()
        most = max(most, resident())
    print(most - before, len(os.listdir("/proc/self/fd")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_readers_memory_does_not_grow_with_the_cache(run, tmp_path):
    """A reader that kept what it read would take 0.35 GB: one file under 2,048 names, mapped anew at every access."""
    words, shape = [], {"steps": 4, "tokens": 256, "channels": 64, "text": 16, "width": 64, "pooled": 64}
    for count in (64, 2048):
        cached = random_cache(tmp_path / str(count), [f"prompt {i}" for i in range(count)], **shape)
        for i in range(1, count):
            os.link(cached.file(0), cached.file(i))
        words += [cached.folder, count, json.dumps(cached.manifest)]
    assert 2048 * cached.file(0).stat().st_size > 6 * 50e6
    result = run("-c", MEMORY, *words)
    assert result.returncode == 0, result.stderr
    (small, few), (large, many) = (map(int, line.split()) for line in result.stdout.splitlines())
    assert abs(large - small) < 50e6
    assert few == many  # no file stays open


# --------------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("window", [None, 8, 13, 1000])
@pytest.mark.parametrize(("prompts", "steps"), [(50, 28), (64, 4), (1, 1)])
def test_an_epoch_has_every_sample_once_in_an_order_of_its_own(prompts, steps, window):
    sampler = ShuffledSamples(prompts, steps, seed=5, window=window)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert epochs[-1] == list(sampler)
        assert sorted(epochs[-1]) == list(range(prompts * steps)) and len(sampler) == prompts * steps
    if prompts > 1:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        assert list(ShuffledSamples(prompts, steps, seed=6_000, window=window)) != epochs[0]
    torch.manual_seed(123)  # the order is no matter of the global generator
    again = ShuffledSamples(prompts, steps, seed=5, window=window)
    again.set_epoch(2)
    assert list(again) == epochs[2]


@pytest.mark.parametrize("window", [None, 16])
def test_prompts_and_timesteps_are_mixed_within_a_batch(window):
    prompts, steps, batch = 96, 28, 16
    order = list(ShuffledSamples(prompts, steps, seed=0, window=window))
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    # As many as 16 draws from that many prompts and steps find on average, within a tenth.
    for kinds, of in ((window or prompts, lambda i: i // steps), (steps, lambda i: i % steps)):
        expected = kinds * (1 - (1 - 1 / kinds) ** batch)
        distinct = [len(set(map(of, numbers))) for numbers in batches]
        assert sum(distinct) / len(distinct) == pytest.approx(expected, rel=0.1)
        assert min(distinct) >= batch // 3


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize(
    ("steps", "wanted"), [(28, 0.9), (28, 0.1), (10, 0.5), (4, 0.9), (5, [1, 4, 2.5, 0.5, 2]), (1, [3])]
)
def test_steps_get_their_shares_and_prompts_are_drawn_alike(steps, wanted, window):
    """A number is the share of the first quarter of the steps; numbers are those of the steps, whatever their sum."""
    prompts = 600
    given = {"early_share": wanted} if isinstance(wanted, float) else {"early_share": None, "shares": wanted}
    sampler = ShuffledSamples(prompts, steps, seed=1, window=window, **given)
    order = list(sampler)
    assert len(order) == len(sampler) == prompts * steps and order == list(sampler)
    assert set(Counter(number // steps for number in order).values()) == {steps}
    if isinstance(wanted, float):
        early = [min(1, max(0, steps / 4 - k)) for k in range(steps)]  # the part of a step that is in the first quarter
        shares = [e / steps * 4 * wanted + (1 - e) / steps / 0.75 * (1 - wanted) for e in early]
    else:
        shares = [share / sum(wanted) for share in wanted]
    drawn = Counter(number % steps for number in order)
    for k, share in enumerate(shares):  # a prompt gives a step this often, rounded down or up
        each = steps * share
        spread = (prompts * (each % 1) * (1 - each % 1)) ** 0.5
        assert drawn[k] == pytest.approx(prompts * each, abs=5 * spread + 1e-6)
        counts = Counter(number // steps for number in order if number % steps == k)
        assert set(counts.values()) <= {int(each), int(each) + 1}
    sampler.set_epoch(1)
    assert list(sampler) != order


@pytest.mark.parametrize("window", [1, 8, 13])
def test_no_more_than_a_window_of_prompts_is_needed_at_once(window):
    prompts, steps = 50, 4
    sampler = ShuffledSamples(prompts, steps, seed=0, window=window)
    groups = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        runs = [order[i : i + window * steps] for i in range(0, len(order), window * steps)]
        groups.append([frozenset(i // steps for i in run) for run in runs])
        assert max(map(len, groups[-1])) == window
        assert max(Counter(i for group in groups[-1] for i in group).values()) == 1  # and no prompt comes back
    assert groups[0] != groups[1]  # other prompts meet in the next epoch


# ------------------------------------------------------------------------------------------------ without a cache


def test_the_online_teacher_gives_what_a_cache_would_and_draws_each_prompt_once_an_epoch(
    teacher, pipeline_folder, tmp_path
):
    cached = fill(tmp_path, teacher, batch_size=1)
    own, seeds = Teacher(str(pipeline_folder), torch.float32), range(SEED, SEED + len(PROMPTS))
    online = OnlineTeacher(own, TeacherSettings(**SETTINGS), PROMPTS, seeds, keep=2, device=CPU)
    assert len(online) == len(cached) and online.description == cached.description
    calls = []
    own.load(*own.parts, device=CPU)
    own.pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    sampler = ShuffledSamples(len(PROMPTS), STEPS, seed=0, window=2)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        calls.clear()
        for i in sampler:
            assert same_samples(online[i], cached[i])
            assert len(online.made) <= 2
        assert len(calls) <= len(PROMPTS) * STEPS  # because the window is no larger than what is kept
