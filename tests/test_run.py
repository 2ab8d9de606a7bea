"""run.py from end to end on a pipeline of random weights: what it writes, what it refuses, what it leaves behind."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file

import run as script
from models.modeling_flux_quant import FluxTransformer2DModel
from models.packing import PackedWriter
from models.utils_quant import init_clip_val, quantize
from utils import walk
from utils.folders import locked

ROOT = Path(__file__).parents[1]
FAST = ("--steps", 2, "--device", "cpu", "--calibration_prompts", 2, "--calibration_stride", 1)


@pytest.fixture
def call(pipeline_folder, tmp_path, start, capsys):
    """call("--w_bits", 2) runs the script in this process, into `folder`; the result has returncode and last line."""

    def call(*flags, model=pipeline_folder, folder=tmp_path / "out", fast=FAST):
        capsys.readouterr()
        code = start(script.main, "run.py", "--model_id", model, "--output_path", folder, *fast, *flags)
        lines = capsys.readouterr().err.strip().splitlines()
        return SimpleNamespace(returncode=code, line=lines[-1] if lines else "", lines=len(lines), folder=folder)

    return call


@pytest.fixture
def copy(pipeline_folder, tmp_path):
    """A copy of the pipeline to spoil."""
    return shutil.copytree(pipeline_folder, tmp_path / "model")


@pytest.mark.parametrize(("method", "bits"), [("threshold", 0), ("mse", 2), ("calibrated", 3)])
def test_it_writes_a_pipeline_that_one_call_loads(method, bits, call, pipeline_folder):
    mode = "fast" if method == "threshold" else "exact"
    result = call(
        "--method", method, "--w_bits", bits, "--num_images", 2, "--mode", mode, "--attention", "_native_math"
    )
    assert result.returncode == 0, result.line
    written = {str(file.relative_to(result.folder / "samples")) for file in (result.folder / "samples").rglob("*.png")}
    names = ("full", f"bits_{bits}")
    assert written == {"grid.png"} | {f"{name}/sample_00{i}.png" for name in names for i in range(2)}
    pipe = FluxPipeline.from_pretrained(result.folder)
    assert pipe.transformer.config.w_bits == bits and pipe.transformer.config.packed
    teacher = FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer")
    quantized = {n for n, _ in pipe.transformer.named_parameters() if n.endswith("weight_codes")}
    assert len(quantized) == 20
    for name, parameter in teacher.named_parameters():
        stem, _, kind = name.rpartition(".")
        found = getattr(pipe.transformer.get_submodule(stem), kind)
        if f"{stem}.weight_codes" not in quantized:
            assert torch.equal(found, parameter), name
        elif kind == "weight" and method == "mse":
            assert torch.equal(found, quantize(parameter, init_clip_val(parameter, bits), bits)), name

    metrics = json.loads((result.folder / "metrics.json").read_text())
    before, after = (
        sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
        for folder in (pipeline_folder, result.folder)
    )
    assert (metrics["bytes_before"], metrics["bytes_after"]) == (before, after)
    assert sum(row["layers"] for row in metrics["layers"].values()) == len(quantized)
    assert (metrics["mode"], metrics["attention"]) == (mode, "_native_math")
    assert 10**8 < metrics["peak_rss_bytes"] < 10**11
    assert metrics["gb_per_second"] == pytest.approx(before / metrics["seconds"] / 1e9, rel=1, abs=1e-3)
    assert (metrics["torch"], metrics["device"][-9:]) == (torch.__version__, "CPU cores")


def test_the_published_flags_and_prompts_of_ones_own(call, tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps(["a red star", "two rings", "a moon"]))
    result = call("--method", "threshold", "--threshold_ratio", 0.05, "--num_images", 2, "--seed", 1,
                  "--prompts_json", tmp_path / "prompts.json")  # fmt: skip
    assert result.returncode == 0, result.line
    assert len(list((result.folder / "samples/full").glob("*.png"))) == 2


def test_names_that_every_script_takes(tmp_path):
    line = "--model m --num_inference_steps 3 --output_dir o --prompts p --dtype float16 --num_images 2 --seed 1"
    args = script.parse_args([*line.split(), "--resolution", "64", "--device", "cpu"])
    assert (args.model_id, args.steps, str(args.output_path), args.prompts) == ("m", 3, "o", "p")
    args = script.parse_args("--model_id m --steps 3 --output_path o --prompts_json p --device cpu".split())
    assert (args.model_id, args.steps, str(args.output_path), args.prompts_json) == ("m", 3, "o", "p")


@pytest.mark.parametrize("content", ['"abc"', '[["a"]]', '{"a": 1}', "7"])
def test_json_that_is_no_list_of_prompts(content, call, tmp_path):
    (tmp_path / "prompts").write_text(content)
    result = call("--method", "threshold", "--prompts_json", tmp_path / "prompts")
    assert result.returncode == 1 and "expected a JSON list of strings, one for each prompt" in result.line
    assert not result.folder.exists()


def test_the_teacher_is_remembered_wherever_one_is(call, pipeline_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(pipeline_folder.parent)
    result = call("--method", "mse", "--num_images", 0, model=pipeline_folder.name)
    assert json.loads((result.folder / "metrics.json").read_text())["model"] == str(pipeline_folder.resolve())
    assert script.lasting_name("black-forest-labs/FLUX.1-dev") == "black-forest-labs/FLUX.1-dev"
    assert script.lasting_name(str(script.ROOT / "assets" / "tiny-flux")) == "assets/tiny-flux"


@pytest.mark.parametrize("kind", ["there already", "link", "."])
def test_it_writes_within_a_folder_that_is_there(kind, call, monkeypatch, tmp_path):
    """As at a mount point, beside which nothing may be written."""
    place = tmp_path / "beside" / "place"
    place.mkdir(parents=True)
    folder = {"there already": place, "link": tmp_path / "link", ".": Path(".")}[kind]
    if kind == "link":
        folder.symlink_to(place)
    monkeypatch.chdir(place)
    written, mkdir = [], Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda path, *how, **more: written.append(path) or mkdir(path, *how, **more))
    inode = place.stat().st_ino
    result = call("--method", "mse", "--num_images", 1, folder=folder)
    assert result.returncode == 0, result.line
    assert place.stat().st_ino == inode and [path.name for path in place.parent.iterdir()] == ["place"]
    assert all(path.resolve().is_relative_to(place) for path in written)
    assert FluxPipeline.from_pretrained(place).transformer.config.packed
    assert not [path.name for path in place.iterdir() if path.name.startswith(".flux158-")]


def test_two_at_once_in_one_folder(call, tmp_path):
    with locked(tmp_path / "out"):
        result = call("--method", "mse", "--num_images", 0)
        assert result.returncode == 1 and f"out: process {os.getpid()} is writing there" in result.line
    assert call("--method", "mse", "--num_images", 0).returncode == 0


def test_the_users_own_folders_beside_it_are_left_alone(call, tmp_path):
    for name in ("out.tmp", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("mine")
    assert call("--method", "mse", "--num_images", 0).returncode == 0
    assert all((tmp_path / name / "thesis.tex").read_text() == "mine" for name in ("out.tmp", "out.partial"))


def test_all_files_are_as_readable(call):
    folder = call("--method", "threshold", "--num_images", 0).folder
    assert len({file.stat().st_mode & 0o777 for file in folder.rglob("*") if file.is_file()}) == 1


@pytest.mark.parametrize(("pixels", "prompts"), [(64, 5), (80, 3)])
def test_large_pictures_need_fewer_of_them(call, monkeypatch, pixels, prompts):
    for name, value in (("MANY_PIXELS", 64), ("MANY_PROMPTS", 5), ("FEW_PROMPTS", 3)):
        monkeypatch.setattr(script, name, value)
    given = []

    def calibrate(model, calls, weights, *args, **kwargs):
        given.append((calls, weights))
        raise ValueError("that is all")

    monkeypatch.setattr(script, "calibrate", calibrate)
    result = call("--num_images", 0, "--resolution", pixels, "--batch_size", 1, fast=("--steps", 14, "--device", "cpu"))
    assert result.line.endswith("that is all")
    [(calls, weights)] = given
    assert len(calls) == len(weights) == prompts * 7  # every other step
    assert weights[:7] == weights[7:14] and all(weight > 0 for weight in weights)


def test_a_transformer_alone_is_enough_where_nothing_is_drawn(call, copy):
    for part in copy.iterdir():
        if part.is_dir() and part.name != "transformer":
            shutil.rmtree(part)
    assert call("--method", "mse", "--num_images", 0, model=copy).returncode == 0
    refused = call("--num_images", 0, model=copy, folder=copy.parent / "other")
    assert refused.returncode == 1 and f"{copy}: cannot be loaded" in refused.line


@pytest.mark.parametrize("method", ["threshold", "calibrated"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_leaves_no_half_pipeline(call, monkeypatch, tmp_path, method, kind):
    """Of a calibration the finished blocks stay, and the next call goes on from them."""

    def stop(*args):
        raise kind

    monkeypatch.setattr(PackedWriter, "close", stop)
    result = call("--method", method, "--num_images", 0)
    if kind is KeyboardInterrupt:
        assert result.returncode == 130 and result.line.startswith("run.py: interrupted: ")
    else:
        assert result.returncode == 1 and f"{tmp_path / 'out'}: No space left on device; make room" in result.line
    assert [file.name for file in tmp_path.iterdir()] == ["out"] * (method == "calibrated")
    assert not any(file.name != ".flux158-work" for file in (tmp_path / "out").glob("*"))


def test_a_calibration_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(run, call, pipeline_folder, tmp_path):
    """kill -9 while the second block is at work; the teacher is not drawn again."""
    flags = ("--w_bits", 2, "--num_images", 0)
    whole = call(*flags, folder=tmp_path / "whole").folder
    killed = tmp_path / "killed.py"
    killed.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from utils import oneshot, walk\n"
        "treat = oneshot.calibrate_block\n"
        "def killed(block, *rest):\n"
        "    if block.name.startswith('single'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return treat(block, *rest)\n"
        "oneshot.calibrate_block = killed\n"
        "import run\n"
        "run.main()\n"
    )
    words = ("--model_id", pipeline_folder, "--output_path", tmp_path / "out", *FAST, *flags)
    assert run(killed, *words).returncode == -signal.SIGKILL
    kept = tmp_path / "out" / ".flux158-work"
    names = {"manifest.json", "calls.safetensors", "transformer_blocks.0.safetensors"}
    assert {file.name for file in kept.iterdir()} == names

    refused = call("--w_bits", 3, "--num_images", 0)
    assert refused.returncode == 1 and f"{kept}: begun with w_bits=2, now w_bits=3; delete it" in refused.line

    before = {name: (kept / name).stat().st_mtime_ns for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "record_calls", None)
        patch.setattr(script, "remove_work", lambda args: None)
        assert call(*flags).returncode == 0
    assert {name: (kept / name).stat().st_mtime_ns for name in names} == before
    [one], [other] = ((folder / "transformer").glob("*.safetensors") for folder in (whole, tmp_path / "out"))
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    figures = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, tmp_path / "out")]
    assert figures[0]["layers"] == figures[1]["layers"] and figures[1]["fell_back"] == {}


BLOCKWISE = ("--method", "blockwise", "--w_bits", 2, "--num_images", 0, "--block_steps", 3, "--block_batch_size", 2,
             "--lookahead", 1)  # fmt: skip
DRAW_NONE = ("--num_images", 0)
CALLS = "the teacher draws the calibration prompts"


def test_blockwise_trains_norms_along_and_goes_on_from_the_round_before(call, pipeline_folder, tmp_path, monkeypatch):
    """Two rounds: the second one starts where one round ends. Without a step, nothing but the codes changes."""
    kept = tmp_path / "out" / ".flux158-work"
    with monkeypatch.context() as patch:
        patch.setattr(script, "remove_work", lambda args: None)
        result = call(*BLOCKWISE, "--block_rounds", 2, "--activations_on_disk")
    assert result.returncode == 0, result.line
    once = call(*BLOCKWISE, folder=tmp_path / "once")
    assert once.returncode == 0 and not (tmp_path / "once" / ".flux158-work").exists()
    names = {"manifest.json", "transformer_blocks.0.safetensors", "single_transformer_blocks.0.safetensors"}
    assert {file.name for file in (kept / "round_1").iterdir()} == names
    [single] = (once.folder / "transformer").glob("*.safetensors")
    first, single = load_file(kept / "transformer_blocks.0.safetensors"), load_file(single)
    assert all(torch.equal(single[name], tensor) for name, tensor in first.items())

    teacher = FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer")
    student = FluxPipeline.from_pretrained(result.folder).transformer
    name = "transformer_blocks.0.attn.norm_q.weight"
    assert not torch.equal(student.get_parameter(name), teacher.get_parameter(name))
    second = load_file(kept / "round_1" / "transformer_blocks.0.safetensors")
    assert torch.equal(student.get_parameter(name), second[name]) and not torch.equal(second[name], first[name])
    settings = json.loads((result.folder / "metrics.json").read_text())["blockwise"]
    assert (settings["steps"], settings["batch_size"], settings["lookahead"]) == (3, 2, 1)


def test_large_pictures_are_trained_on_in_smaller_batches(call, monkeypatch):
    monkeypatch.setattr(script, "MANY_PIXELS", 64)
    result = call("--method", "blockwise", "--num_images", 0, "--block_steps", 1, "--block_weigh_channels")
    assert result.returncode == 0, result.line
    settings = json.loads((result.folder / "metrics.json").read_text())["blockwise"]
    found = {name: settings[name] for name in ("batch_size", "micro_batch_size", "checkpointing", "lookahead", "steps")}
    assert found == {"batch_size": 16, "micro_batch_size": 2, "checkpointing": True, "lookahead": 2, "steps": 1}


@pytest.mark.parametrize(
    ("place", "doing", "advice", "flags"),
    [
        ("load_pipeline", "the pipeline is loaded", "try --method mse --num_images 0", ()),
        ("generate_images", "pictures are drawn (teacher)", "try a smaller --batch_size", ()),
        ("generate_images", "pictures are drawn (teacher)", "try a smaller --resolution", ("--batch_size", 1)),
        ("stream", "weights are rounded", "try --device cpu", ("--method", "mse", "--num_images", 0)),
        ("record_calls", CALLS, "try a smaller --batch_size, or --method mse", DRAW_NONE),
        ("calibrate", "blocks are quantized", "try a smaller --resolution, or --method mse", DRAW_NONE),
        ("calibrate", "blocks are quantized", "try a higher --memory_gib, or", (*DRAW_NONE, "--memory_gib", 24)),
        ("train_block", "blocks are quantized", "go on with a lower --block_micro_batch_size, or", BLOCKWISE),
    ],
)
def test_too_little_device_memory_is_one_line_that_says_what_to_do(place, doing, advice, flags, call, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(script, place, full)
        result = call(*flags)
    expected = rf"run\.py: error: out of memory while {re.escape(doing)} \(peak [\d.]+ GiB of host memory\): {advice}"
    assert result.returncode == 1 and re.match(expected, result.line), result.line
    if place == "train_block":  # the same training goes on, as it says
        assert call(*flags, "--block_micro_batch_size", 1).returncode == 0


def test_what_block_wise_training_was_begun_with_is_kept_to(call, monkeypatch, tmp_path):
    def stop(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(script, "train_block", stop)
        assert call(*BLOCKWISE).returncode == 1
    refused = call(*BLOCKWISE, "--block_learning_rate", 1e-3)
    assert refused.returncode == 1
    assert f"{tmp_path}/out/.flux158-work: begun with learning_rate=0.0005, now learning_rate=0.001" in refused.line


def test_a_folder_that_is_not_empty_is_left_alone(call, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    result = call("--method", "mse", "--num_images", 0)
    assert result.returncode == 1 and result.line.endswith("exists and is not empty; choose another")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_disk_that_is_too_small_is_noticed_before_any_work(call, copy, monkeypatch):
    """Where the transformer packed and the rest of the pipeline do not fit; just enough is enough."""
    needed = script.packed_bytes(copy / "transformer", 0)
    needed += sum(f.stat().st_size for f in copy.rglob("*.safetensors") if f.parent.name != "transformer")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    result = call("--method", "mse", "--num_images", 0)
    assert result.returncode == 1 and result.line.endswith("make room or choose another folder")
    assert not result.folder.exists()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed))
    result = call("--method", "mse", "--num_images", 0)
    assert result.returncode == 0
    weights = sum(
        t.nbytes for f in (result.folder / "transformer").glob("*.safetensors") for t in load_file(f).values()
    )
    assert weights == script.packed_bytes(copy / "transformer", 0)


@pytest.mark.parametrize(
    "flags",
    [
        DRAW_NONE,
        (*BLOCKWISE, "--block_rounds", 2, "--calibration_prompts", 5, "--batch_size", 2, "--steps", 8),
        (*BLOCKWISE, "--activations_on_disk"),
    ],
    ids=["calibrated", "two rounds", "activations"],
)
def test_room_is_asked_for_what_a_killed_run_goes_on_from(flags, call, pipeline_folder, monkeypatch, tmp_path):
    """Before anything is drawn; as much as it takes at most, and when the run goes on, what is still to come. (What
    stands outside the blocks is counted with every round, though it is not written: little in a large model.)"""
    kept, asked, hidden = tmp_path / "out" / ".flux158-work", [], []
    monkeypatch.setattr(script, "remove_work", lambda args: None)
    monkeypatch.setattr(script, "check_disks", lambda needs: asked.append({what: size for _, size, what in needs}))
    to_host = walk.Streams.to_host

    def counted(self, tensor):
        hidden.append(tensor.nbytes * (self.folder is not None))
        return to_host(self, tensor)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(walk.Streams, "to_host", counted)
    with monkeypatch.context() as patch:
        patch.setattr(script, "train_block" if "blockwise" in flags else "calibrate", stop)
        assert call(*flags).returncode == 130
    hidden.clear()
    assert call(*flags).returncode == 0
    first, second = (needs["what a killed run goes on from"] for needs in asked if len(needs) == 2)
    taken = sum(t.nbytes for file in kept.rglob("*.safetensors") for t in load_file(file).values())
    calls = sum(t.nbytes for t in load_file(kept / "calls.safetensors").values())
    teacher = FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer")
    outside = sum(p.numel() for name, p in teacher.named_parameters() if "transformer_blocks" not in name)
    outside *= 4 * (2 if "--block_rounds" in flags else 1)
    assert taken + outside + sum(hidden) <= first < 1.2 * (taken + outside) + 1.6 * sum(hidden)  # targets lie there too
    assert first - 2 * calls < second < first - 0.9 * calls


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_what_is_no_full_precision_flux_is_refused_by_name(call, copy, tmp_path):
    quantized = call("--method", "mse", "--num_images", 0, folder=tmp_path / "quantized").folder
    again = call(model=quantized)
    assert again.returncode == 1 and "its transformer is quantized already; give the full-precision" in again.line
    other = call(model=tmp_path)
    assert other.returncode == 1 and f"{tmp_path}: not a pipeline with a transformer" in other.line
    change(copy / "transformer/config.json", _class_name="SD3Transformer2DModel")
    change(copy / "model_index.json", transformer=["diffusers", "SD3Transformer2DModel"])
    result = call(model=copy)
    assert result.returncode == 1
    assert result.line.endswith("its transformer is a SD3Transformer2DModel, expected a FluxTransformer2DModel")
    assert not result.folder.exists()


@pytest.mark.parametrize("fault", ["nan", "missing", "truncated", "shape", "superfluous"])
def test_a_damaged_transformer_is_named_and_nothing_is_left(call, copy, fault):
    [file] = (copy / "transformer").glob("*.safetensors")
    name = "transformer_blocks.0.attn.to_q.weight"
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        tensors = load_file(file)
        if fault == "nan":
            tensors[name][1, 2] = float("nan")
        elif fault == "missing":
            del tensors[name]
        elif fault == "superfluous":
            tensors[name := "transformer_blocks.7.attn.to_q.weight"] = torch.zeros(2, 2)
        else:
            tensors[name] = tensors[name][:-1].contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
    result = call("--method", "threshold", "--num_images", 0, model=copy)
    assert result.returncode == 1 and result.line.startswith("run.py: error: ")
    if fault != "truncated":
        assert name.removesuffix(".weight") in result.line
    assert not result.folder.exists() and not result.folder.with_name("out.tmp").exists()


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (("--model_id", "nowhere"), 1, "nowhere: neither a folder nor"),
        (("--method", "threshold", "--w_bits", 4), 2, "--method threshold is a ternary rule"),
        (("--w_bits", 16), 2, "--w_bits 16: nothing to quantize"),
        (("--attention", "fastest"), 2, "--attention fastest: `backend='fastest'` must be one of"),
        (("--w_bits", 9), 2, "w_bits=9 is not supported"),
        (("--threshold_ratio", 1), 2, "--threshold_ratio must be at least 0 and below 1"),
        (("--num_images", -1), 2, "--num_images must be at least 0, got -1"),
        (("--num_images", 1201), 1, "--num_images 1201: there are 1200 evaluation scenes"),
        (("--resolution", 100), 2, "--resolution must be a multiple of 16, got 100"),
        (("--resolution", 8), 2, "--resolution must be a multiple of 16, got 8"),
        (("--resolution", 0), 2, "--resolution must be at least 16 and at most 8192, got 0"),
        (("--resolution", -16), 2, "--resolution must be at least 16 and at most 8192, got -16"),
        (("--resolution", 65536), 2, "--resolution must be at least 16 and at most 8192, got 65536"),
        (("--guidance_scale", "nan"), 2, "--guidance_scale must be a finite number, got nan"),
        (("--seed", 2**64), 2, "--seed must be at least 0 and at most 4294967295"),
        (("--prompts", "a", "--prompts_json", "b"), 2, "--prompts and --prompts_json: give one of them"),
        (("--nonsense",), 2, "unrecognized arguments: --nonsense"),
        (("--calibration_prompts", 0), 2, "--calibration_prompts must be at least 1"),
        (("--memory_gib", 0), 2, "--memory_gib must be above 0"),
        (("--block_steps", 0), 2, "--block_steps must be at least 1"),
        (("--lookahead", -1), 2, "--lookahead must not be negative"),
        (("--block_learning_rate", 0), 2, "--block_learning_rate must be above 0"),
        (("--block_early_share", 1), 2, "--block_early_share must be above 0 and below 1"),
        (("--device", "abacus"), 2, "--device abacus is not available here"),
        (("--prompts_json", "nowhere.json"), 1, "--prompts_json nowhere.json: cannot be read"),
    ],
)
def test_errors_are_one_line(flags, status, message, call):
    result = call(*flags)
    assert result.returncode == status and message in result.line
    assert status == 1 or result.lines == 1
    assert not result.folder.exists()


def test_it_runs_as_a_script(run, pipeline_folder, tmp_path):
    flags = ("--model_id", pipeline_folder, "--output_path", tmp_path / "out", "--method", "threshold", *FAST)
    made = run("run.py", *flags, "--num_images", 0)
    assert made.returncode == 0, made.stderr
    assert "GB of memory at most" in made.stdout and "weight error" in made.stdout
