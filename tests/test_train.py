"""train.py and 1_run_train.sh from end to end, on a pipeline of random weights: what they write, how they go on after
an interruption or on two ranks, what they refuse.

Most runs are in this process; those that are killed, of two ranks or through the shell are not.
"""

import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_process_args import PUBLISHED_TRAIN

import run
import train
from models.modeling_flux_quant import FluxTransformer2DModel
from models.utils_quant import QuantizeLinear
from utils import scenes, trainer
from utils.checkpoints import load_student
from utils.compare_recipes import STEP_SHARES
from utils.datautils import ShuffledSamples, Trajectories
from utils.folders import locked
from utils.process_args import process_args
from utils.utils import run_script

ROOT = Path(__file__).parents[1]
PROMPTS, HELD_OUT, STEPS = 4, 2, 4
FLAGS = f"""
--device cpu --resolution 64 --num_train_prompts {PROMPTS} --num_images {HELD_OUT} --num_inference_steps 2
--per_device_train_batch_size 2 --max_steps {STEPS} --logging_steps 1 --save_steps 2 --report_to none
--disable_tqdm True --output_model_filename model
"""
WEIGHTS, PACKED = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-00001-of-00001.safetensors"
FINISHED = ["--ema_decay", 0.5, "--save_steps", 1, "--eval_steps", 3]
RECORD = ".flux158.json"  # of what is in a folder and who wrote it
CHECKPOINT = [RECORD, "config.json", WEIGHTS, "settings.json", "trainer_state.json", "training_state.safetensors"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """--logging_dir goes into the environment; this takes it out again."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """The teacher cache that the runs of this file share; the first of them fills it."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def command(pipeline_folder, cache):
    """command(folder, "--more", …) is a command line that writes to `folder`."""

    def command(folder: Path, *flags) -> list[str]:
        flags = ("--output_dir", folder / "out", "--local_dir", folder / "local", *flags)
        model = ("--input_model_filename", pipeline_folder, "--teacher_cache", cache)
        return ["train.py", *FLAGS.split(), *(str(part) for part in (*model, *flags))]

    return command


def start(argv: list[str]) -> SimpleNamespace:
    """Run train.py in this process; the result has returncode and the logged messages."""
    messages, old = [], sys.argv
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    for name in ("train", "cache"):
        logging.getLogger(name).addHandler(handler)
    sys.argv = argv
    try:
        run_script(train.main)
        code = 0
    except SystemExit as exit:
        code = exit.code
    finally:
        sys.argv = old
        for name in ("train", "cache"):
            logging.getLogger(name).removeHandler(handler)
    return SimpleNamespace(returncode=code, messages=messages)


@pytest.fixture
def call(command, tmp_path, capsys):
    """call("--w_bits", 9) runs train.py in this process, into tmp_path; the result has stdout and stderr too."""

    def call(*flags, folder: Path = tmp_path):
        capsys.readouterr()
        result = start(command(folder, *flags))
        result.stdout, result.stderr = capsys.readouterr()
        result.folder = folder
        return result

    return call


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """A run of four steps with an average: four checkpoints, of which two are kept; the last evaluation is extra."""
    folder = tmp_path_factory.mktemp("finished")
    result = start(command(folder, *FINISHED))
    assert result.returncode == 0
    result.folder = folder
    return result


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step; no step may be there twice."""
    lines = [line for line in metrics(folder) if "loss" in line]
    assert len({line["step"] for line in lines}) == len(lines), lines
    return {line["step"]: line["loss"] for line in lines}


def evaluated(folder: Path) -> list[int]:
    return [line["step"] for line in metrics(folder) if "eval_nmse" in line]


def student(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / "local/models" / name / WEIGHTS)


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest difference of any two weights."""
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


# -------------------------------------------------------------------------------------------------- what it writes


def test_the_documented_files_and_no_others(finished, cache):
    checkpoints = [f"checkpoint-{step}/{file}" for step in (3, 4) for file in CHECKPOINT]
    pictures = [f"eval/{row}/sample_00{i}.png" for row in ("teacher", "step_0", "step_3", "step_4") for i in range(2)]
    pictures += [f"eval/step-{step}.png" for step in (0, 3, 4)]
    others = ["curves.png", "eval/prompts.json", "eval/steps.png", "metrics.jsonl", "summary.json"]
    assert files(finished.folder / "out") == sorted(checkpoints + pictures + others)
    assert files(finished.folder / "local") == [f"models/model/{file}" for file in (RECORD, "config.json", WEIGHTS)]
    *trajectories, manifest = files(cache)
    assert manifest == "manifest.json" and len(trajectories) == PROMPTS + HELD_OUT
    assert all(re.fullmatch("[0-9a-f]{16}.safetensors", name) for name in trajectories)


def test_the_student_is_the_last_checkpoint_and_loads(finished):
    """Also in place of the transformer of a stock pipeline."""
    result, checkpoint = finished.folder / "local/models/model", finished.folder / "out/checkpoint-4"
    for folder in (result, checkpoint):
        model = FluxTransformer2DModel.from_pretrained(folder)
        assert model.config.w_bits == 0 and model.dtype == torch.float32
    assert distance(load_file(result / WEIGHTS), load_file(checkpoint / WEIGHTS)) == 0
    assert distance(load_file(result / WEIGHTS), load_file(finished.folder / "out/checkpoint-3" / WEIGHTS)) > 0


def test_the_packed_student_holds_the_codes_that_were_trained(call, tmp_path):
    """In bfloat16, whose rounding moves weights across thresholds; --pack False says what was trained."""
    for name in ("weights", "packed"):
        flags = ("--bf16", True, "--pack", name == "packed", "--teacher_cache", tmp_path / "cache")
        assert call(*flags, "--output_model_filename", name, "--output_dir", tmp_path / name).returncode == 0
    folders = [tmp_path / "local/models" / name for name in ("weights", "packed")]
    trained, packed = (FluxTransformer2DModel.from_pretrained(folder) for folder in folders)
    rounded = FluxTransformer2DModel.from_pretrained(folders[0], dtype=torch.bfloat16)
    layers = {name: layer for name, layer in trained.named_modules() if isinstance(layer, QuantizeLinear)}
    assert layers
    for name, layer in layers.items():
        assert torch.equal(packed.get_submodule(name).dequantize(), layer.quantized_weight())
    assert any(
        not torch.equal(rounded.get_submodule(name).quantized_weight() == 0, layer.quantized_weight() == 0)
        for name, layer in layers.items()
    )


def test_a_large_model_without_codes_is_not_packed(call, monkeypatch, tmp_path):
    monkeypatch.setattr("utils.checkpoints.LARGE", 1)
    flags = ["--max_steps", 1, "--save_strategy", "no", "--eval_strategy", "no", "--eval_on_start", False]
    assert call(*flags, "--w_bits", 16).returncode == 0
    assert FluxTransformer2DModel.from_pretrained(tmp_path / "local/models/model").config.w_bits == 16


LORA = ["--lora_r", 2, "--lora_alpha", 2, "--bf16", True, "--learning_rate", 0.02]


@pytest.mark.parametrize("freeze", [0, 0.5])
def test_a_lora_leaves_checkpoints_of_what_was_trained(freeze, call, pipeline_folder, tmp_path, monkeypatch):
    """Less than the moments together; from_pretrained, load_student and the packed result agree, bit for bit, although
    weights in bfloat16, LoRA, step sizes and frozen codes come from different places."""
    flags = [*LORA, "--freeze_codes", freeze, "--teacher_cache", tmp_path / "cache"]
    assert call(*flags, "--pack", True).returncode == 0
    folder = tmp_path / "out/checkpoint-4"
    parameters = dict(FluxTransformer2DModel.from_pretrained(folder).named_parameters())
    assert not (folder / WEIGHTS).exists()
    held = load_file(folder / "trained.safetensors")
    in_blocks = {n for n in parameters if n.endswith(".weight") and parameters[n].ndim == 2 and "_blocks." in n}
    assert {name for name in held if "frozen" not in name} == set(parameters) - in_blocks
    assert any("frozen" in name for name in held) == (freeze > 0)
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}

    def searched(*args, **kwargs):
        raise AssertionError("the step sizes are in the checkpoint")

    monkeypatch.setattr("models.utils_quant._two_level_optimum", searched)
    packed = FluxTransformer2DModel.from_pretrained(tmp_path / "local/models/model", dtype=torch.bfloat16)
    student = load_student(folder, torch.bfloat16)
    trained = FluxTransformer2DModel.from_pretrained(folder)
    for name, tensor in packed.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor), name
    for name, layer in trained.named_modules():
        if isinstance(layer, QuantizeLinear):
            assert torch.equal(packed.get_submodule(name).dequantize(), layer.quantized_weight())
    settled = call(*flags, "--pack", False, "--output_model_filename", "whole")
    assert settled.returncode == 0, settled.stderr
    whole = FluxTransformer2DModel.from_pretrained(tmp_path / "local/models/whole")
    for name, layer in whole.named_modules():
        if isinstance(layer, QuantizeLinear):
            assert torch.equal(layer.quantized_weight() == 0, packed.get_submodule(name).dequantize() == 0)


def test_a_lora_goes_on_from_its_checkpoint(call, tmp_path):
    """In its free steps and in those with frozen codes."""
    flags = [*LORA, "--freeze_codes", 0.5, "--max_steps", 8, "--save_steps", 1, "--save_total_limit", 9, "--pack", True]
    flags += ["--teacher_cache", tmp_path / "cache"]
    whole = call(*flags, folder=tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    for step in (2, 4, 6):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole/out", folder / "out")
        for later in range(step + 1, 9):
            shutil.rmtree(folder / f"out/checkpoint-{later}")
        again = call(*flags, folder=folder)
        assert again.returncode == 0, again.stderr
        first, second = (load_file(run / "local/models/model" / PACKED) for run in (folder, tmp_path / "whole"))
        assert all(torch.equal(first[name], second[name]) for name in first | second)


@pytest.mark.parametrize("packed", [True, False])
def test_a_lora_that_started_from_a_pipeline_or_a_student_goes_on(packed, call, start, pipeline_folder, tmp_path):
    if packed:
        flags = ["--model_id", pipeline_folder, "--output_path", tmp_path / "given", "--method", "threshold"]
        assert start(run.main, "run.py", *flags, "--num_images", 0, "--device", "cpu") == 0
    else:
        FluxTransformer2DModel.from_pretrained(
            pipeline_folder, subfolder="transformer", w_bits=0, clip_init="max"
        ).save_pretrained(tmp_path / "given")
    flags = ["--lora_r", 2, "--start_from", tmp_path / "given", "--max_steps", 2, "--save_steps", 1, "--pack", True]
    flags += ["--eval_strategy", "no", "--eval_on_start", False]
    assert call(*flags).returncode == 0
    whole = load_file(tmp_path / "local/models/model" / PACKED)
    shutil.rmtree(tmp_path / "out/checkpoint-2")
    again = call(*flags)
    assert again.returncode == 0, again.stderr
    resumed = load_file(tmp_path / "local/models/model" / PACKED)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole | resumed)
    shutil.rmtree(tmp_path / "given")
    with pytest.raises(ValueError, match="base.json: the base .*/given.* cannot be read"):
        FluxTransformer2DModel.from_pretrained(tmp_path / "out/checkpoint-2")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "base.json").write_text("{"), "base.json: cannot be read .*; go on from another checkpoint"),
        (lambda c: edit(c / "base.json", model="/no/where"), "base.json: the base /no/where cannot be read"),
        (lambda c: edit(c / "base.json", sha256="0"), "base.json: .* holds other weights than it was trained on"),
        (lambda c: (c / "trained.safetensors").write_bytes(b"0"), "trained.safetensors: cannot be read"),
    ],
)
def test_a_checkpoint_without_its_base_is_named(damage, message, lora_run, tmp_path):
    shutil.copytree(lora_run, tmp_path / "checkpoint")
    damage(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=message):
        FluxTransformer2DModel.from_pretrained(tmp_path / "checkpoint")


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module")
def lora_run(command, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    flags = ["--lora_r", 2, "--max_steps", 1, "--save_steps", 1, "--eval_strategy", "no", "--eval_on_start", False]
    assert start(command(folder, *flags)).returncode == 0
    return folder / "out/checkpoint-1"


def test_training_starts_from_the_codes_of_a_one_shot(call, start, pipeline_folder, tmp_path):
    """At learning rate 0 they are what comes out; what run.py made without training differs from where a student is."""
    flags = ["--model_id", pipeline_folder, "--output_path", tmp_path / "oneshot", "--method", "threshold"]
    assert start(run.main, "run.py", *flags, "--num_images", 0, "--device", "cpu") == 0
    flags = ["--learning_rate", 0, "--pack", True]
    assert call(*flags, "--start_from", tmp_path / "oneshot", "--output_model_filename", "from").returncode == 0
    assert call(*flags, "--output_dir", tmp_path / "other").returncode == 0
    folders = [tmp_path / "oneshot/transformer", *(tmp_path / "local/models" / name for name in ("from", "model"))]
    given, taken, other = (FluxTransformer2DModel.from_pretrained(folder).state_dict() for folder in folders)
    codes = [name for name in given if "weight_codes" in name]
    assert codes and all(torch.equal(given[name], taken[name]) for name in given)
    assert not all(torch.equal(given[name], other[name]) for name in codes)


def test_metrics_and_summary_say_what_was_reached(finished, pipeline_folder):
    assert list(losses(finished.folder)) == [1, 2, 3, 4] and evaluated(finished.folder) == [0, 3, 4]
    summary = json.loads((finished.folder / "out/summary.json").read_text())
    final = [line for line in metrics(finished.folder) if "eval_nmse" in line]
    for where, line in (("start", final[0]), ("final", final[-1])):
        assert summary[where]["eval_nmse"] == line["eval_nmse"]
        assert summary[where]["eval_psnr"] == line["eval_psnr"]
    assert summary["settings"]["w_bits"] == 0 and summary["settings"]["ema_decay"] == 0.5
    assert summary["steps"] == 4 and summary["world_size"] == 1 and summary["seconds_per_step"] > 0
    assert summary["seconds_to_first_step"] > 0 and summary["seconds_of_first_step"] >= 0
    assert summary["torch"] == torch.__version__ and summary["diffusers"] == diffusers.__version__
    stock = diffusers.FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer")
    parameters = dict(stock.named_parameters())
    alphas = sum(p.shape[0] for name, p in parameters.items() if "transformer_blocks." in name and p.ndim == 2)
    assert summary["trained_parameters"] == sum(p.numel() for p in parameters.values()) + alphas


def test_steps_in_which_torch_compiles_do_not_count_in_a_steps_time(monkeypatch):
    """By a clock, of steps that take 1, 10, 100, … seconds: the first compiles, and the one that freezes the codes."""
    clock = [0.0]
    monkeypatch.setattr(trainer, "time", SimpleNamespace(time=lambda: clock[0]))
    stand_in = SimpleNamespace(first_step={}, compiling=[], aside=0.0, freeze_at=lambda steps: steps - 2)
    watch, state = trainer._Clock(stand_in), SimpleNamespace(max_steps=5)
    for state.global_step in range(5):
        watch.on_step_begin(SimpleNamespace(freeze_codes=0.4), state, None)
        clock[0] += 10**state.global_step
        watch.on_step_end(None, state, None)
    assert stand_in.compiling == [1, 1000] and stand_in.first_step["seconds_of_first_step"] == 1
    stand_in.args, stand_in.settings = SimpleNamespace(device=torch.device("cpu"), world_size=1), {}
    stand_in.state = SimpleNamespace(log_history=[{"eval_nmse": 0.1, "step": 5}], global_step=5)
    stand_in.trained = list
    assert train.summarize(stand_in, 11111, 5, {})["seconds_per_step"] == (10 + 100 + 10000) / 3


def test_the_time_to_the_first_step_is_that_of_the_run_without_evaluation(call, monkeypatch, tmp_path):
    """By a clock of ten seconds to load the student, a hundred to evaluate and a thousand to train a step."""
    clock = [5.0]

    def slowed(where: object, name: str, seconds: float) -> None:
        original = getattr(where, name)

        def slow(*args, **kwargs):
            clock[0] += seconds
            return original(*args, **kwargs)

        monkeypatch.setattr(where, name, slow)

    slowed(train, "load_quantized_model", 10)
    slowed(train.FluxQATTrainer, "_velocity_error", 100)
    slowed(train.FluxQATTrainer, "compute_loss", 1000)
    monkeypatch.setattr(trainer.interrupt, "STARTED", 5.0)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(time=lambda: clock[0]))
    assert call().returncode == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["seconds_to_first_step"], summary["seconds_of_first_step"]) == (10, 1000)
    assert call().returncode == 0  # it has no step to take, and keeps what it knows
    again = json.loads((tmp_path / "out/summary.json").read_text())
    assert all(again[name] == summary[name] for name in train.FIRST_STEP)


def test_metrics_and_summary_are_json_that_other_programs_read(finished):
    """Two steps have no third third: a bare NaN is not JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    for name in ("metrics.jsonl", "summary.json"):
        text = (finished.folder / "out" / name).read_text()
        for part in text.splitlines() if name.endswith("jsonl") else [text]:
            json.loads(part, parse_constant=refuse)


def test_pictures_of_the_steps_have_a_row_each(finished):
    """Cells of 64 pixels, four apart, are found from the lower right corner."""
    strip = Image.open(finished.folder / "out/eval/steps.png").convert("RGB")
    left, top = strip.width - HELD_OUT * 68, strip.height - 4 * 68
    assert 10 < left < 100 and 10 < top < 100
    for y, row in enumerate(("teacher", "step_0", "step_3", "step_4")):
        for x in range(HELD_OUT):
            cell = strip.crop((left + 68 * x, top + 68 * y, left + 68 * x + 64, top + 68 * y + 64))
            sample = Image.open(finished.folder / f"out/eval/{row}/sample_00{x}.png")
            assert cell.tobytes() == sample.tobytes()


def test_the_same_command_again_trains_no_step_and_ends_in_the_same(call, tmp_path):
    """In the middle of an epoch, where Trainer would go on; and without evaluations on the way, the last of them comes
    after the last checkpoint and is not to be there twice."""
    flags = ["--max_steps", 2, "--eval_strategy", "no", "--lr_scheduler_type", "constant"]
    assert call(*flags).returncode == 0
    first = student(tmp_path)
    shutil.rmtree(tmp_path / "local")
    result = call(*flags)
    assert result.returncode == 0, result.stderr
    assert distance(student(tmp_path), first) == 0
    assert list(losses(tmp_path)) == [1, 2]
    assert evaluated(tmp_path) == [0, 2]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["steps"] == 2 and summary["seconds_per_step"] > 0


def test_held_out_prompts_are_never_trained_on(call, tmp_path):
    """And files of prompts are read for both; the last evaluation may be of more pictures than the others."""
    train_file, eval_file = tmp_path / "train.txt", tmp_path / "eval.txt"
    train_file.write_text("a red star\n\n  two moons \na blue ring\n")
    eval_file.write_text("a green cross\ntwo moons\n")
    result = call(
        "--train_prompts", train_file, "--prompts", eval_file, "--teacher_cache", tmp_path / "cache",
        "--num_images", 1, "--num_final_images", 2, "--max_steps", 2, "--save_strategy", "no",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "1 training prompts are held-out prompts too and left out" in result.messages
    assert sorted(cached_prompts(tmp_path / "cache")) == ["a blue ring", "a green cross", "a red star", "two moons"]


def cached_prompts(cache: Path) -> list[str]:
    """For which prompts there are trajectories, as their files say."""
    prompts = []
    for path in cache.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            prompts.append(json.loads(file.metadata()["trajectory"])["prompt"])
    return prompts


@pytest.mark.parametrize("compiled", [False, None])
def test_blocks_that_are_not_to_be_compiled_are_not_for_the_teacher_either(compiled, call, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "fill_cache", lambda *args: asked.append(args[-1]))
    assert call("--do_train", False, *([] if compiled is None else ["--torch_compile", compiled])).returncode == 0
    assert asked == [compiled]


def test_without_training_only_the_teacher_cache_is_filled(call, cache, tmp_path):
    result = call("--do_train", False, "--teacher_cache", tmp_path / "cache")
    assert result.returncode == 0, result.stderr
    assert files(tmp_path / "cache") == files(cache) and not (tmp_path / "out").exists()


def test_steps_are_trained_on_by_their_shares(call, monkeypatch, tmp_path):
    """As compare_steps writes them, with the row of all steps together at the end."""
    rows = [{"nmse": 0.1, "damage": 0.3, "share": 0.75}, {"nmse": 0.1, "damage": 0.1, "share": 0.25}, {"damage": 1}]
    (tmp_path / "steps.json").write_text(json.dumps({"rows": rows}))
    asked, get = {PROMPTS: [], HELD_OUT: []}, Trajectories.__getitem__

    def keep(data, index):
        asked[len(data.prompts)].append(index)
        return get(data, index)

    monkeypatch.setattr(Trajectories, "__getitem__", keep)
    flags = ["--max_steps", PROMPTS, "--eval_strategy", "no", "--save_strategy", "no"]
    result = call(*flags, "--step_shares", tmp_path / "steps.json")
    assert result.returncode == 0, result.stderr
    alike = list(ShuffledSamples(PROMPTS, 2, seed=42))
    assert asked[PROMPTS] == list(ShuffledSamples(PROMPTS, 2, seed=42, shares=[3, 1])) != alike
    settings = json.loads((tmp_path / "out/summary.json").read_text())["settings"]
    assert settings["step_shares"] == [0.75, 0.25] and settings["early_share"] is None


@pytest.mark.parametrize("flags", [[], ["--feature_loss", 0.5, "--lora_r", 2]], ids=["plain", "feature loss and LoRA"])
def test_without_a_teacher_cache_the_losses_are_the_same_and_nothing_is_kept(flags, call, tmp_path):
    """The teacher runs one prompt at a time while training; so does the one that fills the other run's cache."""
    flags = [*flags, "--max_steps", 3, "--save_strategy", "no", "--per_device_eval_batch_size", 1]
    cached = call(*flags, "--teacher_cache", tmp_path / "cache", folder=tmp_path / "cached")
    online = call(*flags, "--teacher_cache", "off", folder=tmp_path / "online")
    assert cached.returncode == online.returncode == 0, online.stderr
    assert losses(online.folder) == pytest.approx(losses(cached.folder), rel=1e-5)
    assert distance(student(online.folder), student(cached.folder)) < 1e-5
    assert not [name for name in os.listdir(tmp_path / "online") if name not in ("out", "local")]
    assert os.listdir(tmp_path / "online/local") == ["models"] and not (ROOT / "off").exists()


def test_published_command_line(command, monkeypatch, tmp_path):
    """In bfloat16, with gradient checkpointing, and without bitsandbytes."""
    find_spec = train.importlib.util.find_spec
    missing = {"bitsandbytes": None}
    monkeypatch.setattr(
        train.importlib.util, "find_spec", lambda name, *rest: missing.get(name, find_spec(name, *rest))
    )
    # What is published comes first, what this test needs after it: the last one counts.
    own = command(tmp_path, "--teacher_cache", tmp_path / "cache", "--logging_dir", tmp_path / "runs")
    result = start(["train.py", *shlex.split(PUBLISHED_TRAIN), *own[1:], "--report_to", "tensorboard"])
    assert result.returncode == 0
    assert "--optim adamw_bnb_8bit needs bitsandbytes, which is not here: using adamw_torch_fused" in result.messages
    settings = json.loads((tmp_path / "out/summary.json").read_text())["settings"]
    expected = {"optim": "adamw_torch_fused", "learning_rate": 2e-5, "weight_decay": 0, "bf16": True, "w_bits": 0}
    assert {name: settings[name] for name in expected} == expected
    assert json.loads((tmp_path / "cache/manifest.json").read_text())["dtype"] == "bfloat16"
    weights = student(tmp_path)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}  # what is trained is no coarser
    assert list(losses(tmp_path)) == [1, 2, 3, 4]
    assert list((tmp_path / "runs").rglob("events.out.tfevents*"))


# ------------------------------------------------------------------------------------------------- interruptions


def test_a_killed_run_goes_on_from_its_checkpoint_and_ends_as_an_undisturbed_one(call, command, begin, tmp_path):
    """Three epochs of four steps, a checkpoint every three; killed once the first is there."""
    flags = ["--ema_decay", 0.9, "--max_steps", 12, "--save_steps", 3, "--eval_steps", 5]
    whole = call(*flags, folder=tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr

    killed = tmp_path / "killed"
    process = begin(*command(killed, *flags))
    deadline = time.monotonic() + 120
    while not (killed / "out/checkpoint-3").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "local").exists()  # it was in the middle

    again = call(*flags, folder=killed)
    assert again.returncode == 0, again.stderr
    assert any(re.match("going on from .*/checkpoint-(3|6|9) ", message) for message in again.messages)
    assert distance(student(killed), student(whole.folder)) < 1e-6
    assert list(losses(killed)) == list(range(1, 13)) and evaluated(killed) == [0, 5, 10, 12]
    assert losses(killed) == pytest.approx(losses(whole.folder), rel=1e-5)
    assert not list(killed.rglob("*.tmp"))


def test_a_run_killed_before_its_first_checkpoint_starts_anew(finished, call, tmp_path):
    """What it had measured is measured again, and not there twice."""
    (tmp_path / "out").mkdir()
    lines = (finished.folder / "out/metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out/metrics.jsonl").write_text("".join(lines[:2]))
    assert evaluated(tmp_path) == [0] and list(losses(tmp_path)) == [1]
    result = call("--max_steps", 2, "--save_strategy", "no")
    assert result.returncode == 0, result.stderr
    assert evaluated(tmp_path) == [0, 2]
    assert list(losses(tmp_path)) == [1, 2]


@pytest.mark.parametrize("tail", ["", '{"step": 5, "lo'], ids=["whole lines", "half a line"])
def test_a_resumed_run_forgets_what_was_measured_after_its_checkpoint(tail, finished, call, tmp_path):
    """Half a line is what a full disk leaves; with room made, the same command is to go on."""
    shutil.copytree(finished.folder / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    with (tmp_path / "out/metrics.jsonl").open("a") as file:
        file.write(tail)
    result = call(*FINISHED)
    assert result.returncode == 0, result.stderr
    assert list(losses(tmp_path)) == [1, 2, 3, 4] and evaluated(tmp_path) == [0, 3, 4]
    assert distance(student(tmp_path), student(finished.folder)) < 1e-6


# ------------------------------------------------------------------------------------------------------ two ranks


def test_two_ranks_do_what_one_does_with_the_double_batch(call, command, cache, run, tmp_path):
    """Losses that agree at every step tell that the ranks share the samples out in the same order.

    ε is large because Adam divides by the size of the gradient: of one that nearly vanishes, it is noise that counts.
    """
    flags = ["--ema_decay", 0.5, "--adam_epsilon", 1e-4, "--save_strategy", "no"]
    one = call(*flags, "--per_device_train_batch_size", 4)
    assert one.returncode == 0, one.stderr
    folder, two_cache = tmp_path / "two", tmp_path / "cache"
    two = run(*command(folder, *flags, "--teacher_cache", two_cache), ranks=2)
    assert two.returncode == 0, two.stderr

    assert losses(folder) == pytest.approx(losses(tmp_path), rel=1e-5)
    assert distance(student(folder), student(tmp_path)) < 1e-5
    first, second = (
        {k: v for k, v in [line for line in metrics(f) if "eval_nmse" in line][-1].items() if "runtime" not in k}
        for f in (tmp_path, folder)
    )
    assert second == pytest.approx(first, rel=1e-4, nan_ok=True)
    assert json.loads((folder / "out/summary.json").read_text())["world_size"] == 2
    assert two.stdout.count("held-out prompts ") == 1  # one table, not one a rank
    for file in files(two_cache):  # the ranks have filled theirs together
        assert (two_cache / file).read_bytes() == (cache / file).read_bytes()


@pytest.mark.parametrize(
    ("from_", "batch", "accumulation", "near", "flags"),
    [
        # bfloat16 rounds the sums over a batch: one rank takes the parts of it that the two take. What remains is the
        # gradient of the embedders, a sum over all blocks: FSDP2 adds them in another order, all else is bit for bit.
        ("two", 2, 2, 5e-3, ["--ema_decay", 0.5, "--bf16", True]),
        ("one", 4, 2, 1e-3, ["--freeze_codes", 0.5, "--gradient_accumulation_steps", 2]),
        ("one", 4, 2, 1e-3, ["--freeze_codes", 0.5, "--gradient_accumulation_steps", 2, "--optim", "adamw_torch_8bit"]),
    ],
    ids=["average in bf16", "frozen codes", "frozen codes in 8 bits"],
)
def test_weights_spread_over_two_ranks_are_trained_as_on_one(
    from_, batch, accumulation, near, flags, call, command, cache, run, tmp_path
):
    """And one goes on from a checkpoint of the other, with codes that are frozen by then."""
    if "adamw_torch_8bit" in flags:
        pytest.importorskip("torchao")
    flags = [*flags, "--adam_epsilon", 1e-4, "--save_steps", 1, "--save_total_limit", 9, "--pack", True]
    flags += ["--num_images", 3, "--per_device_eval_batch_size", 1, "--teacher_cache", tmp_path / "cache"]
    whole = [*flags, "--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation]

    def two(folder: Path):
        result = run("tests/spread_on_cpu.py", *command(folder, *flags, "--fsdp", "full_shard"), ranks=2)
        assert result.returncode == 0, result.stderr
        assert "FSDP2 spreads a FluxSingleTransformerBlock" in result.stdout

    one = call(*whole, folder=tmp_path / "one")
    assert one.returncode == 0, one.stderr
    two(tmp_path / "two")
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / from_ / "out", resumed / "out")
    for step in (4, 3):
        shutil.rmtree(resumed / f"out/checkpoint-{step}")
    if from_ == "one":
        two(resumed)
    else:
        assert call(*whole, folder=resumed).returncode == 0
    expected = [line for line in metrics(tmp_path / "one") if "eval_nmse" in line]
    held = load_file(tmp_path / "one/local/models/model" / PACKED)
    for name in ("two", "resumed"):
        folder = tmp_path / name
        assert losses(folder) == pytest.approx(losses(tmp_path / "one"), rel=near)
        found = [line for line in metrics(folder) if "eval_nmse" in line]
        for line, wanted in zip(found, expected, strict=True):
            assert line["eval_nmse"] == pytest.approx(wanted["eval_nmse"], rel=near)
            assert line["eval_psnr"] == pytest.approx(wanted["eval_psnr"], abs=0.05)
        tensors = load_file(folder / "local/models/model" / PACKED)
        assert tensors.keys() == held.keys()
        for key, tensor in tensors.items():
            assert (tensor.float() - held[key].float()).norm() <= 0.05 * held[key].float().norm(), key


# ------------------------------------------------------------------------------------------------------- refusals


def refusal(result, message: str, code: int = 1) -> None:
    """One line on stderr, besides progress bars, that matches; no more than that."""
    assert result.returncode == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if "error" in line or "Traceback" in line]
    assert len(lines) == 1 and lines[0] == result.stderr.splitlines()[-1], result.stderr
    assert re.match(rf"train\.py: error: .*{message}", lines[0]), lines[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--w_bits", 4], "checkpoint-4: trained with w_bits=0, asked for w_bits=4; give the same settings, or"),
        (["--learning_rate", 1e-4], "trained with learning_rate=0.0005, asked for learning_rate=0.0001"),
        (["--gradient_accumulation_steps", 2], "trained with global_batch_size=2, asked for global_batch_size=4"),
        (["--ema_decay", 0], "trained with ema_decay=0.5, asked for ema_decay=0.0"),
        (["--lora_r", 2], "trained with lora_r=0, asked for lora_r=2"),
        (["--lr_scheduler_kwargs", '{"num_cycles": 1}'], "trained with lr_scheduler_kwargs=None, asked for lr_sched"),
        (["--resume_from_checkpoint", False], "/out holds checkpoints of an earlier run: delete them or choose"),
        (["--resume_from_checkpoint", "no/where"], "--resume_from_checkpoint no/where: no training checkpoint there"),
    ],
)
def test_a_run_of_other_settings_is_not_resumed(flags, message, finished, call):
    before = {name: (finished.folder / name).stat().st_mtime_ns for name in files(finished.folder)}
    refusal(call(*FINISHED, *flags, folder=finished.folder), message)
    assert before == {name: (finished.folder / name).stat().st_mtime_ns for name in files(finished.folder)}


def test_settings_that_contradict_the_checkpoint_are_noticed_before_the_cache_is_filled(finished, call, tmp_path):
    for flags, name in ((["--seed", 1], "seed"), (["--guidance_scale", 2], "teacher_guidance_scale")):
        result = call(*FINISHED, *flags, "--teacher_cache", tmp_path / "new", folder=finished.folder)
        refusal(result, f"checkpoint-4: trained with {name}=")
    assert not (tmp_path / "new").exists()


def test_frozen_codes_are_not_trained_on_in_a_longer_run(call, tmp_path):
    """What they were found from is not in the checkpoint, or stays as it is; before they are frozen, it may go on."""
    flags = ["--freeze_codes", 0.5, "--save_steps", 1, "--eval_strategy", "no", "--eval_on_start", False]
    assert call(*flags, "--max_steps", 2).returncode == 0
    result = call(*flags, "--max_steps", 6)
    refusal(result, "checkpoint-2: its codes are frozen since step 1 of 2, and for 6 steps they would be trained on")
    shutil.rmtree(tmp_path / "out/checkpoint-2")
    assert call(*flags, "--max_steps", 4).returncode == 0


def test_two_models_in_a_row_have_a_cache_each(command, variant_folder, tmp_path, capsys):
    """With what the README's commands give, and nothing about caches; the first one's is used again."""
    flags = ["--do_train", False, "--teacher_cache", ""]
    for _ in range(2):
        assert start(command(tmp_path, *flags)).returncode == 0
        assert start(command(tmp_path, *flags, "--input_model_filename", variant_folder)).returncode == 0
    names = sorted(os.listdir(tmp_path / "local/teacher_cache"))
    assert [name.rpartition("-")[0] for name in names] == ["other-flux", "random-flux"]


@pytest.fixture
def variant_folder(pipeline_folder, tmp_path) -> Path:
    """A pipeline of other weights."""
    folder = Path(shutil.copytree(pipeline_folder, tmp_path / "other-flux"))
    model = diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer")
    model.proj_out.bias.data += 0.1
    model.save_pretrained(folder / "transformer")
    return folder


def test_a_complete_cache_is_trained_from_without_loading_a_text_encoder(call, finished, cache, monkeypatch, tmp_path):
    """And the transformer once, as the student."""
    loaded = []
    for kind in (diffusers.FluxTransformer2DModel, transformers.CLIPTextModel, transformers.T5EncoderModel):

        def load(cls, *args, inner=kind.from_pretrained.__func__, **more):
            loaded.append(cls)
            return inner(cls, *args, **more)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(load))
    result = call("--max_steps", 1, "--save_strategy", "no")
    assert result.returncode == 0, result.stderr
    assert loaded and all(issubclass(cls, FluxTransformer2DModel) for cls in loaded)


def test_a_run_with_a_cache_is_not_resumed_in_the_order_of_one_without(call, tmp_path):
    """Without a cache, prompts are shuffled sixteen at a time: from seventeen on that is another order."""
    flags = ["--num_train_prompts", 17, "--save_steps", 1, "--eval_strategy", "no"]
    assert call(*flags, "--max_steps", 1, "--teacher_cache", tmp_path / "cache").returncode == 0
    refusal(call(*flags, "--max_steps", 2, "--teacher_cache", "off"), "checkpoint-1: trained with .*window")


@pytest.mark.parametrize(
    ("flags", "message", "code"),
    [
        (["--w_bits", 9], "w_bits=9 is not supported", 2),
        (["--w_bits", 5.5], "--w_bits.*invalid int value: '5.5'", 2),
        (["--w_bits", 4, 2], "--w_bits 4 2: train.py trains one bit width at a time", 1),
        (["--fp16", True, "--device", "cpu"], "--fp16 True needs a GPU; on a CPU train in float32 or with --bf16", 1),
        (["--resume_from_checkpoint", True], "--resume_from_checkpoint True: no checkpoint in .*out; leave", 1),
        (["--train_prompts", "EMPTY"], "--train_prompts .*empty.txt: no prompts in it; write one a line", 1),
        (["--prompts", "EMPTY"], "--prompts .*empty.txt: no prompts in it; write one a line", 1),
        (["--teacher_cache", "EMPTY/cache"], "empty.txt/cache: the teacher cache cannot be .* that is a file; cho", 1),
        (["--guidance_scale", 2], "made with another guidance_scale: found 3.5, asked for 2.0; delete", 1),
        (["--step_shares", "EMPTY"], "empty.txt: cannot be read", 1),
        (["--step_shares", STEP_SHARES], "a share above 0 of each of 2 denoising steps, found 28; python -m", 1),
        (["--start_from", "EMPTY"], "empty.txt: neither a transformer nor a pipeline", 1),
        (["--start_from", "assets/tiny-flux"], "w_bits=16 is not quantized, asked for w_bits=0; give what", 1),
        (["--start_from", "assets/tiny-flux-1.58bit", "--w_bits", 2], "asked for w_bits=2 but .* w_bits=0", 1),
        (["--start_from", "assets/tiny-flux-1.58bit"], "in_channels=64, but in_channels=16 in .*_filename", 1),
        (["--clip_learning_rate", 0, "--train_weights", False, "--train_unquantized", False], "nothing to train", 1),
        (["--optim", "schedule_free_adamw"], "--optim schedule_free_adamw is for other trainings; use one of adamw", 1),
        (["--lr_scheduler_type", "warmup_stable_decay"], "warmup_stable_decay with these .*'num_decay_steps'", 1),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "min_lr_rate should be set through the `lr_scheduler_kwa", 1),
    ],
)
def test_flags_that_cannot_be_met_are_refused(flags, message, code, finished, call, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    refusal(call(*(str(flag).replace("EMPTY", str(empty)) for flag in flags)), message, code)
    assert files(tmp_path) == ["empty.txt"]


def test_a_teacher_that_is_quantized_already_is_refused(call, pipeline_folder, tmp_path):
    model = tmp_path / "quantized"
    shutil.copytree(pipeline_folder, model)
    quantized = FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer", w_bits=2)
    quantized.save_pretrained(model / "transformer")
    result = call("--input_model_filename", model, folder=tmp_path / "run")
    refusal(result, "quantized: already quantized; the teacher must be full precision")
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_prompts_are_refused(call, monkeypatch, tmp_path):
    monkeypatch.setattr(train.transformers.TrainingArguments, "world_size", property(lambda self: PROMPTS + 1))
    refusal(call(), "4 training prompts for 5 ranks: give at least one prompt for each")
    assert files(tmp_path) == []


def test_the_first_rank_of_a_second_node_writes_no_results(call, monkeypatch, tmp_path):
    """On one disk with the first node's, in whose way it would be."""
    monkeypatch.setattr(train.transformers.TrainingArguments, "process_index", property(lambda self: 1))
    assert call("--max_steps", 1, "--eval_strategy", "no", "--eval_on_start", False).returncode == 0
    assert files(tmp_path) == []


@pytest.mark.parametrize("cached", [False, True])
def test_a_full_disk_is_noticed_beforehand(cached, finished, call, cache, monkeypatch, tmp_path):
    """For the whole run together."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    result = call("--teacher_cache", cache if cached else tmp_path / "cache")
    parts = "the teacher cache .*and the checkpoints .* and the trained model"
    refusal(result, f"{parts} .*take .* GB but only .* GB are free; make room or choose another")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("flags", "first", "there", "most"),
    [
        ({"max_steps": 10, "save_steps": 5}, 0, 0, 2),
        ({"max_steps": 11, "save_steps": 5}, 0, 0, 3),  # the last step is kept too
        ({"max_steps": 1000, "save_steps": 5}, 0, 0, 3),  # two are kept, and one is being written
        ({"max_steps": 1000, "save_steps": 5, "save_total_limit": 7}, 0, 0, 8),
        ({"max_steps": 1000, "save_steps": 5, "save_total_limit": None}, 0, 0, 200),
        ({"max_steps": 1000, "save_steps": 5, "save_total_limit": 0}, 500, 100, 100),
        ({"max_steps": 1000, "save_steps": 5}, 500, 2, 1),
        ({"max_steps": 1000, "save_steps": 5, "save_total_limit": 1}, 500, 3, 1),  # left by a run that kept more
        ({"max_steps": 10, "save_steps": 5}, 10, 2, 0),
        ({"max_steps": 10, "save_steps": 5, "save_strategy": "no"}, 0, 0, 0),
        ({"num_train_epochs": 2, "save_steps": 50, "save_total_limit": None}, 0, 0, 2 * 125 // 50),  # 1,000 samples
        ({"num_train_epochs": 3, "save_strategy": "epoch", "save_total_limit": None}, 0, 0, 3),
        (
            {
                "num_train_epochs": 2, "save_steps": 1, "save_total_limit": None, "dataloader_drop_last": True,
                "per_device_train_batch_size": 7, "gradient_accumulation_steps": 1,
            },
            0, 0, 2 * (1000 // 7),
        ),  # fmt: skip
        ({"max_steps": 40, "save_steps": 0.25, "save_total_limit": None}, 0, 0, 4),
        ({"max_steps": 400, "save_strategy": "best", "eval_strategy": "steps", "eval_steps": 50}, 0, 0, 3),
        ({"max_steps": 400, "save_strategy": "best", "eval_strategy": "no"}, 0, 0, 0),
    ],
    ids=str,
)
def test_the_checkpoints_of_a_whole_run_are_counted(flags, first, there, most, tmp_path):
    settings = {"save_total_limit": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2} | flags
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **settings)
    assert train.checkpoints_to_keep(arguments, 1000, first, there) == most


@pytest.mark.parametrize(
    "flags",
    [[], ["--ema_decay", 0.5], ["--lora_r", 2], ["--w_bits", 4, "--pack", True], ["--vote_codes", 0.9]],
    ids=str,
)
def test_the_room_that_is_asked_for_is_what_is_taken(flags, call, monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(train, "check_disks", lambda needs: asked.update({what: size for _, size, what in needs}))
    assert call(*flags, "--max_steps", 1, "--save_steps", 1, "--eval_strategy", "no").returncode == 0
    for what, folder, count in (("checkpoints", "out/checkpoint-1", 1), ("trained model", "local/models/model", 1)):
        taken = count * sum(file.stat().st_size for file in (tmp_path / folder).glob("*.safetensors"))
        assert 0.6 * taken < asked[f"the {what}"] <= taken  # headers weigh much here, and sgd keeps nothing
    tensors = [load_file(file) for file in (tmp_path / "out/checkpoint-1").glob("*.safetensors")]
    assert asked["the checkpoints"] > 0.99 * sum(tensor.nbytes for held in tensors for tensor in held.values())


def test_a_model_of_another_run_is_not_overwritten(finished, call, tmp_path):
    """Noticed before the work; the run itself may go on into it."""
    shutil.copytree(finished.folder / "local", tmp_path / "local")
    before = student(tmp_path)
    refusal(call(), f"models/model: was written by {finished.folder}/out; move it or choose another")
    assert distance(student(tmp_path), before) == 0 and not (tmp_path / "out").exists()


def test_names_say_model_bits_and_run(pipeline_folder, tmp_path):
    for flags, name in (
        (["--output_dir", "out/mine"], "1.58bit-mine"), (["--w_bits", "2", "--output_dir", "x"], "2bit-x"),
        (["--output_dir", f"o/{pipeline_folder.name}-1.58bit"], "1.58bit"),
    ):  # fmt: skip
        model_args, _, _ = process_args(["--input_model_filename", str(pipeline_folder), *flags])
        assert model_args.output_model_filename == f"{pipeline_folder.name}-{name}"


def test_two_jobs_do_not_write_to_one_folder(call, tmp_path):
    with locked(tmp_path / "out"):
        refusal(call(), f"out: process {os.getpid()} is writing there")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("trainer_state.json", "", "-4/trainer_state.json: cannot be read .*; checkpoint-3 is whole: --resume"),
        ("trainer_state.json", '{"global_step": 4}', "_state.json: lacks global_step or log_history; checkpoint-3"),
        ("settings.json", '{"w_bi', "checkpoint-4/settings.json: cannot be read .*; checkpoint-3 is whole"),
        ("training_state.safetensors", "cut", "training_state.safetensors: cannot be read .*; checkpoint-3 is whole"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_a_whole_one(file, text, message, finished, call, tmp_path):
    shutil.copytree(finished.folder / "out", tmp_path / "out")
    (tmp_path / "out/checkpoint-4" / file).write_text(text)
    refusal(call(*FINISHED), message)
    shutil.rmtree(tmp_path / "out/checkpoint-3")
    refusal(call(*FINISHED), "no other checkpoint is whole: choose another --output_dir")


def test_the_last_whole_checkpoint_is_named_whatever_its_digits(finished, tmp_path):
    for step in (500, 1500, 2500):
        shutil.copytree(finished.folder / "out/checkpoint-4", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-2500/settings.json").write_text("{")
    with pytest.raises(ValueError, match="checkpoint-1500 is whole: --resume_from_checkpoint"):
        train.check_checkpoint(tmp_path / "checkpoint-2500")


def test_steps_that_make_no_sense_are_refused(finished, call):
    refusal(call(*FINISHED, "--max_steps", 2, folder=finished.folder), "checkpoint-4: is beyond --max_steps 2; choose")
    epochs = ["--max_steps", -1, "--num_train_epochs", 0.5]
    refusal(call(*FINISHED, *epochs, folder=finished.folder), "is beyond --num_train_epochs 0.5; choose another --out")
    refusal(call("--max_steps", 0), "--max_steps must be at least 1; leave it out to train for", 2)


@pytest.mark.parametrize(
    ("optimizer", "library"),
    [("adamw_torch_8bit", "torchao"), ("adamw_8bit", "bitsandbytes"), ("paged_adamw_8bit", "bitsandbytes")],
)
def test_moments_in_8_bits_without_their_library_are_refused_before_the_work(
    optimizer, library, call, monkeypatch, tmp_path
):
    find_spec = train.importlib.util.find_spec
    monkeypatch.setattr(
        train.importlib.util, "find_spec", lambda name, *rest: None if name == library else find_spec(name, *rest)
    )
    refusal(call("--optim", optimizer), f"--optim {optimizer} needs {library}, which is not here: pip install")
    assert files(tmp_path) == []


def test_without_a_first_evaluation_nothing_stands_for_it(call, tmp_path):
    result = call("--eval_on_start", False, "--eval_steps", 2)
    assert result.returncode == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["start"] is None and summary["final"]["step"] == 4
    assert re.search(r"^velocity NMSE +- +[\d.e-]+$", result.stdout, re.MULTILINE)


def test_out_of_memory_says_what_was_done_and_which_flag_to_change(call, monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    def refused(where: object, name: str, doing: str, advice: str, *flags) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, full)
            message = rf"out of memory while {doing} \(peak [\d.]+ GiB of host memory\): {advice}"
            refusal(call("--eval_on_start", False, *flags), message)

    step = (train.FluxQATTrainer, "compute_loss", "step 1 is trained")
    smaller = "try a smaller --per_device_train_batch_size with a larger --gradient_accumulation_steps"
    refused(step[0], step[1], f"{step[2]}, 2 a batch", smaller)
    one = ["--per_device_train_batch_size", 1]
    refused(step[0], step[1], f"{step[2]}, 1 a batch", "try --gradient_checkpointing True", *one)
    one += ["--gradient_checkpointing", True]
    refused(step[0], step[1], f"{step[2]}, 1 a batch", "try --lora_r 32 --lora_alpha 32, or --fsdp full_shard", *one)
    other = ["--teacher_cache", tmp_path / "cache", "--per_device_eval_batch_size", 2]
    smaller_eval = "try a smaller --per_device_eval_batch_size"
    refused(train.Teacher, "draw", "the teacher draws, 2 a batch", smaller_eval, *other)
    refused(train.Teacher, "encode", "the teacher draws, 1 a batch", "try a smaller --resolution", *other[:3], 1)
    refused(train, "load_quantized_model", "the student is loaded", smaller)
    refused(train.Teacher, "load", "the models are loaded", smaller, "--feature_loss", 1)
    refused(train.FluxQATTrainer, "save_transformer", "checkpoint-1 is written", smaller, "--save_steps", 1)
    refused(trainer, "save_whole", "the trained model is written", smaller, "--save_strategy", "no", "--max_steps", 1)
    evaluated = ["--eval_on_start", True]
    refused(train.FluxQATTrainer, "_velocity_error", "step 0 is evaluated, 8 a batch", smaller, *evaluated)


@pytest.mark.parametrize(("flags", "code"), [(["--resume_from_checkpoint", "no/where"], 1), (["--w_bits", 9], 2)])
def test_exit_status_and_single_line_of_a_process(flags, code, run, command, tmp_path):
    refusal(run(*command(tmp_path, *flags)), "no/where: no training checkpoint" if code == 1 else "w_bits=9", code)
    assert files(tmp_path) == []


# ------------------------------------------------------------------------------------------------- 1_run_train.sh


def shell(*arguments, cwd: Path, **environment) -> subprocess.CompletedProcess:
    """bash 1_run_train.sh, started in `cwd`, with this Python first on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "1_run_train.sh"), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("arguments", "wrong"), [(["0"], "0"), (["1", "two"], "two"), (["1", "2", "--w_bits", "2"], "--w_bits")]
)
def test_wrong_numbers_end_the_shell_script_in_one_line(arguments, wrong, tmp_path):
    result = shell(*arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    expected = f'expected NPROC BATCH ACCUM, three positive numbers, then flags; got "{wrong}"'
    assert result.stderr == f"1_run_train.sh: {expected}\n"


@pytest.mark.parametrize("flag", ["--model", "--input_model_filename=assets/tiny-flux", "--input-model-filename"])
def test_a_model_among_the_flags_ends_the_shell_script_in_one_line(flag, tmp_path):
    result = shell(1, 1, 1, flag, "assets/tiny-flux", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    advice = "name the model in front, MODEL=… bash 1_run_train.sh: its size decides"
    assert result.stderr == f"1_run_train.sh: {flag}: {advice}\n"


def test_the_shell_script_leaves_the_documented_outputs(pipeline_folder, tmp_path):
    """At the model's own 128 pixels, so that pictures are graded; MODEL relative to where the user is."""
    name, out = f"{pipeline_folder.name}-1.58bit", tmp_path / "out"
    result = shell(
        1, 2, 1, "--num_train_prompts", 4, "--num_images", 2, "--num_inference_steps", 2, "--max_steps", 2,
        "--save_steps", 2, "--device", "cpu", "--local_dir", tmp_path / "local", "--output_dir", out,
        cwd=pipeline_folder.parent, MODEL=pipeline_folder.name,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    expected = {"metrics.jsonl", "curves.png", "summary.json", "eval/steps.png", "eval/step-0.png", "eval/step-2.png"}
    expected |= {"eval/prompts.json"}
    expected |= {f"checkpoint-2/{file}" for file in CHECKPOINT}
    expected |= {f"eval/{row}/sample_00{i}.png" for row in ("teacher", "step_0", "step_2") for i in range(2)}
    found = set(files(out))
    assert expected <= found
    assert all(file.startswith("runs/") for file in found - expected) and found > expected
    assert Image.open(out / "curves.png").size == (4 * 462, 352)  # with a panel for the scene score
    for file in ("eval/teacher/sample_000.png", "eval/step_2/sample_001.png"):
        assert Image.open(out / file).size == (scenes.SIZE, scenes.SIZE)
    summary = json.loads((out / "summary.json").read_text())
    assert 0 <= summary["final"]["eval_scene_score"] <= 1 and "eval_scene_score_teacher" in summary["final"]
    model = tmp_path / "local/models" / f"{name}-out"
    assert FluxTransformer2DModel.from_pretrained(model).config.w_bits == 0
    assert re.search(r"2/2 \[.*(it/s|s/it)", result.stderr)  # progress and remaining time
    [cache] = os.listdir(tmp_path / "local/teacher_cache")
    assert re.fullmatch(rf"{pipeline_folder.name}-[0-9a-f]{{8}}", cache)
    assert "1.58 bit, clip_init mse, learning rate 0.0005: training " in result.stdout
    assert re.search(r"^velocity NMSE +[\d.e-]+ +[\d.e-]+$", result.stdout, re.MULTILINE)


@pytest.fixture
def two_ranks(pipeline_folder, tmp_path):
    """1_run_train.sh on two processes, started in a group of its own, once its first checkpoint is there."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    flags = ["--num_train_prompts", 4, "--num_images", 2, "--num_inference_steps", 2, "--max_steps", 100_000]
    flags += ["--save_steps", 1, "--device", "cpu", "--local_dir", tmp_path / "local", "--output_dir", tmp_path / "out"]
    process = subprocess.Popen(
        ["bash", str(ROOT / "1_run_train.sh"), *map(str, [2, 2, 1, *flags, "--report_to", "none", "--resolution", 64])],
        env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "MODEL": str(pipeline_folder)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (tmp_path / "out/checkpoint-2").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def said(stderr: str) -> list[str]:
    """What stands on stderr besides progress bars and transformers' remarks."""
    text = re.sub(r"[^\r\n]*%\|[^\r\n]*?\]|\x1b\[\w", "", stderr)
    lines = [line.strip() for line in re.split(r"[\r\n]", text)]
    return [line for line in lines if line and not re.search(r"/s\]|\[transformers\]|\[plan\]", line)]


def test_ctrl_c_ends_both_ranks_in_a_line(two_ranks):
    os.killpg(two_ranks.pid, signal.SIGINT)
    _, stderr = two_ranks.communicate(timeout=60)
    assert two_ranks.returncode == 130
    assert len(said(stderr)) == 1, stderr
    assert re.search(r"interrupted: .*checkpoint-\d+ is saved; the same command goes on from it$", said(stderr)[0])


def test_a_rank_that_is_killed_ends_the_other_and_is_named(two_ranks, tmp_path):
    ranks = [int(line.split()[0]) for line in (tmp_path / "out/.flux158-lock").read_text().splitlines()]
    os.kill(ranks[1], signal.SIGKILL)
    _, stderr = two_ranks.communicate(timeout=60)
    assert two_ranks.returncode == 128 + signal.SIGKILL
    assert said(stderr)[-1] == "rank 1 was killed (SIGKILL); the others were ended", stderr
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank, 0)
