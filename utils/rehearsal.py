"""Every documented command, one after the other as a user would run them, on a FLUX of random weights.

    python -m utils.rehearsal --output output/rehearsal --scale small                # on a CPU, in a few minutes
    python -m utils.rehearsal --output /data/rehearsal --model /dev/shm/flux         # FLUX.1-dev's size, on a GPU
    python -m utils.rehearsal --output /data/klein --scale klein                     # FLUX.2-klein-4B's, on a GPU
    python -m utils.rehearsal --output /data/rehearsal --model /dev/shm/flux --only lora_killed lora_resumed
    python -m utils.rehearsal --output /data/rehearsal --list

The first step makes the pipeline (utils/make_random_flux.py): 34 GB in the shapes of FLUX.1-dev or 16 GB in those of
FLUX.2-klein-4B, or a few MB with the same structure. `--model` puts it elsewhere, in memory for instance, or names one
that is there already. STEPS says what is run and what must hold afterwards. Each step's exit status, wall time, peak
memory and written bytes are measured from outside; it writes

    OUTPUT/rehearsal.json    a row a step, after every step; --only replaces the rows of the steps it names, on this
                             machine or, where the file was brought along, on another
    OUTPUT/rehearsal.md      the same as a table
    OUTPUT/logs/STEP.log     what each command printed
    OUTPUT/work/             what the commands wrote; what no later step needs is deleted

GPU memory is that of the whole card, as nvidia-smi shows it, less what was taken before the step began. Host memory is
the proportional set size of all processes of the step, mapped files included, and beside it what of that belongs to no
file. Written is what OUTPUT/work and the pipeline have grown by, at the end and at most. Exit status 1 if a step did
not do what it must.
"""

import utils.interrupt  # noqa: F401 (Ctrl-C is a line from here on)

import argparse
import ctypes
import functools
import glob
import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from utils.utils import ROOT, ArgumentParser, get_logger, run_script

log = get_logger("rehearsal")
SAMPLE_SECONDS = 0.2  # between two looks at memory and disk
SETTLED_BYTES = 2**28  # of a GPU's memory: less than that beyond what was taken before is no process's
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "triton")

# {model} is the pipeline, {work} what the steps share, the rest stands here.
SCALES = {
    "flux": {
        "config": "flux-dev", "images": 2, "steps": 28, "prompts": 4, "max_steps": 10, "save_steps": 5, "rank": 32,
        "all": "--lora_r 0 --optim adamw_torch_8bit",
        "compile": "--torch_compile True", "calibrated": "--memory_gib 24",
        "calibration": 2, "stride": 7, "block_steps": 2,
        "bench": "--resolution 1024 --cpp_wrapper --rounds 5", "training_step": "--config flux-dev", "drawn": "",
    },
    "small": {
        "config": "small", "images": 2, "steps": 4, "prompts": 4, "max_steps": 40, "save_steps": 5, "rank": 4,
        "all": "", "compile": "", "calibration": 2, "stride": 2, "block_steps": 2, "bench": "--rounds 1",
        "calibrated": "--calibration_prompts 2 --calibration_stride 2 --steps 4 --batch_size 1",
        "training_step": "--config small --resolution 128 --batch_sizes 1 2 --steps 1 --warmup 1 --lora_r 4 --eager",
        "drawn": "--images 2 --num_inference_steps 4 --eager",
    },
    "klein": {
        "config": "flux2-klein-4b", "images": 2, "steps": 4, "prompts": 4, "max_steps": 10, "save_steps": 5, "rank": 32,
        "compile": "--torch_compile True", "calibration": 16, "stride": 1, "block_steps": 10, "half": 512,
        "bench": "--resolution 1024 512 --cpp_wrapper --rounds 5",
    },
    "small-klein": {
        "config": "small-klein", "images": 2, "steps": 4, "prompts": 4, "max_steps": 40, "save_steps": 5, "rank": 4,
        "compile": "", "calibration": 2, "stride": 2, "block_steps": 2, "bench": "--rounds 1", "half": 48,
    },
}  # fmt: skip
FLUX, KLEIN = ("flux", "small"), ("klein", "small-klein")


@dataclass(frozen=True)
class Step:
    """A command and what must hold when it has ended. Paths lie under {work}, unless they begin with {model}."""

    name: str
    command: str
    holds: dict[str, tuple[float, float] | None] = field(default_factory=dict)
    """File, folder or pattern that must exist -> the most bytes it may have at a full and at a small scale. Of JSON
    files every number must be finite."""
    says: str = ""  # what its output must hold
    fails: str = ""  # it must end in one line that holds this
    kill: str = ""  # kill -9, once this exists
    gpus: int = 0  # that it needs, at least
    gib: float = 0  # of memory that its GPU must have; on a smaller one it must fail in one line
    peak: float = math.inf  # GiB of a GPU at most, at a full scale
    disk_gb: float = 0  # that must be free, at a full scale
    reads: tuple[str, ...] = ()  # of earlier steps
    makes: str = ""  # it is left out where this exists
    clears: tuple[str, ...] = ()  # before it starts
    drops: tuple[str, ...] = ()  # once it has ended
    reports: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """JSON file -> what to copy from it: names, and numbers of list items, joined by dots."""
    most: dict[str, float] = field(default_factory=dict)  # of what is reported, at a full scale
    agrees: tuple[str, str, str, float] | None = None  # JSON files, a figure in both, its relative difference at most
    scales: tuple[str, ...] = FLUX
    limit: int = 570  # seconds


CACHE = "--teacher_cache {work}/cache --num_train_prompts {prompts} --num_images {images} --num_inference_steps {steps}"
TRAIN = (
    f"{CACHE} --max_steps {{max_steps}} --save_steps {{save_steps}} --eval_steps {{max_steps}} --logging_steps 1 "
    "--output_model_filename student --pack True {compile} "
)


def training(processes: int, name: str, flags: str) -> str:
    """1_run_train.sh, writing to the folder `name`."""
    folders = f"--local_dir {{work}}/{name} --output_dir {{work}}/{name}/train"
    return f"MODEL={{model}} bash 1_run_train.sh {processes} 1 1 {folders} {TRAIN} {flags}"


RUN = "python run.py --model_id {model} --num_images 0 --output_path {work}/"
CALIBRATION = " --calibration_prompts {calibration} --calibration_stride {stride} --steps {steps} --batch_size 1"
CALIBRATED = RUN + "calibrated --method calibrated {calibrated}"
TEST = "python test.py {work}/mse 0 --num_images {images} --steps {steps} --batch_size 1 --output_dir {work}/"
PACKED, PACKED_KLEIN = (2.6e9, 5e6), (1.05e9, 2e6)
LORA = "--lora_r {rank} --lora_alpha {rank}"
FSDP = "{all} --fsdp full_shard"
# Of its rows, which are plain linears and ours, each at batch 1 and 4.
LORA_STEP = {"rows.2.ratio": 1.20, "rows.2.peak_gib": 32, "rows.3.ratio": 1.08, "rows.3.peak_gib": 40}
NOT_KEPT = " --save_strategy no"  # a checkpoint of all weights has 71 GB


def trained(folder: str, checkpoints: tuple[float, float] | None = None, packed: tuple = PACKED) -> dict:
    """What a training must leave in `folder`, `checkpoints` being the bytes of those kept and `packed` those of the
    student, and what of its summary is worth a row."""
    holds = {f"{folder}/models/student": packed, f"{folder}/train/summary.json": None}
    holds |= {f"{folder}/train/eval/steps.png": None}
    if checkpoints:
        holds |= {f"{folder}/train/checkpoint-*[05]": checkpoints}
    names = ("seconds_to_first_step", "seconds_of_first_step", "seconds_per_step", "trained_parameters")
    return {"holds": holds, "reports": {f"{folder}/train/summary.json": names}}


def tiny(processes: int, batch: int, name: str, flags: str = "") -> str:
    """1_run_train.sh on tiny-flux, eight samples a step, in float32: in bfloat16 the parts of a batch that the GPUs
    take are rounded each on its own."""
    folders = f"--local_dir {{work}}/{name} --output_dir {{work}}/{name}/train --teacher_cache {{work}}/tiny_cache"
    size = "--num_train_prompts 64 --num_images 8 --max_steps 100 --save_steps 50 --eval_steps 100"
    return (
        f"MODEL=assets/tiny-flux bash 1_run_train.sh {processes} {batch} 1 {folders} {size} --logging_steps 10 "
        f"--dtype float32 --adam_epsilon 1e-4 {flags}"
    ).strip()


def agreeing(name: str) -> dict:
    """That a training ends in the error of tiny_one."""
    files = [f"{folder}/train/summary.json" for folder in (name, "tiny_one")]
    return {"agrees": (*files, "final.eval_nmse", 1e-3), "reports": {files[0]: ("final.eval_nmse",)}}


STEPS = (
    Step(
        "make", "python -m utils.make_random_flux --config {config} --whole --output {model}", makes="{model}",
        holds={"{model}/transformer/*.safetensors": (23.9e9, 17e6), "{model}": (33.9e9, 21e6)}, limit=300,
    ),
    Step(
        "sanity",
        "bash 0_sanity_check.sh {model} --w_bits 0 --pack True --num_images {images} --num_inference_steps {steps} "
        "--local_dir {work}/sanity --output_dir {work}/sanity", clears=("sanity",), drops=("sanity",),
        holds={"sanity/samples/grid.png": None, "sanity/samples/metrics.json": None, "sanity/cache/bits_0": PACKED},
    ),
    Step(
        "cache", "python train.py --input_model_filename {model} --do_train False --output_dir {work}/cache_run "
        + CACHE, clears=("cache", "cache_run"), holds={"cache/**/*.safetensors": (0.2e9, 1e6)},
    ),
    Step(
        "lora_killed", training(1, "lora", LORA), clears=("lora",), reads=("cache",),
        kill="lora/train/checkpoint-{save_steps}", peak=32,
    ),
    Step(
        "lora_resumed", training(1, "lora", LORA), reads=("lora/train/checkpoint-{save_steps}",), drops=("lora",),
        says="going on from", peak=32, **trained("lora", (8e9, 30e6)),
    ),
    Step(
        "lora_start", training(1, "lora_start", LORA + NOT_KEPT + " --max_steps 1 --eval_on_start False"),
        clears=("lora_start",), reads=("cache",), drops=("lora_start",), peak=32, **trained("lora_start"),
        most={"seconds_to_first_step": 90},
    ),
    Step(
        "lora_step", "python -m utils.compare_training_step --output {work}/lora_step {training_step}",
        clears=("lora_step",), holds={"lora_step/training_step.json": None}, most=LORA_STEP,
        reports={"lora_step/training_step.json": (*LORA_STEP, "rows.0.gpu_busy_seconds", "rows.2.gpu_busy_seconds")},
    ),
    Step(
        "all", training(1, "all", "{all}" + NOT_KEPT), clears=("all",), reads=("cache",), drops=("all",), gib=124,
        scales=("flux",), **trained("all"),
    ),
    Step(
        "all_killed", training(1, "all", "{all}"), clears=("all",), reads=("cache",),
        kill="all/train/checkpoint-{save_steps}", gib=124, disk_gb=150,
    ),
    Step(
        "all_resumed", training(1, "all", "{all}"), reads=("all/train/checkpoint-{save_steps}",), drops=("all",),
        says="going on from", gib=124, **trained("all", (150e9, 250e6)),
    ),
    Step(
        "fsdp", training(2, "fsdp", FSDP + NOT_KEPT), clears=("fsdp",), reads=("cache",), drops=("fsdp",), gpus=2,
        peak=76, **trained("fsdp"),
    ),
    Step(
        "fsdp_killed", training(2, "fsdp", FSDP), clears=("fsdp",), reads=("cache",),
        kill="fsdp/train/checkpoint-{save_steps}", gpus=2, peak=76, disk_gb=150,
    ),
    Step(
        "fsdp_resumed", training(2, "fsdp", FSDP), reads=("fsdp/train/checkpoint-{save_steps}",), drops=("fsdp",),
        says="going on from", gpus=2, peak=76, **trained("fsdp", (150e9, 250e6)),
    ),
    Step(
        "ddp", training(2, "ddp", LORA), clears=("ddp",), reads=("cache",), drops=("ddp",), gpus=2,
        **trained("ddp", (8e9, 30e6)),
    ),
    Step(
        "tiny_one", tiny(1, 8, "tiny_one"), clears=("tiny_one", "tiny_cache"), gpus=1, scales=("flux",), limit=200,
        holds={"tiny_one/train/summary.json": None},
        reports={"tiny_one/train/summary.json": ("final.eval_nmse",)},
    ),
    Step(
        "tiny_two", tiny(2, 4, "tiny_two", "--fsdp full_shard"), clears=("tiny_two",), reads=("tiny_one", "tiny_cache"),
        gpus=2, scales=("flux",), limit=200, **agreeing("tiny_two"),
    ),
    Step(
        "tiny_resumed_on_one",
        tiny(1, 8, "tiny_resumed", "--resume_from_checkpoint {work}/tiny_two/train/checkpoint-50"), gpus=1,
        clears=("tiny_resumed",), reads=("tiny_two/train/checkpoint-50", "tiny_one"), scales=("flux",), limit=200,
        drops=("tiny_one", "tiny_two", "tiny_resumed", "tiny_cache"), says="going on from", **agreeing("tiny_resumed"),
    ),
    Step(
        "cache_speed", "python -m utils.compare_cache_speed --model {model} --output {work}/speed {drawn}",
        clears=("speed",), drops=("speed",), holds={"speed/cache_speed.json": None}, limit=300,
        reports={"speed/cache_speed.json": ("ratio", "seconds_per_prompt", "gpu_hours")}, most={"ratio": 1.05},
    ),
    Step(
        "threshold", RUN + "threshold --method threshold", clears=("threshold",), drops=("threshold",),
        holds={"threshold/transformer": PACKED, "threshold/metrics.json": None},
        reports={"threshold/metrics.json": ("seconds", "peak_rss_bytes")},
    ),
    Step(
        "calibrated_killed", CALIBRATED, clears=("calibrated",),
        kill="calibrated/.flux158-work/transformer_blocks.1.safetensors", peak=24,
    ),
    Step(
        "calibrated_resumed", CALIBRATED, reads=("calibrated/.flux158-work",), drops=("calibrated",), peak=24,
        holds={"calibrated/transformer": PACKED, "calibrated/metrics.json": None},
        reports={"calibrated/metrics.json": ("seconds", "peak_rss_bytes")},
    ),
    Step(
        "blockwise", RUN + "blockwise --method blockwise --block_steps {block_steps}" + CALIBRATION,
        clears=("blockwise",), drops=("blockwise",),
        holds={"blockwise/transformer": PACKED, "blockwise/metrics.json": None},
        reports={"blockwise/metrics.json": ("seconds", "peak_rss_bytes")},
    ),
    Step(
        "mse", RUN + "mse --method mse", clears=("mse",),
        holds={"mse/transformer": PACKED, "mse/metrics.json": None, "mse/text_encoder_2/*.safetensors": None},
        reports={"mse/metrics.json": ("seconds", "peak_rss_bytes")},
    ),
    Step("not_twice", RUN + "mse --method mse", reads=("mse",), fails="exists and is not empty"),
    Step("other_bits", "python test.py {work}/mse 4 --output_dir {work}/other", reads=("mse",), fails="w_bits=4"),
    *(
        Step(
            name, TEST + f"{name} {flags}".strip(), clears=(name,), drops=(name,), reads=("mse",), gpus=gpus,
            scales=scales, holds={f"{name}/samples/grid.png": None, f"{name}/metrics.json": None}, peak=peak,
            reports={f"{name}/metrics.json": ("seconds_per_image", "nmse", "resident_bytes")},
        )
        for name, flags, gpus, scales, peak in (
            ("test_exact", "", 0, ("flux", "small"), math.inf),
            ("test_fast", "--mode fast", 0, ("flux", "small"), math.inf),
            ("test_compile", "--compile", 1, ("flux",), math.inf),
            ("test_fast_compile", "--mode fast --compile", 1, ("flux",), math.inf),
            ("test_offload", "--offload", 1, ("flux", "small"), math.inf),
            ("test_sequential", "--no_teacher --offload sequential", 1, ("flux", "small"), 8),
        )
    ),
    Step(
        "bench", "python bench.py --config {model} --output {work}/bench {bench}", clears=("bench",), drops=("bench",),
        holds={"bench/*.json": None, "bench/*.png": None},
    ),
    Step(
        "load", "python bench.py --config {model} --output {work}/load --load --no_steps", clears=("load",),
        drops=("load",), holds={"load/*.json": None}, most={"load.seconds_to_first_step": 8},
        reports={"load/*.json": ("load.seconds", "load.seconds_to_first_step")},
    ),
)  # fmt: skip

STEPS += (
    Step(
        "klein_make", "python -m utils.make_random_flux --config {config} --whole --output {model}", makes="{model}",
        holds={"{model}/transformer/*.safetensors": (7.8e9, 4e6), "{model}": (16.2e9, 8e6)}, limit=300, scales=KLEIN,
    ),
    Step(
        "klein_sanity",
        "bash 0_sanity_check.sh {model} --w_bits 0 --pack True --num_images {images} --local_dir {work}/sanity "
        "--output_dir {work}/sanity", clears=("sanity",), drops=("sanity",), scales=KLEIN,
        holds={"sanity/samples/grid.png": None, "sanity/cache/bits_0": PACKED_KLEIN},
    ),
    *(  # without a flag of its own: what utils/plan.py chooses
        Step(
            f"klein_all{name}", training(1, f"all{name}", flags + NOT_KEPT), clears=(f"all{name}",),
            drops=(f"all{name}",), says="all weights", peak=62, scales=KLEIN,
            **trained(f"all{name}", packed=PACKED_KLEIN),
        )
        for name, flags in (("", ""), ("_half", "--resolution {half} --teacher_cache {work}/cache_half"))
    ),
    Step(
        "klein_lora_killed", training(1, "lora", LORA), clears=("lora",), kill="lora/train/checkpoint-{save_steps}",
        scales=KLEIN,
    ),
    Step(
        "klein_lora_resumed", training(1, "lora", LORA), reads=("lora/train/checkpoint-{save_steps}",), drops=("lora",),
        says="going on from", scales=KLEIN, **trained("lora", (8e9, 30e6), PACKED_KLEIN),
    ),
    *(
        Step(
            f"klein_{method}", RUN + f"{method} --method {method} {flags}".strip(), clears=(method,), drops=drops,
            holds={f"{method}/transformer": PACKED_KLEIN, f"{method}/metrics.json": None}, scales=KLEIN,
            reports={f"{method}/metrics.json": ("seconds", "peak_rss_bytes", "peak_device_bytes")},
        )
        for method, flags, drops in (
            ("calibrated", CALIBRATION.strip(), ("calibrated",)),
            ("blockwise", "--block_steps {block_steps}" + CALIBRATION, ("blockwise",)),
            ("mse", "", ()),
        )
    ),
    *(
        Step(
            f"klein_{name}", TEST + f"{name} --no_teacher {flags}".strip(), clears=(name,), drops=(name,),
            reads=("mse",), gpus=gpus, holds={f"{name}/samples/grid.png": None, f"{name}/metrics.json": None},
            scales=scales, reports={f"{name}/metrics.json": ("seconds_per_image", "resident_bytes")},
        )
        for name, flags, gpus, scales in (
            ("picture", "", 0, KLEIN),
            ("picture_fast", "--mode fast --compile", 1, ("klein",)),
            ("picture_offload", "--offload", 1, KLEIN),
        )
    ),
    Step(
        "klein_test", TEST + "test", clears=("test",), drops=("test",), reads=("mse",), scales=KLEIN,
        holds={"test/metrics.json": None}, reports={"test/metrics.json": ("nmse", "psnr")},
    ),
    Step(
        "klein_bench", "python bench.py --config {model} --output {work}/bench {bench}", clears=("bench",),
        holds={"bench/*.json": None, "bench/*.png": None}, scales=KLEIN,
    ),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------- the machine


class NvmlMemory(ctypes.Structure):
    """nvmlMemory_t, in bytes."""

    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


@functools.cache
def nvml() -> ctypes.CDLL | None:
    """NVIDIA's management library, which comes with the driver; asking it takes no memory of a GPU."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return library if library.nvmlInit_v2() == 0 else None


def look_at_gpus() -> list[tuple[str, int, int]]:
    """Name, bytes of memory and bytes taken of each GPU of the machine, or of those in CUDA_VISIBLE_DEVICES."""
    library, count, found = nvml(), ctypes.c_uint(), []
    if library is None or library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    for index in range(count.value) if visible is None else map(int, filter(None, visible.split(","))):
        handle, name, memory = ctypes.c_void_p(), ctypes.create_string_buffer(96), NvmlMemory()
        library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle))
        library.nvmlDeviceGetName(handle, name, ctypes.c_uint(len(name)))
        library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        found.append((name.value.decode(), memory.total, memory.used))
    return found


def describe_machine() -> dict:
    """GPUs with their GiB, cores, host memory, versions, and the commit ($COMMIT where there is no .git)."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {
        "gpus": [{"name": name, "gib": round(total / 2**30, 1)} for name, total, _ in look_at_gpus()],
        "cores": os.cpu_count(),
        "host_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "versions": found,
        "commit": os.environ.get("COMMIT") or git.stdout.strip() or None,
    }


def process_tree(root: int) -> list[int]:
    """`root` and all processes that it and its children started; without /proc `root` alone."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(file.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(parent, []).append(int(file.parent.name))
    tree = [root]
    for pid in tree:  # grows as it is gone through
        tree += children.get(pid, [])
    return tree


def kill_tree(root: int) -> None:
    for pid in process_tree(root):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def host_bytes(root: int) -> tuple[int, int]:
    """Proportional set size of a process tree, and how much of it belongs to no file."""
    sums = {"Pss:": 0, "Pss_Anon:": 0}
    for pid in process_tree(root):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended meanwhile
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name in sums:
                sums[name] += 1024 * int(value.split()[0])
    return sums["Pss:"], sums["Pss_Anon:"]


def folder_bytes(path: Path) -> int:
    """Of all files in a folder, or of the file."""
    total = 0
    for file in [path, *path.rglob("*")]:
        try:
            total += 0 if file.is_dir() or file.is_symlink() else file.stat().st_size
        except OSError:  # it is gone meanwhile
            continue
    return total


class Watch:
    """Within the block, every moment: peaks of a process tree's memory, of each GPU's, and of some folders' size."""

    def __init__(self, pid: int, *folders: Path):
        self.pid, self.folders = pid, folders
        self.before = self.disk = self.size()
        self.idle = self.gpus = [used for *_, used in look_at_gpus()]
        self.host = self.anonymous = 0
        self.over = threading.Event()
        # Apart, since the host takes seconds to look at where processes map whole checkpoints.
        looks = self.note_gpus, self.note_host
        self.threads = [threading.Thread(target=self.watch, args=(look,)) for look in looks]

    def __enter__(self) -> "Watch":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()
        self.disk = max(self.disk, self.size())

    def size(self) -> int:
        return sum(map(folder_bytes, self.folders))

    def note_gpus(self) -> None:
        self.gpus = [max(pair) for pair in zip(self.gpus, (used for *_, used in look_at_gpus()), strict=True)]

    def note_host(self) -> None:
        host, anonymous = host_bytes(self.pid)
        self.host, self.anonymous = max(self.host, host), max(self.anonymous, anonymous)
        self.disk = max(self.disk, self.size())

    def watch(self, look: Callable[[], None]) -> None:
        took = 0.0
        while not self.over.wait(max(SAMPLE_SECONDS, 10 * took)):  # so that looking slows nothing down
            started = time.monotonic()
            look()
            took = time.monotonic() - started

    def settle(self, seconds: float = 30) -> None:
        """Wait until what the process tree took of the GPUs is free again, so that the next step does not count it as
        taken before: the driver takes seconds for what a killed process held."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if all(used <= idle + SETTLED_BYTES for (*_, used), idle in zip(look_at_gpus(), self.idle, strict=True)):
                return
            time.sleep(SAMPLE_SECONDS)

    def peaks(self) -> dict:
        return {
            "gpu_peak_gib": [round((peak - idle) / 2**30, 2) for peak, idle in zip(self.gpus, self.idle, strict=True)],
            "host_peak_gb": round(self.host / 1e9, 2),
            "host_peak_without_files_gb": round(self.anonymous / 1e9, 2),
            "written_bytes": self.size() - self.before,
            "disk_peak_bytes": self.disk - self.before,
        }


# --------------------------------------------------------------------------------------------------- the steps


class Stage:
    """Where the steps play: their placeholders and folders."""

    def __init__(self, args: argparse.Namespace):
        self.output, self.scale = args.output.absolute(), args.scale
        self.work = self.output / "work"
        self.written = (self.work, args.model.absolute())
        self.words = SCALES[args.scale] | {"model": str(args.model.absolute()), "work": str(self.work)}

    @property
    def small(self) -> bool:
        return self.scale.startswith("small")

    def fill(self, text: str) -> str:
        return text.format(**self.words)

    def find(self, text: str) -> list[Path]:
        """What a path or pattern under {work} stands for."""
        plain = {name: glob.escape(self.words[name]) for name in ("model", "work")}
        pattern = os.path.join(plain["work"], text.format(**self.words | plain))  # an absolute path stays one
        return [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]

    def remove(self, texts: tuple[str, ...]) -> None:
        for text in texts:
            for path in self.find(text):
                shutil.rmtree(path)

    def command(self, step: Step) -> tuple[dict[str, str], list[str]]:
        """Variables and words of a step's command, python being the one that runs this."""
        variables, words = {}, shlex.split(self.fill(step.command))
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        return variables, [sys.executable if word == "python" else word for word in words]


def run_command(step: Step, stage: Stage, logs: Path) -> dict:
    """Run a step's command to its end, its time limit or the moment at which it is to be killed; its row so far."""
    variables, words = stage.command(step)
    environment = os.environ | {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"} | variables
    started, killed = time.monotonic(), ""
    with (logs / f"{step.name}.log").open("w") as output:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            with Watch(process.pid, *stage.written) as watch:
                while process.poll() is None and not killed:
                    time.sleep(0.02)
                    if step.kill and stage.find(step.kill):
                        killed = "as meant"
                    elif time.monotonic() - started > step.limit:
                        killed = f"after {step.limit} s"
        finally:
            if process.poll() is None:
                kill_tree(process.pid)
        status = process.wait()
    seconds = round(time.monotonic() - started, 1)
    watch.settle()
    return {"status": status, "killed": killed, "seconds": seconds} | watch.peaks()


def all_finite(value: object) -> bool:
    """Whether no number in what was read from JSON is NaN or infinite."""
    if isinstance(value, (dict, list)):
        return all(map(all_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def figure(data: object, name: str) -> object:
    """What stands in data read from JSON under names and numbers of list items, joined by dots; None if nothing."""
    for part in name.split("."):
        try:
            data = data[int(part) if isinstance(data, list) else part]
        except (KeyError, IndexError, ValueError, TypeError):
            return None
    return data


def unmet(step: Step, stage: Stage, reports: dict) -> str:
    """Which of a step's promises does not hold, and "" if all do."""
    for text, bounds in step.holds.items():
        paths = stage.find(text)
        if not paths:
            return f"{stage.fill(text)} is missing"
        size, most = sum(map(folder_bytes, paths)), None if bounds is None else bounds[stage.small]
        if most is not None and size > most:
            return f"{stage.fill(text)} has {size / 1e6:,.1f} MB, more than {most / 1e6:,.1f}"
        if text.endswith(".json") and not all_finite(json.loads(paths[0].read_text())):
            return f"{stage.fill(text)}: a number is not finite"
    for name, most in () if stage.small else step.most.items():
        if not isinstance(reports.get(name), (int, float)) or reports[name] > most:
            return f"{name} is {reports.get(name)}, to be at most {most}"
    if step.agrees:
        *files, name, most = step.agrees
        found, wanted = (figure(json.loads((stage.work / file).read_text()), name) for file in files)
        if not found or not wanted or abs(found / wanted - 1) > most:
            return f"{name} is {found}, that of {files[1]} {wanted}: further apart than {most:g} of it"
    return ""


def judge(step: Step, stage: Stage, row: dict, output: str, must_fail: bool) -> str:
    """Why the step did not do what it must; "" if it did."""
    last = output.strip().splitlines()[-1] if output.strip() else ""
    if row["killed"] and row["killed"] != "as meant":
        return f"killed {row['killed']}"
    if step.fails or must_fail:
        one_line = "Traceback" not in output and "error:" in last and step.fails in last
        return "" if row["status"] in (1, 2) and one_line else f"must fail in one line, ended {row['status']}: {last}"
    if step.kill and not row["killed"]:
        return f"was to be killed, ended {row['status']}: {last}"
    if row["status"] and not step.kill:
        return f"ended {row['status']}: {last}"
    if not stage.small and max(row["gpu_peak_gib"], default=0) > step.peak:
        return f"took {max(row['gpu_peak_gib'])} GiB of a GPU, more than {step.peak}"
    if step.kill:
        return ""
    if step.says not in output:
        return f'did not say "{step.says}"'
    return unmet(step, stage, row.get("reports", {}))


def read_reports(step: Step, stage: Stage) -> dict:
    """What the command itself wrote down, of what the step asks for."""
    found = {}
    for text, names in step.reports.items():
        for path in stage.find(text):
            figures = json.loads(path.read_text())
            found |= {name: value for name in names if (value := figure(figures, name)) is not None}
    return found


def play(step: Step, stage: Stage, machine: dict) -> dict:
    """Run one step and return its row."""
    row = {"name": step.name, "command": stage.fill(step.command)}
    gpus = machine["gpus"]
    if len(gpus) < step.gpus:
        return row | {"skipped": f"needs {step.gpus} GPU{'s' * (step.gpus > 1)}"}
    if missing := [stage.fill(text) for text in step.reads if not stage.find(text)]:
        return row | {"skipped": f"needs {missing[0]} of an earlier step"}
    if step.makes and stage.find(step.makes):
        return row | {"skipped": f"{stage.fill(step.makes)} is there already"}
    logs = stage.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    stage.work.mkdir(exist_ok=True)
    stage.remove(step.clears)
    free = shutil.disk_usage(stage.work).free / 1e9
    if not stage.small and free < step.disk_gb:
        return row | {"skipped": f"needs {step.disk_gb} GB of disk, {free:.0f} are free"}
    row |= run_command(step, stage, logs)
    must_fail = bool(not stage.small and gpus and gpus[0]["gib"] < step.gib)
    output = (logs / f"{step.name}.log").read_text(errors="replace")
    must = "fail in one line" if step.fails or must_fail else "be killed" if step.kill else "succeed"
    row |= {"must": must, "reports": read_reports(step, stage)}
    row["problem"] = judge(step, stage, row, output, must_fail)
    row["said"] = output.strip().splitlines()[-1][-300:] if output.strip() else ""
    stage.remove(step.drops)
    return row


# --------------------------------------------------------------------------------------------------- the records


def table(rows: list[dict]) -> str:
    """The rows as a markdown table."""
    lines = [
        "| step | must | did | seconds | GPU GiB | host GB (without files) | written GB (at most) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "skipped" in row:
            lines.append(f"| {row['name']} | | {row['skipped']} | | | | |")
            continue
        did = row["problem"].replace("|", "\\|") or "✓"
        gpu = ", ".join(f"{gib:.1f}" for gib in row["gpu_peak_gib"]) or "-"
        host = f"{row['host_peak_gb']:.1f} ({row['host_peak_without_files_gb']:.1f})"
        written = f"{row['written_bytes'] / 1e9:.2f} ({row['disk_peak_bytes'] / 1e9:.2f})"
        lines.append(f"| {row['name']} | {row['must']} | {did} | {row['seconds']:.0f} | {gpu} | {host} | {written} |")
    return "\n".join(lines) + "\n"


def write_whole(file: Path, text: str) -> None:
    partial = file.with_name(file.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def rehearse(steps: list[Step], stage: Stage, play: Callable[..., dict] = play) -> list[dict]:
    """Run the steps, keep the rows of those that are not run again, write the records after every step."""
    file, machine = stage.output / "rehearsal.json", describe_machine()
    if stage.work.exists() and not file.exists():
        raise ValueError(f"{stage.work}: not of a rehearsal (no {file.name} beside it); choose another --output")
    stage.output.mkdir(parents=True, exist_ok=True)
    rows, machines = {}, []
    if file.exists():
        found = json.loads(file.read_text())
        if found["scale"] != stage.scale:
            raise ValueError(f"{file}: of --scale {found['scale']}; choose another --output for {stage.scale}")
        rows, machines = {row["name"]: row for row in found["rows"]}, found["machines"]
    commit = machine.pop("commit")
    if machine not in machines:
        machines.append(machine)
    where = {"machine": machines.index(machine), "commit": commit}
    played = []

    def record() -> None:
        ordered = [rows[step.name] for step in STEPS if step.name in rows]
        found = {"scale": stage.scale, "machines": machines, "rows": ordered}
        write_whole(file, json.dumps(found, indent=2) + "\n")
        write_whole(file.with_suffix(".md"), table(ordered))

    record()  # from here on the folders are a rehearsal's, to be cleared by it
    for step in steps:
        log.info("%s: %s", step.name, stage.fill(step.command))
        row = rows[step.name] = play(step, stage, machine) | where
        record()
        played.append(row)
        log.info("%s: %s", step.name, row.get("skipped") or row["problem"] or f"{row['seconds']:.0f} s")
    return played


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the records and of what the steps write")
    parser.add_argument("--model", type=Path, help="the pipeline, made where there is none; default: OUTPUT/model")
    parser.add_argument("--scale", choices=SCALES, default="flux",
                        help="flux: 12 B parameters and T5-XXL, klein: 4 B and Qwen3-4B, both on a GPU")  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps, in their order; default: all")
    parser.add_argument("--list", action="store_true", help="print the steps and their commands, and run nothing")
    args = parser.parse_args(argv)
    names = [step.name for step in STEPS if args.scale in step.scales]
    if unknown := [name for name in args.only or () if name not in names]:
        parser.error(f"--only {unknown[0]}: no such step; use one of {', '.join(names)}")
    args.model = args.model or args.output / "model"
    args.steps = [step for step in STEPS if step.name in (args.only or names)]
    return args


def main() -> None:
    args = parse_args()
    stage = Stage(args)
    if args.list:
        for step in args.steps:
            print(f"{step.name:<23} {stage.fill(step.command)}")
        return
    rows = rehearse(args.steps, stage)
    print("\n" + table(rows))
    if problems := [f"{row['name']} {row['problem']}" for row in rows if row.get("problem")]:
        raise ValueError(f"{len(problems)} of {len(rows)} steps did not do what they must; first: {problems[0]}")


if __name__ == "__main__":
    run_script(main)
