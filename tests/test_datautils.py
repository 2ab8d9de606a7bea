"""utils/datautils.py: what the teacher cache holds, what it survives, what it refuses, and how it is read.

References: the stock FluxPipeline with hooks and callbacks of its own, undisturbed caches compared byte for byte, and
counting in plain Python.
"""

import copy
import importlib.util
import json
import os
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
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch.utils.data import DataLoader

from utils import scenes
from utils.datautils import (
    OnlineTeacher,
    ShuffledSamples,
    TeacherCache,
    TeacherSettings,
    collate,
    fill_cache,
    fingerprint,
    rebuild_latents,
)
from utils.tokenizers import TEXT_LENGTH

ROOT = Path(__file__).parents[1]
STEPS, SIZE, SEED = 3, 64, 11
SETTINGS = {"resolution": SIZE, "num_inference_steps": STEPS, "guidance_scale": 2.5, "seed": SEED}
PROMPTS = scenes.train_prompts(5)
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
def pipe_bf16(pipeline_folder) -> FluxPipeline:
    return load(pipeline_folder, torch.bfloat16)


def variant(pipe: FluxPipeline, scheduler: dict | None = None, **parts) -> FluxPipeline:
    """`pipe` with some of its parts or of its scheduler's settings exchanged."""
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **scheduler or {})
    pipe = FluxPipeline(**pipe.components | parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fill(folder: Path, pipe: FluxPipeline, prompts=PROMPTS, batch_size=1, model="random", **settings) -> TeacherCache:
    return fill_cache(folder, pipe, model, list(prompts), TeacherSettings(**SETTINGS | settings), batch_size, CPU)


@pytest.fixture(scope="module")
def pristine(pipe, tmp_path_factory) -> Path:
    """A finished cache, to be copied before anything is done to it; pairs of prompts, so that the last is alone."""
    folder = tmp_path_factory.mktemp("pristine") / "cache"
    fill(folder, pipe, batch_size=2)
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


def without_guidance(pipe: FluxPipeline) -> FluxPipeline:
    """As FLUX.1-schnell is."""
    torch.manual_seed(1)
    transformer = FluxTransformer2DModel.from_config(pipe.transformer.config, guidance_embeds=False)
    return variant(pipe, transformer=transformer.to(pipe.transformer.dtype))


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
    scheduler, guidance_embeds, dtype, pipe, pipe_bf16, tmp_path
):
    teacher = variant(pipe if dtype == "float32" else pipe_bf16, scheduler)
    teacher = teacher if guidance_embeds else without_guidance(teacher)
    prompts = PROMPTS[:2]
    stock = stock_run(teacher, prompts)
    cached = fill(tmp_path, teacher, prompts, batch_size=2)

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


def test_stochastic_sampling_is_refused(pipe, tmp_path):
    with pytest.raises(ValueError, match="stochastic_sampling"):
        fill(tmp_path, variant(pipe, {"stochastic_sampling": True}))
    assert not contents(tmp_path)


# ---------------------------------------------------------------------------------------------------- the files


def random_cache(
    folder: Path, prompts: list[str], steps: int, tokens: int, channels: int, text: int, width: int, pooled: int
) -> TeacherCache:
    """A cache in bfloat16 of which the file of the first trajectory is written, with random values."""
    folder.mkdir()
    description = {"prompts": prompts, "num_inference_steps": steps, "guidance_embeds": True, "guidance_scale": 3.5}
    (folder / "manifest.json").write_text(json.dumps(description))
    cached = TeacherCache(folder)
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
def test_any_prompt_can_be_cached_and_none_shows_in_a_file_name(pipe, tmp_path):
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
    fill(tmp_path, pipe, prompts, num_inference_steps=1)
    names = [f"{i:06d}.safetensors" for i in range(len(prompts))]
    assert sorted(times(tmp_path)) == [*names, "manifest.json"]

    before = times(tmp_path)
    cached = fill(tmp_path, pipe, prompts, num_inference_steps=1)
    assert times(tmp_path) == before and cached.prompts == prompts
    for i, prompt in enumerate(prompts):
        embeds, pooled, _ = pipe.encode_prompt(prompt, None, max_sequence_length=TEXT_LENGTH)
        assert same(cached[i]["encoder_hidden_states"], embeds[0])
        assert same(cached[i]["pooled_projections"], pooled[0])
    assert not same(cached[11]["hidden_states"], cached[12]["hidden_states"])  # noise goes by place, not by prompt


# ------------------------------------------------------------------------------------- interrupted, damaged, shared


# Fills a cache as train.py does. Each call of the transformer takes `seconds` longer, for someone who wants to come in
# between, and which rank drew which prompts is written to LOG.RANK; the shorter runs that measure the speed are left
# out. With FREE in the environment, that is what the disk has left.
SCRIPT = """
import collections, json, os, shutil, sys, time
from pathlib import Path
from accelerate import PartialState
from diffusers import FluxPipeline
from utils.datautils import TeacherSettings, fill_cache

model, cache, log, seconds, batch_size, prompts, settings = sys.argv[1:]
state, settings, draw = PartialState(cpu=True), json.loads(settings), FluxPipeline.__call__

def drawn(pipe, *, prompt, num_inference_steps, **inputs):
    if num_inference_steps == settings["num_inference_steps"]:
        with open(f"{log}.{state.process_index}", "a") as file:
            file.writelines(f"{one}\\n" for one in prompt)
    return draw(pipe, prompt=prompt, num_inference_steps=num_inference_steps, **inputs)

if "FREE" in os.environ:
    usage = collections.namedtuple("usage", "total used free")(10**12, 0, int(os.environ["FREE"]))
    shutil.disk_usage = lambda path: usage
FluxPipeline.__call__ = drawn
pipe = FluxPipeline.from_pretrained(model)
pipe.transformer.register_forward_hook(lambda *_: time.sleep(float(seconds)))
wanted = TeacherSettings(**settings)
fill_cache(Path(cache), pipe, "random", json.loads(prompts), wanted, int(batch_size), state.device)
state.destroy_process_group()
"""


@pytest.fixture
def script(pipeline_folder, tmp_path):
    """script(cache, seconds, batch_size) is the command that fills a cache with PROMPTS in a process of its own."""
    (tmp_path / "fill.py").write_text(SCRIPT)

    def command(cache: Path, seconds: float, batch_size: int) -> list[str]:
        words = (tmp_path / "fill.py", pipeline_folder, cache, tmp_path / "log", seconds, batch_size)
        return [*map(str, words), json.dumps(PROMPTS), json.dumps(SETTINGS)]

    return command


def test_a_killed_run_goes_on_with_what_is_missing(script, pipe, tmp_path):
    fill(tmp_path / "undisturbed", pipe)
    folder = tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, *script(folder, 0.2, batch_size=1)], env=environment)
    deadline = time.monotonic() + 120
    while len(contents(folder)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = times(folder)
    assert "manifest.json" in done and 2 <= len(contents(folder)) < len(PROMPTS)

    # What a run leaves that is killed while it writes: half a file, or a whole one not yet renamed.
    whole = (folder / "000000.safetensors").read_bytes()
    rubbish = {"000003.4242.tmp": whole[:5000], "000004.4242.tmp": whole}
    for name, data in rubbish.items():
        (folder / name).write_bytes(data)
    fill(folder, pipe)
    assert contents(folder) == contents(tmp_path / "undisturbed")
    assert {name: times(folder)[name] for name in done} == done


@pytest.fixture
def run_two_ranks(script, run):
    """run_two_ranks(cache, NAME="value") fills a cache with two processes of gloo, in pairs of prompts."""

    def call(cache: Path, **environment: str) -> subprocess.CompletedProcess:
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
        return run(*launcher, *script(cache, 0, batch_size=2), PYTHONPATH=str(ROOT), **environment)

    return call


def test_ranks_share_the_prompts_and_write_what_one_rank_would(run_two_ranks, pristine, tmp_path):
    result = run_two_ranks(tmp_path / "shared")
    assert result.returncode == 0, result.stderr
    shares = [(tmp_path / f"log.{rank}").read_text().splitlines() for rank in range(2)]
    assert all(shares) and sorted(shares[0] + shares[1]) == sorted(PROMPTS)
    assert contents(tmp_path / "shared") == contents(pristine)
    assert times(tmp_path / "shared").keys() == times(pristine).keys()


def test_a_disk_that_is_too_small_stops_every_rank(run_two_ranks, tmp_path):
    result = run_two_ranks(tmp_path / "shared", FREE="1000")
    assert result.returncode != 0 and "the teacher cache takes" in result.stderr
    assert list(times(tmp_path / "shared")) == ["manifest.json"]
    assert not list(tmp_path.glob("log.*"))  # nothing was drawn for nothing either


def test_a_second_run_that_fills_the_same_cache_at_the_same_time_does_no_harm(pipe, pristine, tmp_path, monkeypatch):
    """The other run overtakes this one between the writing of the manifest and its renaming."""
    replace, others = os.replace, []

    def overtaken(source, target):
        if not others:
            others.append(source)
            fill(tmp_path, pipe, batch_size=2)
        replace(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    # The other run is another process in earnest: what it calls its unfinished files must not matter.
    monkeypatch.setattr(os, "getpid", lambda: 4242 + len(others))
    fill(tmp_path, pipe, batch_size=2)
    assert contents(tmp_path) == contents(pristine)


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
def test_damaged_files_and_no_others_are_made_again(damage, cache, pristine, pipe):
    damaged = damage(sorted(cache.glob("*.safetensors")))
    fill(cache, pipe, batch_size=2)
    assert contents(cache) == contents(pristine)
    assert [i for i in range(len(PROMPTS)) if times(cache)[f"{i:06d}.safetensors"] != LONG_AGO] == damaged
    assert times(cache)["manifest.json"] == LONG_AGO


def test_a_file_of_another_cache_is_made_again(cache, pristine, pipe, tmp_path):
    """Whole and of the right shape, but of other noise."""
    other = fill(tmp_path / "other", pipe, batch_size=2, seed=SEED + 1)
    shutil.copy(other.folder / "000001.safetensors", cache)
    fill(cache, pipe, batch_size=2)
    assert contents(cache) == contents(pristine)


def test_a_complete_cache_does_not_run_the_teacher(cache, pipe, monkeypatch):
    monkeypatch.setattr(pipe.transformer, "forward", None)
    before = times(cache)
    fill(cache, pipe, batch_size=2)
    assert times(cache) == before


# --------------------------------------------------------------------------------------------------- refusals


def shifted(pipe: FluxPipeline, part: str) -> FluxPipeline:
    """`pipe` with other weights in one of its models."""
    model = copy.deepcopy(getattr(pipe, part))
    for parameter in model.parameters():
        parameter.data += 0.01
    return variant(pipe, **{part: model})


def longer_text(pipe: FluxPipeline) -> FluxPipeline:
    tokenizer = copy.deepcopy(pipe.tokenizer_2)
    tokenizer.model_max_length = TEXT_LENGTH + 8
    return variant(pipe, tokenizer_2=tokenizer)


TEACHERS = {
    "transformer": ("weights", lambda pipe: shifted(pipe, "transformer"), "those of random"),
    "text_encoder": ("weights", lambda pipe: shifted(pipe, "text_encoder"), "those of random"),
    "text_encoder_2": ("weights", lambda pipe: shifted(pipe, "text_encoder_2"), "those of random"),
    "shift": ("scheduler", lambda pipe: variant(pipe, {"shift": 2.0}), "3.0.*2.0"),
    "sigmas": ("scheduler", lambda pipe: variant(pipe, {"use_karras_sigmas": True}), "'use_karras_sigmas': True"),
    "text_length": ("text_length", longer_text, f"{TEXT_LENGTH}, asked for {TEXT_LENGTH + 8}"),
}
REQUESTS = [
    ("resolution", {"resolution": 2 * SIZE}, f"{SIZE}, asked for {2 * SIZE}"),
    ("num_inference_steps", {"num_inference_steps": STEPS + 1}, f"{STEPS}, asked for {STEPS + 1}"),
    ("guidance_scale", {"guidance_scale": 3.5}, "2.5, asked for 3.5"),
    ("seed", {"seed": SEED + 1}, f"{SEED}, asked for {SEED + 1}"),
    ("prompts", {"prompts": PROMPTS[:4]}, "5 prompts, asked for 4"),
    ("prompts", {"prompts": [*PROMPTS, "one more"]}, "5 prompts, asked for 6"),
    ("prompts", {"prompts": PROMPTS[::-1]}, "number 0, asked for"),
    ("prompts", {"prompts": [*PROMPTS[:3], "two\nlines", *PROMPTS[4:]]}, r"number 3, asked for 'two\\nlines'"),
]


def refused(message: str, folder: Path, pipe: FluxPipeline, **request) -> None:
    """Assert that a cache in `folder` is refused by one line that names the folder, and that nothing there changes."""
    before = times(folder) if folder.is_dir() else None
    with pytest.raises(ValueError, match=message) as error:
        fill(folder, pipe, batch_size=2, **request)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(folder))
    assert before is None or times(folder) == before


@pytest.mark.parametrize(("field", "other", "message"), TEACHERS.values(), ids=TEACHERS)
def test_a_cache_of_another_teacher_is_refused(field, other, message, cache, pipe):
    refused(f"made with another {field}: found .*{message}", cache, other(pipe))


def test_a_cache_of_another_dtype_is_refused(cache, pipe_bf16):
    refused("made with another dtype: found float32, asked for bfloat16", cache, pipe_bf16)


@pytest.mark.parametrize(("field", "asked", "message"), REQUESTS)
def test_a_cache_made_for_another_askedis_refused(field, asked, message, cache, pipe):
    refused(f"made with another {field}: found .*{message}", cache, pipe, **asked)


def test_the_same_weights_under_another_name_are_accepted(cache, pipeline_folder, tmp_path):
    before = times(cache)
    moved = load(shutil.copytree(pipeline_folder, tmp_path / "moved"))
    fill(cache, moved, batch_size=2, model=str(tmp_path / "moved"))
    assert times(cache) == before


@pytest.mark.parametrize("content", [b"", b'{"format": 1, "mod', b"\xff\xfe\0", b"[]", b"null", b"{}", None])
def test_an_unreadable_manifest_is_refused(content, cache, pipe):
    (cache / "manifest.json").unlink()
    if content is None:
        (cache / "manifest.json").mkdir()
    else:
        (cache / "manifest.json").write_bytes(content)
    refused("delete the folder or choose another --teacher_cache$", cache, pipe)


def test_safetensors_files_without_a_manifest_are_refused(cache, pipe):
    (cache / "manifest.json").unlink()
    refused("holds safetensors files but no manifest.json; choose another --teacher_cache$", cache, pipe)


@pytest.mark.parametrize("place", ["file", "file/cache", "file/deep/cache"])
def test_a_folder_that_cannot_be_written_is_refused(place, pipe, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(r"the teacher cache cannot be written \(.+\); choose another --teacher_cache$", tmp_path / place, pipe)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("share", "fits"), [(0.9, False), (1.2, True)])
def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    share, fits, pipe, pristine, tmp_path, monkeypatch
):
    needed = sum(map(len, contents(pristine).values()))
    usage = namedtuple("usage", "total used free")(10**12, 0, int(share * needed))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    if fits:
        fill(tmp_path, pipe, batch_size=2)
    else:
        with pytest.raises(ValueError, match=f"^{tmp_path}: the teacher cache takes .* GB but only .* are free"):
            fill(tmp_path, pipe, batch_size=2)
        assert list(times(tmp_path)) == ["manifest.json"]


# --------------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_is_that_of_the_weights(pipe, pipeline_folder):
    expected = fingerprint(pipe)
    other = load(pipeline_folder)
    assert fingerprint(other) == expected
    seen = {expected}
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        for name, parameter in getattr(other, part).named_parameters():
            before = parameter.data.clone()
            parameter.data += 0.01
            assert fingerprint(other) not in seen, f"{part}.{name}"
            seen.add(fingerprint(other))
            parameter.data.copy_(before)
    assert fingerprint(other) == expected


# ------------------------------------------------------------------------------------------------------- reading


def test_samples_do_not_depend_on_the_order_of_reading(pristine):
    in_order = TeacherCache(pristine)
    expected = [in_order[i] for i in range(len(in_order))]
    shuffled = TeacherCache(pristine)
    for i in torch.randperm(len(shuffled), generator=torch.Generator().manual_seed(0)).tolist() * 2:
        assert same_samples(shuffled[i], expected[i])


def test_batches_are_stacked_samples_whatever_the_number_of_workers(pristine):
    cached = TeacherCache(pristine)
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
import os, sys
from pathlib import Path
from utils.datautils import TeacherCache

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024

caches = [TeacherCache(Path(folder)) for folder in sys.argv[1:]]
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
    folders, shape = [], {"steps": 4, "tokens": 256, "channels": 64, "text": 16, "width": 64, "pooled": 64}
    for count in (64, 2048):
        cached = random_cache(tmp_path / str(count), [f"prompt {i}" for i in range(count)], **shape)
        for i in range(1, count):
            os.link(cached.file(0), cached.file(i))
        folders.append(cached.folder)
    assert 2048 * cached.file(0).stat().st_size > 6 * 50e6
    result = run("-c", MEMORY, *folders)
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
@pytest.mark.parametrize(("steps", "early_share"), [(28, 0.9), (28, 0.1), (10, 0.5), (4, 0.9)])
def test_the_first_quarter_of_the_steps_gets_its_share_and_prompts_are_drawn_alike(steps, early_share, window):
    prompts = 600
    sampler = ShuffledSamples(prompts, steps, seed=1, window=window, early_share=early_share)
    order = list(sampler)
    assert len(order) == len(sampler) == prompts * steps and order == list(sampler)
    assert set(Counter(number // steps for number in order).values()) == {steps}
    early = [min(1, max(0, steps / 4 - k)) for k in range(steps)]  # the part of a step that is in the first quarter
    shares = [e / steps * 4 * early_share + (1 - e) / steps / 0.75 * (1 - early_share) for e in early]
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


def test_the_online_teacher_gives_what_a_cache_would_and_draws_each_prompt_once_an_epoch(pipe, tmp_path):
    cached = fill(tmp_path, pipe, batch_size=1)
    calls = []
    online = OnlineTeacher(pipe, "random", PROMPTS, TeacherSettings(**SETTINGS), keep=2)
    assert len(online) == len(cached) and online.prompts == cached.prompts
    handle = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    sampler = ShuffledSamples(len(PROMPTS), STEPS, seed=0, window=2)
    try:
        for epoch in range(2):
            sampler.set_epoch(epoch)
            calls.clear()
            for i in sampler:
                assert same_samples(online[i], cached[i])
                assert len(online.made) <= 2
            assert len(calls) <= len(PROMPTS) * STEPS  # because the window is no larger than what is kept
    finally:
        handle.remove()
