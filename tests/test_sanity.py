"""sanity.py from end to end, on a pipeline of random weights: what it writes, what it prints, how it fails."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sanity
from models.modeling_flux_quant import FluxTransformer2DModel
from utils import scenes
from utils.folders import locked

ROOT = Path(__file__).parents[1]
SEED, IMAGES, STEPS, GUIDANCE = 7, 3, 3, 3.5
FLAGS = ["--num_images", IMAGES, "--num_inference_steps", STEPS, "--seed", SEED]
PUBLISHED = """
--local_dir "/tmp/flux/" --output_model_filename "flux-dev" --do_train True --do_eval False --fp16 False --bf16 True
--log_on_each_node False --logging_dir /tmp/output/runs/current --num_train_epochs 1 --per_device_train_batch_size 2
--per_device_eval_batch_size 1 --gradient_accumulation_steps 1 --evaluation_strategy "no" --save_strategy "steps"
--save_steps 2000 --report_to "tensorboard" --save_total_limit 1 --learning_rate 2e-5 --weight_decay 0.
--warmup_ratio 0. --lr_scheduler_type "cosine" --logging_steps 1 --tf32 False --gradient_checkpointing False
--qat True --w_bits 0
"""


def pixels(file: Path) -> np.ndarray:
    """A picture [H, W, 3] as integers that can be subtracted."""
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def finished(run, pipeline_folder, tmp_path_factory):
    """A run at 8, 1.58 and 16 bits: what it printed, its output folder and its table."""
    folder = tmp_path_factory.mktemp("sanity") / "out"
    flags = ["--input_model_filename", pipeline_folder, "--w_bits", 8, 0, 16, "--output_dir", folder, *FLAGS]
    result = run("sanity.py", *flags)
    assert result.returncode == 0, result.stderr
    table = json.loads((folder / "samples" / "metrics.json").read_text())
    rows = {row["name"]: row for row in table["rows"]}
    return SimpleNamespace(stdout=result.stdout, folder=folder, prompts=table["prompts"], rows=rows)


@pytest.fixture(scope="module")
def teacher(pipeline_folder):
    """diffusers' own pipeline: its pictures [N, 128, 128, 3], and inputs and velocity of every call."""
    pipe = diffusers.FluxPipeline.from_pretrained(pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    calls = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    pictures = draw(pipe)
    hook.remove()
    return SimpleNamespace(pipe=pipe, pictures=pictures, calls=calls)


def draw(pipe) -> np.ndarray:
    return np.concatenate(
        [
            pipe(
                prompt, height=128, width=128, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
                max_sequence_length=24, generator=torch.Generator().manual_seed(SEED + i), output_type="np",
            ).images
            for i, prompt in enumerate(scenes.eval_prompts(IMAGES))
        ]
    )  # fmt: skip


@pytest.fixture
def call(start, capsys):
    """call("--w_bits", 9) runs the script in this process; the result has returncode, stdout and stderr."""

    def call(*flags):
        capsys.readouterr()
        code = start(sanity.main, "sanity.py", *flags)
        output = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=output.out, stderr=output.err)

    return call


@pytest.mark.parametrize(
    ("place", "doing"),
    [
        ("load_pipeline", "the models are loaded"),
        ("generate_images", "pictures are drawn (full)"),
        ("load_quantized_model", "the transformer is quantized (1.58 bit)"),
    ],
)
def test_out_of_memory_says_what_was_done(place, doing, call, pipeline_folder, monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(sanity, place, full)
    flags = ["--input_model_filename", pipeline_folder, "--output_dir", tmp_path, "--w_bits", 0, "--num_images", 1]
    result = call(*flags, "--num_inference_steps", 1, "--device", "cpu")
    expected = rf"sanity\.py: error: out of memory while {re.escape(doing)} \(peak [\d.]+ GiB of host memory\): try a "
    assert result.returncode == 1 and re.match(expected, result.stderr.splitlines()[-1]), result.stderr
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ what it writes


def test_files(finished):
    samples = {
        f"samples/{name}/sample_00{i}.png" for name in ("full", "bits_8", "bits_0", "bits_16") for i in range(IMAGES)
    }
    weights = "diffusion_pytorch_model.safetensors"
    cache = {f"cache/bits_{bits}/{file}" for bits in (8, 0, 16) for file in ("config.json", weights)}
    records = {f"{folder}/.flux158.json" for folder in ("samples", "cache/bits_8", "cache/bits_0", "cache/bits_16")}
    assert files(finished.folder) == samples | cache | records | {"samples/grid.png", "samples/metrics.json"}
    modes = {file.stat().st_mode & 0o777 for file in finished.folder.rglob("*") if file.is_file()}
    assert len(modes) == 1  # weights as readable as the rest


def test_prompts_are_the_evaluation_scenes(finished):
    assert finished.prompts == scenes.eval_prompts(IMAGES)
    assert "3 prompts: evaluation scenes of utils/scenes.py; 128 pixels, seed 7" in finished.stdout


def test_full_precision_pictures_are_those_of_diffusers(finished, teacher):
    for i, picture in enumerate(teacher.pictures):
        sample = pixels(finished.folder / f"samples/full/sample_00{i}.png")
        assert sample.shape == (128, 128, 3)
        assert abs(sample - 255 * picture).max() <= 0.6  # half a level, and float noise


def test_16_bits_are_full_precision(finished):
    assert finished.rows["16 bit"]["nmse"] == 0
    assert finished.rows["16 bit"]["psnr"] == 100
    for i in range(IMAGES):
        full, same = (pixels(finished.folder / f"samples/{name}/sample_00{i}.png") for name in ("full", "bits_16"))
        assert (full == same).all()


def test_fewer_bits_are_worse(finished):
    rows = finished.rows
    assert 0 < 100 * rows["8 bit"]["nmse"] < rows["1.58 bit"]["nmse"]
    assert 100 > rows["8 bit"]["psnr"] > 10 + rows["1.58 bit"]["psnr"]


@torch.no_grad()
def test_cache_loads_back_and_has_the_velocities_of_the_table(finished, teacher):
    for bits, name in ((8, "8 bit"), (0, "1.58 bit"), (16, "16 bit")):
        student = FluxTransformer2DModel.from_pretrained(finished.folder / f"cache/bits_{bits}")
        assert student.config.w_bits == bits
        error = energy = 0.0
        for inputs, velocity in teacher.calls:
            error += (student(**inputs)[0].double() - velocity.double()).square().sum().item()
            energy += velocity.double().square().sum().item()
        assert finished.rows[name]["nmse"] == pytest.approx(error / energy, rel=1e-3, abs=1e-12)


def test_psnr_of_the_table(finished, pipeline_folder, teacher):
    student = FluxTransformer2DModel.from_pretrained(finished.folder / "cache/bits_0")
    pipe = diffusers.FluxPipeline.from_pretrained(pipeline_folder, transformer=student)
    pipe.set_progress_bar_config(disable=True)
    errors = np.square(draw(pipe).astype(np.float64) - teacher.pictures).mean(axis=(1, 2, 3))
    assert finished.rows["1.58 bit"]["psnr"] == pytest.approx(np.mean(-10 * np.log10(errors)), rel=1e-3)


def test_sizes_of_the_table(finished, teacher):
    """Counted on diffusers' model: matrices in the blocks are quantized, with one fp32 step size a row."""
    parameters = dict(teacher.pipe.transformer.named_parameters())
    matrices = [p for name, p in parameters.items() if "transformer_blocks." in name and p.ndim == 2]
    quantized, step_sizes = sum(p.numel() for p in matrices), sum(len(p) for p in matrices)
    total = sum(p.numel() for p in parameters.values())
    for name, codes_a_byte in (("8 bit", 1), ("1.58 bit", 5)):
        codes = sum(p.shape[0] * math.ceil(p.shape[1] / codes_a_byte) for p in matrices)
        assert finished.rows[name]["packed_bytes"] == codes + 4 * step_sizes + 2 * (total - quantized)
    assert finished.rows["full"]["packed_bytes"] == finished.rows["16 bit"]["packed_bytes"] == 2 * total
    assert f"transformer with {total:,} parameters, torch.float32 on cpu" in finished.stdout
    share = 100 * quantized / total
    assert f"1.58 bit: {quantized:,} of {total:,} parameters quantized ({share:.1f} %)" in finished.stdout


def test_table_on_screen(finished):
    for name, row in finished.rows.items():
        cells = re.search(rf"^{re.escape(name)}  +(.*)$", finished.stdout, re.MULTILINE)[1].split()
        error, ratio, score, size = (math.nan if cell == "-" else float(cell) for cell in cells)
        assert error == pytest.approx(row.get("nmse", math.nan), abs=1e-5, nan_ok=True)
        assert ratio == pytest.approx(row.get("psnr", math.nan), abs=0.06, nan_ok=True)
        assert score == pytest.approx(row["scene_score"]["mean"], abs=0.006)
        assert size == pytest.approx(row["packed_bytes"] / 1e6, abs=0.06)


def test_grid(finished):
    """Rows are full, 8, 1.58 and 16 bits, columns are prompts; cells are found from the lower right corner."""
    grid = pixels(finished.folder / "samples/grid.png")
    height, width = grid.shape[0] - 4 * 132, grid.shape[1] - 3 * 132
    assert 10 < height < 150 and 10 < width < 150  # prompts above, names to the left
    for y, name in enumerate(("full", "bits_8", "bits_0", "bits_16")):
        for x in range(IMAGES):
            cell = grid[height + 132 * y :, width + 132 * x :][:128, :128]
            assert (cell == pixels(finished.folder / f"samples/{name}/sample_00{x}.png")).all()
    rows = [grid[height + 132 * y :, width:][:128] for y in range(4)]
    assert (rows[0] != rows[2]).any() and (rows[1] != rows[2]).any()


# --------------------------------------------------------------------------------------------- again and otherwise


def test_another_run_through_the_shell_script(finished, pipeline_folder, tmp_path):
    """In the same folder and with fewer pictures: what is there is replaced, and picture 0 is the same."""
    folder = tmp_path / "out"
    shutil.copytree(finished.folder, folder)
    flags = ["--w_bits", 0, "--output_dir", folder, *FLAGS, "--num_images", 1]  # the last one counts
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", ROOT / "0_sanity_check.sh", pipeline_folder, *flags]
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    for name in ("full", "bits_0"):
        assert os.listdir(folder / "samples" / name) == ["sample_000.png"]
        new, old = (pixels(f / "samples" / name / "sample_000.png") for f in (folder, finished.folder))
        assert (new == old).all()
    assert [row["name"] for row in json.loads((folder / "samples/metrics.json").read_text())["rows"]] == [
        "full",
        "1.58 bit",
    ]
    assert not (folder / "samples/bits_8").exists()  # which the table no longer speaks of
    assert pixels(folder / "samples/grid.png").shape < pixels(finished.folder / "samples/grid.png").shape
    assert FluxTransformer2DModel.from_pretrained(folder / "cache/bits_0").config.w_bits == 0
    assert sorted(os.listdir(folder / "cache")) == ["bits_0", "bits_16", "bits_8"]


@pytest.fixture
def shell(tmp_path):
    """shell("0_sanity_check.sh", "model", cwd=…) gives the folder and the words with which the script starts Python."""
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/bash\n[ "$1" = - ] && echo "$0" && exit\nprintf "%s\\n" "$PWD" "$@"\n')
    fake.chmod(0o755)

    def shell(*command, cwd: Path, **environment) -> list[str]:
        variables = os.environ | {"PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}"} | environment
        variables.pop("VIRTUAL_ENV", None)  # or it would be asked instead, where the tests run in the repository's own
        words = ["bash", str(ROOT / command[0]), *map(str, command[1:])]
        result = subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    return shell


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("name", [None, "assets/tiny-flux", "assets/tiny-flux/", str(ROOT / "assets/tiny-flux")])
def test_the_shell_script_knows_tiny_flux_by_any_name(name, shell, tmp_path):
    for cwd in (ROOT, tmp_path):
        folder, script, *words = shell("0_sanity_check.sh", *[name] * (name is not None), cwd=cwd)
        assert Path(folder) == cwd and (cwd / script) == ROOT / "sanity.py"
        assert cwd / value(words, "--trained") == ROOT / "assets/tiny-flux-1.58bit"
        assert cwd / value(words, "--output_dir") == ROOT / "output/sanity"
    assert "--trained" not in shell("0_sanity_check.sh", "black-forest-labs/FLUX.1-dev", cwd=tmp_path)


def test_paths_of_the_shell_scripts_are_the_callers(shell, tmp_path):
    (tmp_path / "mine").mkdir()
    for script in ("0_sanity_check.sh", "1_run_train.sh"):
        model = {"MODEL": "mine/"} if script == "1_run_train.sh" else {}
        words = shell(script, *([] if model else ["mine/"]), cwd=tmp_path, **model)
        assert Path(words[0]) == tmp_path and value(words, "--input_model_filename") == "mine"
    words = shell("1_run_train.sh", cwd=tmp_path, MODEL="assets/tiny-flux/")
    assert value(words, "--num_train_prompts") == "160"  # what a laptop can do
    assert value(words, "--local_dir") == str(ROOT / "output")


@pytest.mark.parametrize("flags", [["--w_bits", "2"], ["--w_bits=2"], ["--w-bits", "2"], ["--w-bits=2", "--pack"]])
def test_a_training_is_named_by_its_bits_however_they_are_given(flags, shell, tmp_path):
    words = shell("1_run_train.sh", 1, 4, 1, *flags, cwd=tmp_path)
    assert value(words, "--output_dir") == str(ROOT / "output/train/tiny-flux-2bit") and words[-len(flags) :] == flags
    words = shell("1_run_train.sh", 1, 4, 1, "--seed", "2", cwd=tmp_path)
    assert value(words, "--output_dir") == str(ROOT / "output/train/tiny-flux-1.58bit")


@pytest.mark.parametrize("packed", [True, False])
def test_trained_student_is_the_last_row(packed, finished, call, pipeline_folder, tmp_path):
    """Here the student is what the first run quantized to 1.58 bits: it draws that row's pictures again."""
    folder = finished.folder / "cache/bits_0"
    if packed:
        student = FluxTransformer2DModel.from_pretrained(folder).pack()
        student.save_pretrained(folder := tmp_path / "student")
    result = call(
        "--input_model_filename", pipeline_folder, "--output_dir", tmp_path, *FLAGS, "--w_bits", 16, "--trained", folder
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "samples/metrics.json").read_text())["rows"]}
    assert list(rows) == ["full", "16 bit", "1.58 bit, trained"]
    row, untrained = rows["1.58 bit, trained"], finished.rows["1.58 bit"]
    assert {**row, "name": 0} == {**untrained, "name": 0}
    if packed:  # what is in 32 bits there would take 16
        tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        whole = sum(t.nbytes for name, t in tensors.items() if name.endswith(("weight_codes", "weight_clip_val")))
        rest = sum(t.nbytes for name, t in tensors.items() if not name.endswith(("weight_codes", "weight_clip_val")))
        assert row["packed_bytes"] == whole + rest / 2
    for index in range(IMAGES):
        new, old = (
            pixels(f / f"sample_00{index}.png")
            for f in (tmp_path / "samples/trained", finished.folder / "samples/bits_0")
        )
        assert (new == old).all()


def test_the_shipped_student_is_far_better_than_untrained():
    """Its card says NMSE 0.034 over 1,200 prompts; untrained, 1.58 bits have 1.13."""
    teacher = diffusers.FluxTransformer2DModel.from_pretrained(ROOT / "assets/tiny-flux/transformer")
    student = FluxTransformer2DModel.from_pretrained(ROOT / "assets/tiny-flux-1.58bit")
    assert (student.config.w_bits, student.config.packed, student.config.quantize_modulation) == (0, 1, True)
    pipe = diffusers.FluxPipeline.from_pretrained(ROOT / "assets/tiny-flux", transformer=teacher)
    pipe.set_progress_bar_config(disable=True)
    errors = []

    def compare(module, args, kwargs, output):
        errors.append((student(**kwargs)[0] - output[0]).square().sum() / output[0].square().sum())

    teacher.register_forward_hook(compare, with_kwargs=True)
    pipe(
        scenes.eval_prompts(4), height=128, width=128, max_sequence_length=24, num_inference_steps=14,
        generator=torch.Generator().manual_seed(0), output_type="latent",
    )  # fmt: skip
    assert len(errors) == 14 and torch.stack(errors).mean() < 0.1


def test_published_command_line(run, pipeline_folder, tmp_path):
    result = run(
        "sanity.py", *shlex.split(PUBLISHED), "--input_model_filename", pipeline_folder,
        "--output_dir", tmp_path, "--num_images", 1, "--num_inference_steps", 1,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "torch.bfloat16" in result.stdout
    assert re.search(r"^1\.58 bit +\d", result.stdout, re.MULTILINE)
    saved = FluxTransformer2DModel.from_pretrained(tmp_path / "cache/bits_0", torch_dtype=torch.bfloat16)
    assert saved.config.w_bits == 0 and saved.dtype == torch.bfloat16


def test_prompts_of_a_file(call, pipeline_folder, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat in a hat\n\n  a dog  \n")
    result = call(
        "--input_model_filename", pipeline_folder, "--prompts", file, "--output_dir", tmp_path / "out",
        "--w_bits", 4, "--num_inference_steps", 1, "--resolution", 64, "--device", "cpu",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    table = json.loads((tmp_path / "out/samples/metrics.json").read_text())
    assert table["prompts"] == ["a cat in a hat", "a dog"]
    assert not any("scene_score" in row for row in table["rows"])
    assert "No scene score" in result.stdout
    assert pixels(tmp_path / "out/samples/bits_4/sample_001.png").shape == (64, 64, 3)


# -------------------------------------------------------------------------------------------------------- errors


def test_unknown_model(run, tmp_path):
    """Without network and in a process of its own: one last line, no traceback, nothing written."""
    result = run("sanity.py", "--input_model_filename", "owner/nothing", "--output_dir", tmp_path / "out")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert re.fullmatch(
        "sanity.py: error: owner/nothing: no such folder.* hub cannot be reached; check the network", last
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--w_bits", 9], "w_bits=9 is not supported"),
        (["--w_bits", 4, "x"], "--w_bits.*invalid int value: 'x'"),
        (["--num_images", 0], "--num_images must be at least 1, got 0"),
        (["--nonsense", 1], "unknown arguments: --nonsense 1"),
        (["--device", "nonsense"], "--device nonsense is not available here: use one of .*cpu"),
        (["--resolution", 100], "--resolution must be a multiple of 16, got 100"),
        (["--guidance_scale", "nan"], "--guidance_scale must be a finite number, got nan"),
        (["--seed", 2**64], "--seed must be at least 0 and at most 4294967295"),
    ],
)
def test_usage_errors(flags, message, call, pipeline_folder, tmp_path):
    result = call("--input_model_filename", pipeline_folder, "--output_dir", tmp_path / "out", *flags)
    assert result.returncode == 2
    assert re.fullmatch(rf"sanity\.py: error: .*{message}.*\n", result.stderr), result.stderr
    assert not (tmp_path / "out").exists()


def test_folders_and_files_that_are_wrong(call, pipeline_folder, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    other = tmp_path / "other/config.json"
    other.parent.mkdir()
    other.write_text(json.dumps({"_class_name": "FluxTransformer2DModel", "w_bits": 0, "in_channels": 32}))
    for flags, message in (
        (["--input_model_filename", "no/such/folder"], "no/such/folder: neither a folder nor a hub id"),
        (["--input_model_filename", pipeline_folder / "vae"], "vae: cannot be loaded .*no file named model_index.json"),
        (["--prompts", tmp_path / "none.txt"], "--prompts .*none.txt: cannot be read"),
        (["--prompts", empty], "--prompts .*empty.txt: no prompts in it; write one a line"),
        (["--num_images", 5000], "5000"),
        (["--trained", other.parent], "other: in_channels=32, but in_channels=16 in .*--input_model_filename"),
        (["--trained", "no/student"], "no/student: neither a transformer nor a pipeline"),
        (["--trained", pipeline_folder / "transformer"], "transformer: w_bits=16 is not quantized; give what train.py"),
    ):
        result = call("--input_model_filename", pipeline_folder, "--output_dir", tmp_path / "out", *flags)
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        assert re.match(rf"sanity\.py: error: .*{message}", result.stderr.splitlines()[-1]), result.stderr
        assert not (tmp_path / "out").exists()


def test_full_disk(call, pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    result = call("--input_model_filename", pipeline_folder, "--output_dir", tmp_path, *FLAGS)
    assert result.returncode == 1
    assert re.search(
        r"cache/bits_0: the transformer at 1.58 bit takes .* GB but only .* GB are free", result.stderr.splitlines()[-1]
    )
    assert not (tmp_path / "cache").exists()


def test_write_that_fails_leaves_no_checkpoint(call, pipeline_folder, tmp_path, monkeypatch):
    def save_pretrained(self, folder):
        (Path(folder) / "config.json").write_text("{}")
        raise OSError("No space left on device")

    monkeypatch.setattr(FluxTransformer2DModel, "save_pretrained", save_pretrained)
    result = call("--input_model_filename", pipeline_folder, "--output_dir", tmp_path, *FLAGS)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        f"sanity.py: error: {tmp_path}/cache/bits_0: No space left on device; make room or choose another folder"
    )
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("w_bits", "lora_r", "pack"),
    [(0, 0, False), (0, 0, True), (3, 0, False), (3, 0, True), (4, 2, False), (16, 0, False), (16, 0, True)],
)
def test_the_room_asked_for_is_what_a_transformer_takes(pack, w_bits, lora_r, pipeline_folder, tmp_path):
    args = SimpleNamespace(lora_r=lora_r, pack=pack, quantize_modulation=True)
    plain = diffusers.FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer")
    settings = {"w_bits": w_bits, "lora_r": lora_r}
    model = FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer", **settings)
    (model.pack() if pack and w_bits < 16 else model).save_pretrained(tmp_path)
    saved = sum(t.nbytes for file in tmp_path.glob("*.safetensors") for t in load_file(file).values())
    assert sanity.saved_bytes(plain, args, w_bits, torch.float32) == saved


def test_two_runs_in_one_folder(call, pipeline_folder, tmp_path):
    with locked(tmp_path / "out"):
        result = call("--model", pipeline_folder, "--output_dir", tmp_path / "out", *FLAGS)
    assert result.returncode == 1 and f"out: process {os.getpid()} is writing there" in result.stderr
    assert result.stderr.count("\n") == 1


def test_what_is_the_users_is_noticed_before_anything_is_drawn(call, pipeline_folder, tmp_path):
    for name in ("samples/mine.png", "cache/bits_0/model.safetensors"):
        file = tmp_path / name.partition("/")[0] / "out" / name
        file.parent.mkdir(parents=True)
        file.write_text("mine")
        result = call("--model", pipeline_folder, "--output_dir", tmp_path / name.partition("/")[0] / "out", *FLAGS)
        assert result.returncode == 1 and "is not this program's; move it" in result.stderr
        assert "Loading" not in result.stderr and file.read_text() == "mine"


def test_ctrl_c_is_one_line(call, pipeline_folder, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sanity, "generate_images", stop)
    result = call("--model", pipeline_folder, "--output_dir", tmp_path / "out", *FLAGS)
    assert result.returncode == 130 and not (tmp_path / "out").exists()
    last = result.stderr.splitlines()[-1]
    assert last == "sanity.py: interrupted: nothing unfinished is left; the same command starts again"


def test_help_is_about_this_script(call):
    text = call("--help").stdout
    assert len(text.splitlines()) < 90 and "OUTPUT_DIR/samples/grid.png" in text and "--lora_r" in text
