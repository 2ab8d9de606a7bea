"""test.py from end to end on a pipeline of random weights: every kind of checkpoint, what it measures, what it refuses.

References: the velocities and pictures of diffusers' own pipeline, and the sizes of files.
"""

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import run as run_py
import train as train_py
from models.modeling_flux_quant import FluxTransformer2DModel
from utils.folders import locked
from utils.sampling import generate_images, record_velocities

# Under its own name it would hide Python's package `test`.
spec = importlib.util.spec_from_file_location("test_script", Path(__file__).parents[1] / "test.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

STEPS, SEED = 2, 5
KINDS = ("sanity", "trainer", "trained", "packed", "pipeline")


@pytest.fixture(scope="module")
def checkpoints(pipeline_folder, tmp_path_factory, start) -> dict[str, Path]:
    """A ternary checkpoint of each of KINDS, made the way the project makes it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer", w_bits=0)
    model.save_pretrained(folder / "cache" / "bits_0")
    model.pack().save_pretrained(folder / "packed")
    flags = ["--model_id", pipeline_folder, "--output_path", folder / "oneshot", "--method", "mse"]
    assert start(run_py.main, "run.py", *flags, "--num_images", 0, "--device", "cpu") == 0
    flags = ["--input_model_filename", pipeline_folder, "--output_dir", folder / "run", "--local_dir", folder]
    flags += "--output_model_filename student --device cpu --resolution 64 --num_train_prompts 2 --num_images 1".split()
    flags += "--num_inference_steps 2 --max_steps 1 --save_steps 1 --report_to none --disable_tqdm True".split()
    assert start(train_py.main, "train.py", *flags, "--per_device_train_batch_size", 2) == 0
    return {
        "sanity": folder / "cache" / "bits_0",
        "trainer": folder / "run" / "checkpoint-1",
        "trained": folder / "models" / "student",
        "packed": folder / "packed",
        "pipeline": folder / "oneshot",
    }


@pytest.fixture
def call(pipeline_folder, tmp_path, start, capsys):
    """call(checkpoint, 0, "--seed", 1) runs test.py; the result has returncode, stdout, stderr's last line, metrics."""

    def call(checkpoint, *words, model=pipeline_folder):
        flags = ["--device", "cpu", "--steps", STEPS, "--seed", SEED, "--output_dir", tmp_path / "test", *words]
        flags += ["--model", model] if model else []
        capsys.readouterr()
        code = start(script.main, "test.py", checkpoint, *flags)
        output = capsys.readouterr()
        lines = output.err.strip().splitlines()
        file = tmp_path / "test" / "metrics.json"
        metrics = json.loads(file.read_text()) if file.exists() else None
        return SimpleNamespace(
            returncode=code, stdout=output.out, line=lines[-1] if lines else "", metrics=metrics,
            folder=tmp_path / "test",
        )  # fmt: skip

    return call


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_checkpoint_is_judged(kind, checkpoints, call, pipeline_folder):
    result = call(checkpoints[kind], 0, "--num_images", 2, "--resolution", 64)
    assert result.returncode == 0, result.line
    metrics = result.metrics
    folder = checkpoints[kind] / "transformer" if kind == "pipeline" else checkpoints[kind]
    assert (metrics["w_bits"], metrics["model"]) == (0, str(pipeline_folder))
    weights = [f for f in folder.glob("*.safetensors") if f.name != "training_state.safetensors"]
    assert metrics["disk_bytes"] == sum(file.stat().st_size for file in weights)
    assert 1.6 <= metrics["bits_per_weight"] < 8  # packed, whether it was or not
    assert len(metrics["nmse_by_step"]) == STEPS and 0 < metrics["nmse"] < 10 and 0 < metrics["psnr"] < 100
    assert {f.name for f in (result.folder / "samples/full").iterdir()} == {"sample_000.png", "sample_001.png"}
    assert "seconds a picture" in result.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_another_bit_width_than_the_checkpoints_is_an_error_that_names_both(kind, checkpoints, call):
    result = call(checkpoints[kind], 4)
    assert result.returncode == 1
    assert result.line.startswith("test.py: error: ")
    assert "w_bits=4" in result.line and "w_bits=0" in result.line
    assert not result.folder.exists()


def test_what_is_measured_is_what_diffusers_draws(checkpoints, call, pipeline_folder):
    """Velocities at the teacher's own states; pictures from the same noise."""
    result = call(checkpoints["packed"], 0, "--num_images", 2, "--batch_size", 2)
    pipe = FluxPipeline.from_pretrained(pipeline_folder)
    prompts = script.pick_prompts(pipe, 2)[0]
    with record_velocities(pipe.transformer) as calls:
        full = generate_images(pipe, prompts, SEED, num_inference_steps=STEPS, batch_size=2)
    student = FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer", w_bits=0)
    with torch.no_grad():
        errors = [(student(**inputs)[0] - v).double().square().sum() for inputs, v in calls]
    energies = [v.double().square().sum() for _, v in calls]
    by_step = [(e / n).item() for e, n in zip(errors, energies, strict=True)]
    assert result.metrics["nmse_by_step"] == pytest.approx(by_step, rel=1e-4)
    assert result.metrics["nmse"] == pytest.approx((sum(errors) / sum(energies)).item(), rel=1e-4)
    drawn = generate_images(
        FluxPipeline(**pipe.components | {"transformer": student}), prompts, SEED, num_inference_steps=STEPS
    )
    ratio = torch.stack([-10 * (a - b).square().mean().log10() for a, b in zip(drawn, full, strict=True)]).mean()
    assert result.metrics["psnr"] == pytest.approx(ratio.item(), abs=0.01)
    for name, images in (("full", full), ("bits_0", drawn)):
        picture = torch.frombuffer(
            bytearray(Image.open(result.folder / "samples" / name / "sample_001.png").tobytes()), dtype=torch.uint8
        )
        expected = (images[1] * 255).permute(1, 2, 0).flatten()
        assert (picture.float() - expected).abs().max() <= 1
    assert "stderr" not in result.metrics["scene_score"]  # of one picture a category
    assert Image.open(result.folder / "samples" / "grid.png").width > 3 * 128  # teacher, checkpoint, difference


def test_attention_by_another_backend_gives_the_same_picture(checkpoints, call):
    flags = ("--num_images", 1, "--resolution", 64)
    own, other = (call(checkpoints["packed"], 0, *flags, *more) for more in ((), ("--attention", "_native_math")))
    assert (own.metrics["attention"], other.metrics["attention"]) == (None, "_native_math")
    assert other.metrics["nmse"] == pytest.approx(own.metrics["nmse"], rel=1e-3)


def test_fast_mode_is_another_computation_of_the_same_picture(checkpoints, call):
    flags = ("--num_images", 1, "--resolution", 64)
    exact, fast = (call(checkpoints["packed"], 0, *flags, "--mode", mode).metrics for mode in ("exact", "fast"))
    assert (exact["mode"], fast["mode"]) == ("exact", "fast")
    assert fast["nmse"] != exact["nmse"] and fast["nmse"] == pytest.approx(exact["nmse"], rel=0.1)
    unpacked = call(checkpoints["sanity"], 0, *flags, "--mode", "fast").metrics  # the same weights, packed on the way
    assert (unpacked["nmse"], unpacked["psnr"]) == (fast["nmse"], fast["psnr"])


def test_compiled_it_draws_the_same_pictures(checkpoints, call, monkeypatch):
    flags, compiled = ("--num_images", 2, "--resolution", 64), []

    def blocks_through_dynamo(transformer):  # inductor would take minutes, and changes no more than last digits
        compiled.append(type(transformer).__module__)
        transformer.compile_repeated_blocks(fullgraph=True, backend="eager")

    monkeypatch.setattr(script, "compile_steps", blocks_through_dynamo)
    plain, found = (call(checkpoints["packed"], 0, *flags, *more).metrics for more in ((), ("--compile",)))
    assert [name.split(".")[0] for name in compiled] == ["diffusers", "models"]  # teacher and checkpoint
    assert found["compile"] and not plain["compile"]
    assert found["nmse"] == pytest.approx(plain["nmse"], rel=1e-4)
    assert found["psnr"] == pytest.approx(plain["psnr"], abs=0.01)


def test_every_size_of_a_batch_is_compiled_before_any_is_timed(checkpoints, call, monkeypatch):
    drawn = []

    def noting(pipe, prompts, *args, **settings):
        drawn.append((settings["desc"] == "compiling", len(prompts)))
        return generate_images(pipe, prompts, *args, **settings)

    monkeypatch.setattr(script, "compile_steps", lambda transformer: None)
    monkeypatch.setattr(script, "generate_images", noting)
    flags = ("--num_images", 3, "--batch_size", 2, "--resolution", 64, "--no_teacher", "--compile")
    assert call(checkpoints["packed"], 0, *flags).returncode == 0
    assert sorted(drawn[:2]) == [(True, 1), (True, 2)] and drawn[2:] == [(False, 3)]


def test_without_the_teacher(checkpoints, call):
    result = call(checkpoints["packed"], 0, "--num_images", 1, "--no_teacher")
    assert result.returncode == 0
    assert not {"nmse", "psnr", "ssim"} & set(result.metrics)
    assert [folder.name for folder in (result.folder / "samples").iterdir() if folder.is_dir()] == ["bits_0"]


def test_the_teacher_is_found_or_asked_for(checkpoints, call, pipeline_folder):
    """run.py's pipeline knows it; anything else is taken for tiny-flux, whose shape this checkpoint has not."""
    flags = ("--num_images", 1, "--resolution", 64)
    assert call(checkpoints["pipeline"], 0, *flags, model=None).metrics["model"] == str(pipeline_folder)
    result = call(checkpoints["packed"], 0, *flags, model=None)
    assert result.returncode == 1
    assert f"{checkpoints['packed']}: " in result.line and "assets/tiny-flux" in result.line
    assert result.line.endswith("name the checkpoint's teacher with --model")


def test_the_teacher_is_remembered_by_the_transformer_of_a_moved_pipeline(
    checkpoints, call, pipeline_folder, tmp_path, monkeypatch
):
    moved = shutil.copytree(checkpoints["pipeline"], tmp_path / "moved")
    monkeypatch.chdir(moved)
    for checkpoint in (moved / "transformer", Path("transformer"), Path(".")):
        assert script.find_teacher(checkpoint) == str(pipeline_folder.resolve())
    metrics = json.loads((moved / "metrics.json").read_text())
    (moved / "metrics.json").write_text(json.dumps(metrics | {"model": "/gone/flux"}))
    result = call(moved, 0, model=None)
    assert result.returncode == 1
    assert result.line.endswith(f"{moved}: was made from /gone/flux, which is gone; name its teacher with --model")
    (moved / "metrics.json").write_text(json.dumps(metrics | {"model": "assets/tiny-flux"}))
    assert Path(script.find_teacher(moved)) == Path(script.__file__).parent / "assets/tiny-flux"


def test_a_checkpoint_is_not_its_own_teacher(checkpoints, call):
    flags = ("--num_images", 1, "--resolution", 64)
    result = call(checkpoints["pipeline"], 0, *flags, model=checkpoints["pipeline"])
    assert result.returncode == 1 and "already quantized; the teacher must be full precision" in result.line
    assert not result.folder.exists()
    alone = call(checkpoints["pipeline"], 0, *flags, "--no_teacher", model=checkpoints["pipeline"])
    assert alone.returncode == 0 and "nmse" not in alone.metrics


def test_bits_are_seen_from_the_checkpoint(checkpoints, call):
    """W_BITS may also stand after the flags, as ever."""
    assert call(checkpoints["packed"], "--num_images", 1, "--resolution", 64).metrics["w_bits"] == 0
    assert script.parse_args(["x", "--num_images", "1", "4"]).w_bits == 4
    assert script.parse_args(["x", "4", "--num_images", "1"]).w_bits == 4
    assert script.parse_args(["x", "--num_images", "1"]).w_bits is None


def test_what_is_the_users_is_left_alone(checkpoints, call, tmp_path):
    """Among it the metrics.json of run.py's pipeline, which remembers the teacher."""
    (tmp_path / "test" / "samples").mkdir(parents=True)
    (tmp_path / "test" / "samples" / "mine.png").write_text("mine")
    assert "samples: holds mine.png, which is not this program's" in call(checkpoints["packed"], 0).line
    copy = shutil.copytree(checkpoints["pipeline"], tmp_path / "pipeline")
    before = (copy / "metrics.json").read_text()
    result = call(copy, 0, "--output_dir", copy, "--num_images", 1, "--resolution", 64)
    assert result.returncode == 1 and "holds a metrics.json of something else" in result.line
    assert (copy / "metrics.json").read_text() == before


def test_pictures_of_another_checkpoint_do_not_stay(checkpoints, call, pipeline_folder, tmp_path):
    four = FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer", w_bits=4)
    four.save_pretrained(tmp_path / "four")
    flags = ("--num_images", 1, "--resolution", 64)
    assert call(tmp_path / "four", *flags).returncode == 0
    result = call(checkpoints["packed"], *flags)
    assert sorted(os.listdir(result.folder / "samples")) == [".flux158.json", "bits_0", "full", "grid.png"]
    assert result.metrics["w_bits"] == 0


def test_what_is_not_finite_is_an_error_and_no_nan_in_json(checkpoints, call, tmp_path):
    spoilt = shutil.copytree(checkpoints["sanity"], tmp_path / "spoilt")
    [file] = spoilt.glob("*.safetensors")
    tensors = load_file(file)
    tensors["proj_out.bias"][:] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    result = call(spoilt, "--num_images", 1, "--resolution", 64)
    assert result.returncode == 1 and "spoilt: its velocities or its teacher's are not finite" in result.line
    assert result.metrics["nmse"] is None and result.metrics["nmse_by_step"][0] is None


def test_ctrl_c_is_one_line(checkpoints, call, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "generate_images", stop)
    result = call(checkpoints["packed"], 0)
    assert result.returncode == 130 and not result.folder.exists()


@pytest.mark.parametrize(
    ("place", "flags", "line"),
    [
        ("load_student", (), "the models are loaded {peak}: try a smaller --batch_size"),
        ("generate_images", (), "the teacher draws, 8 pictures at a time {peak}: try a smaller --batch_size"),
        ("generate_images", ("--no_teacher", "--batch_size", 1), "the checkpoint draws, 1 pictures at a time {peak}: "
         "try a smaller --resolution"),
        ("velocity_nmse", ("--num_images", 1), "velocities are compared {peak}: try a smaller --batch_size"),
        ("learned_scores", ("--num_images", 1), "pictures are compared {peak}: try a smaller --batch_size"),
        ("generate_images", ("--prompt_list", "FILE"), "the checkpoint draws, one picture at a time {peak}: try a "
         "smaller --resolution"),
        ("compile_steps", ("--compile",), "the teacher draws, 8 pictures at a time {peak}: try it without --compile"),
    ],
)  # fmt: skip
def test_out_of_memory_says_what_was_done_and_which_flag_to_change(
    place, flags, line, checkpoints, call, monkeypatch, tmp_path
):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(script, place, full)
    (tmp_path / "prompts.txt").write_text("a red star\n")
    result = call(checkpoints["packed"], *(tmp_path / "prompts.txt" if flag == "FILE" else flag for flag in flags))
    expected = re.escape(f"test.py: error: out of memory while {line}").replace(r"\{peak\}", r"\(peak [\d.]+ GiB.*\)")
    assert result.returncode == 1 and re.match(expected, result.line), result.line


def test_weights_that_are_not_measured_say_so(checkpoints, call, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    result = call(checkpoints["packed"], 0, "--num_images", 1, "--resolution", 64)
    for name in ("lpips", "clip_score"):
        assert result.metrics[name].startswith("not measured: ")


# --------------------------------------------------------------------------------- folders for outside benchmarks


def pictures(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.png")}


@pytest.mark.parametrize("flag", ["--geneval", "--prompt_list"])
def test_benchmark_folders_are_laid_out_and_filled_where_something_is_missing(flag, checkpoints, call, tmp_path):
    items = [{"tag": "single_object", "prompt": "a photo of a bench"}, {"prompt": "zwei Uhren, süß"}]
    if flag == "--prompt_list":
        items = [{"prompt": item["prompt"]} for item in items]
    lines = [json.dumps(item) if flag == "--geneval" else item["prompt"] for item in items]
    (tmp_path / "prompts").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    command = (checkpoints["packed"], 0, flag, tmp_path / "prompts", "--samples_per_prompt", 2, "--resolution", 64)
    assert call(*command).returncode == 0
    folder = tmp_path / "test" / "geneval" / "packed"
    first = pictures(folder)
    expected = [f"{i:05d}/samples/{j:05d}.png" for i in range(2) for j in range(2)]
    assert sorted(first) == expected and len(set(first.values())) == 4
    assert [json.loads((folder / f"{i:05d}" / "metadata.jsonl").read_text()) for i in range(2)] == items
    assert not (tmp_path / "test" / "metrics.json").exists()

    (folder / expected[1]).unlink()
    (folder / "00000" / ".flux158-part-0.png").write_bytes(b"what a killed run leaves")
    kept = (folder / expected[0]).stat().st_mtime_ns
    assert call(*command).returncode == 0
    assert pictures(folder) == first and (folder / expected[0]).stat().st_mtime_ns == kept


@pytest.fixture
def benchmark(checkpoints, call, tmp_path):
    """benchmark(["a star"], "--seed", 1) draws these prompts; the result has returncode, line and pictures."""

    def draw(prompts, *flags, checkpoint="packed"):
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        command = (checkpoints.get(checkpoint, checkpoint), "--prompt_list", tmp_path / "prompts.txt")
        result = call(*command, "--samples_per_prompt", 1, "--resolution", 64, *flags)
        result.pictures = pictures(tmp_path / "test" / "geneval")
        return result

    return draw


def test_pictures_of_other_settings_are_not_passed_off_as_new(benchmark, checkpoints, tmp_path):
    assert benchmark(["a star", "two rings"]).returncode == 0
    before = benchmark(["a star", "two rings"]).pictures
    folder = tmp_path / "test" / "geneval" / "packed"
    for prompts, flags, what in (
        (["a star", "a moon"], [], "prompt 1: found {'prompt': 'two rings'}, asked for {'prompt': 'a moon'}"),
        (["a star"], [], "prompt 1: found {'prompt': 'two rings'}, asked for none"),
        (["a star", "two rings"], ["--seed", 7], f"seed: found {SEED}, asked for 7"),
        (["a star", "two rings"], ["--num_inference_steps", 3], f"steps: found {STEPS}, asked for 3"),
        (["a star", "two rings"], ["--guidance_scale", 1], "guidance_scale: found 3.5, asked for 1.0"),
        (["a star", "two rings"], ["--resolution", 80], "resolution: found 64, asked for 80"),
        (["a star", "two rings"], ["--mode", "fast"], "mode: found exact, asked for fast"),
        (["a star", "two rings"], ["--dtype", "bfloat16"], "dtype: found float32, asked for bfloat16"),
    ):
        result = benchmark(prompts, *flags)
        assert result.returncode == 1 and f"{folder}: its pictures were drawn with another {what}" in result.line
        assert result.pictures == before

    # Another checkpoint of another name goes elsewhere, one of the same name is refused.
    other = shutil.copytree(checkpoints["sanity"], tmp_path / "elsewhere" / "packed")
    [file] = other.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("weight_clip_val"))
    tensors[name] *= 2
    save_file(tensors, file, {"format": "pt"})
    result = benchmark(["a star", "two rings"], checkpoint=other)
    assert result.returncode == 1 and "another weights: found" in result.line
    assert result.pictures == before
    other.rename(other.with_name("better"))
    result = benchmark(["a star", "two rings"], checkpoint=other.with_name("better"))
    assert result.returncode == 0 and sorted(os.listdir(folder.parent)) == ["better", "packed"]

    (folder / "manifest.json").unlink()
    assert "holds pictures but no manifest.json" in benchmark(["a star", "two rings"]).line


def test_more_prompts_and_samples_are_added_to_what_is_there(benchmark):
    """The noise of prompt i, sample j is the same, however many there are."""
    first = benchmark(["a star"]).pictures
    more = benchmark(["a star", "two rings"], "--samples_per_prompt", 3).pictures
    assert len(more) == 6 and len(set(more.values())) == 6 and first.items() <= more.items()
    refused = benchmark(["a star", "two rings"], "--samples_per_prompt", 2)
    assert refused.returncode == 1 and "another samples_per_prompt: found 3, asked for 2" in refused.line


def test_two_at_once_in_one_folder_but_not_of_one_checkpoint_only(benchmark, checkpoints, call, tmp_path):
    with locked(tmp_path / "test" / "geneval" / "packed"):
        refused = benchmark(["a star"])
        assert refused.returncode == 1 and f"process {os.getpid()} is writing there" in refused.line
        assert benchmark(["a star"], checkpoint="trained").returncode == 0
    with locked(tmp_path / "test"):
        assert f"process {os.getpid()} is writing there" in call(checkpoints["packed"], 0).line


@pytest.mark.parametrize(
    ("flag", "content", "message"),
    [
        ("--geneval", b"a photo of a bench", 'cannot be read as JSON lines with a "prompt"'),
        ("--geneval", b'{"tag": "x"}', 'cannot be read as JSON lines with a "prompt"'),
        ("--geneval", b"[1]", 'cannot be read as JSON lines with a "prompt"'),
        ("--geneval", b'{"prompt": 7}', 'cannot be read as JSON lines with a "prompt"'),
        ("--geneval", b"\n", "no prompts in it"),
        ("--geneval", bytes(range(256)) * 2000, "cannot be read as UTF-8 text"),
        ("--prompt_list", b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
        ("--prompt_list", b"\x00" * 500_000, "cannot be read as UTF-8 text"),
        ("--prompt_list", b"", "no prompts in it"),
    ],
)
def test_prompt_files_that_hold_none_are_refused(flag, content, message, checkpoints, call, tmp_path):
    (tmp_path / "prompts").write_bytes(content)
    result = call(checkpoints["packed"], 0, flag, tmp_path / "prompts")
    assert result.returncode == 1 and f"{tmp_path / 'prompts'}: " in result.line and message in result.line
    assert len(result.line) < 400
    assert not result.folder.exists()


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (("--num_images", 0), 2, "--num_images must be at least 1"),
        (("--resolution", 100), 2, "--resolution must be a multiple of 16"),
        (("--resolution", 65536), 2, "--resolution must be at least 16 and at most 8192"),
        (("--guidance_scale", "nan"), 2, "--guidance_scale must be a finite number, got nan"),
        (("--seed", 2**64), 2, "--seed must be at least 0 and at most 4294967295"),
        (("--samples_per_prompt", 101), 2, "--samples_per_prompt must be at most 100"),
        (("--num_images", 1201), 1, "--num_images 1201: there are 1200 evaluation scenes"),
        (("--nonsense",), 2, "unrecognized arguments: --nonsense"),
        (("--geneval", "a", "--prompt_list", "b"), 2, "--geneval and --prompt_list: give one of them"),
        (("--offload",), 2, "--offload needs a GPU"),
        (("--offload", "--compile"), 2, "--offload moves what --compile wants to stay"),
        (("--device", "abacus"), 2, "--device abacus is not available here"),
        (("--attention", "fastest"), 2, "--attention fastest: `backend='fastest'` must be one of"),
        (("--prompts", "nowhere.txt"), 1, "--prompts nowhere.txt: cannot be read"),
        (("--geneval", "nowhere.jsonl"), 1, "nowhere.jsonl: cannot be read"),
        (("--model", "nowhere"), 1, "nowhere: neither a folder nor a hub id"),
    ],
)
def test_errors_are_one_line(flags, status, message, checkpoints, call, pipeline_folder):
    result = call(checkpoints["packed"], 0, *flags, model=None if "--model" in flags else pipeline_folder)
    assert result.returncode == status and message in result.line


def test_a_checkpoint_that_is_none_is_named(call, tmp_path, checkpoints, pipeline_folder):
    assert call(tmp_path / "nowhere", 0).line.endswith("no config.json there); check the path")
    for w_bits in (0, 16):
        plain = call(pipeline_folder, w_bits)
        assert plain.returncode == 1 and f"w_bits=16 is not quantized, asked for w_bits={w_bits}" in plain.line
    broken = shutil.copytree(checkpoints["packed"], tmp_path / "broken")
    [file] = broken.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert "damaged" in call(broken, 0).line


def test_it_runs_as_a_script(run, checkpoints, pipeline_folder, tmp_path):
    flags = ("--model", pipeline_folder, "--num_images", 1, "--steps", 1, "--resolution", 64, "--device", "cpu")
    judged = run("test.py", checkpoints["packed"], 0, *flags, "--output_dir", tmp_path)
    assert judged.returncode == 0, judged.stderr
    assert (tmp_path / "metrics.json").is_file()
