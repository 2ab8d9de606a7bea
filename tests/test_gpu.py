"""What only a GPU can show, on tiny-flux: the scripts, packed layers, adapters and training on CUDA, held against the
same on the CPU. Skipped where there is no GPU; `bash tests/run.sh --gpu` runs all of it and the kernels' tests."""

import json
import sys
from pathlib import Path

import pytest
import torch

from models import packing
from models.kernels import unpack_codes
from models.modeling_flux_quant import FluxTransformer2DModel
from utils import random_flux, rehearsal
from utils.metrics import nmse, psnr
from utils.sampling import generate_images, load_pipeline, record_velocities

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cuda")
TINY, STUDENT = ROOT / "assets" / "tiny-flux", ROOT / "assets" / "tiny-flux-1.58bit"
PROMPTS = ["a red star and a blue ring", "three moons on dark paper"]


def inputs(device, dtype: torch.dtype) -> dict:
    """For two pictures of tiny-flux at different times."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden_states": (2, 64, 64), "encoder_hidden_states": (2, 24, 128), "pooled_projections": (2, 128)}
    given = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    given |= {"timestep": torch.tensor([0.9, 0.3]).to(dtype), "guidance": torch.tensor([3.5, 3.5])}
    given["img_ids"] = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0))
    given["txt_ids"] = torch.zeros(24, 3)
    return {name: value.to(device) for name, value in given.items()}


def student(dtype: torch.dtype = torch.float32, **settings) -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(STUDENT, dtype=dtype, **settings)


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """The packed student's velocities on the CPU in float32."""
    with torch.no_grad():
        return student()(**inputs("cpu", torch.float32)).sample


@pytest.fixture
def script(run):
    """script("test.py", …) runs a script that must succeed; its output."""

    def script(*words, **environment) -> str:
        result = run(*words, **environment)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        return result.stdout

    return script


# ----- packed layers


@pytest.mark.parametrize("w_bits", range(9))
def test_codes_are_written_and_read_on_the_gpu_as_on_the_cpu(w_bits):
    for rows, in_features in ((7, 61), (256, 256), (3072, 3072), (48, 15360)):
        low, high = (-1, 1) if w_bits == 0 else (-(2 ** (w_bits - 1)), 2 ** (w_bits - 1) - 1)
        codes = torch.randint(low, high + 1, (rows, in_features), dtype=torch.int8)
        memory, disk = packing.pack_codes(codes, w_bits), packing.store_codes(codes, w_bits)
        assert torch.equal(packing.store_codes(codes.to(DEVICE), w_bits).cpu(), disk)
        assert torch.equal(packing.to_disk(memory.to(DEVICE), w_bits, in_features).cpu(), disk)
        assert torch.equal(packing.from_disk(disk.to(DEVICE), w_bits, in_features).cpu(), memory)
        assert torch.equal(unpack_codes(memory.to(DEVICE), w_bits, in_features).cpu(), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_weights_loaded_straight_to_the_gpu_are_those_on_the_cpu(dtype):
    here, there = student(dtype), student(dtype, device_map=str(DEVICE))
    found = dict(there.named_parameters())
    assert {parameter.device.type for parameter in found.values()} == {DEVICE.type}
    for name, parameter in here.named_parameters():
        assert parameter.dtype == found[name].dtype and torch.equal(parameter, found[name].cpu()), name


@pytest.mark.parametrize(
    ("mode", "dtype", "most"),
    [
        ("exact", torch.float32, 1e-6),
        ("exact", torch.bfloat16, 1e-3),
        ("fast", torch.bfloat16, 3e-3),
    ],
    ids=["exact-fp32", "exact-bf16", "fast-bf16"],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_both_modes_have_the_cpus_velocities(mode, dtype, most, compiled, expected):
    model = student(dtype, device_map=str(DEVICE))
    model.set_inference_mode(mode)
    if compiled:
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    with torch.no_grad():
        found = model(**inputs(DEVICE, dtype)).sample
    assert nmse(found.float().cpu(), expected) < most


def test_an_adapter_on_packed_weights_trains_as_on_the_cpu():
    """Every gradient of a LoRA, in float32."""
    peft = pytest.importorskip("peft")
    found = []
    for device in ("cpu", DEVICE):
        model = student().to(device)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_out.0", "proj_mlp"])
        model.add_adapter(config)
        lora = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in lora.values():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        model(**inputs(device, torch.float32)).sample.square().mean().backward()
        found.append({name: parameter.grad.cpu() for name, parameter in lora.items()})
    reference, gradients = found
    assert len(reference) > 30
    for name, gradient in reference.items():
        assert gradient.norm() > 0 and (gradients[name] - gradient).norm() < 1e-3 * gradient.norm(), name


# ----- pictures


def test_pictures_are_those_of_the_cpu():
    drawn = []
    for device in ("cpu", DEVICE):
        pipe = load_pipeline(str(TINY), torch.float32).to(device)
        drawn.append(generate_images(pipe, PROMPTS, 5, num_inference_steps=8, batch_size=2))
    assert psnr(*drawn) > 45


def test_a_sanity_check_measures_what_it_measures_on_the_cpu(script, tmp_path):
    """In float32: in bfloat16 a picture of four steps is another one on every kind of processor.

    The search for step sizes has nearly equal minima: weights that differ by 1e-7 move the error of 4 bits by up to
    1.1 % and 0.17 dB. So what the GPU quantized is measured on the CPU, too.
    """

    def measured(device, *flags) -> tuple[Path, dict]:
        folder = tmp_path / str(device)
        flags = "--bf16 False --w_bits 4 0 --num_images 2 --num_inference_steps 4 --pack True".split() + [*flags]
        script("sanity.py", "--device", device, "--output_dir", folder, "--local_dir", folder, *flags)
        rows = json.loads((folder / "samples" / "metrics.json").read_text())["rows"]
        return folder / "cache" / "bits_4", {row["name"]: row for row in rows}

    student, there = measured(DEVICE)
    _, here = measured("cpu", "--trained", student)
    assert list(here) == [*there, "4 bit, trained"]
    for name, row in there.items():
        assert row["packed_bytes"] == here[name]["packed_bytes"]
        if "nmse" in row:
            assert row["nmse"] == pytest.approx(here[name]["nmse"], rel=0.03)
            assert row["psnr"] == pytest.approx(here[name]["psnr"], abs=0.4)
    same = here["4 bit, trained"]
    assert there["4 bit"]["nmse"] == pytest.approx(same["nmse"], rel=1e-3)
    assert there["4 bit"]["psnr"] == pytest.approx(same["psnr"], abs=0.05)


@pytest.fixture(scope="module")
def judged(run, tmp_path_factory):
    """judged("--offload") is what test.py measured of the shipped student with these flags; each is drawn once."""
    done = {}

    def judged(*flags) -> dict:
        if flags not in done:
            folder = tmp_path_factory.mktemp("judged")
            words = ("--num_images", 2, "--steps", 4, "--device", DEVICE, "--output_dir", folder, *flags)
            result = run("test.py", STUDENT, 0, *words)
            assert result.returncode == 0, result.stderr[-4000:]
            done[flags] = json.loads((folder / "metrics.json").read_text())
        return done[flags]

    return judged


@pytest.mark.parametrize("flags", [("--offload",), ("--offload", "sequential")], ids=["whole", "sequential"])
def test_offloaded_it_draws_the_same(flags, judged):
    plain, offloaded = judged(), judged(*flags)
    assert offloaded["nmse"] == pytest.approx(plain["nmse"], rel=1e-3)
    assert offloaded["psnr"] == pytest.approx(plain["psnr"], abs=0.05)


def test_compiled_it_draws_the_same(judged):
    plain, compiled = judged(), judged("--compile")
    assert compiled["nmse"] == pytest.approx(plain["nmse"], rel=0.05)
    assert compiled["psnr"] == pytest.approx(plain["psnr"], abs=1)


@pytest.mark.parametrize("flags", [("--mode", "fast"), ("--mode", "fast", "--compile")], ids=["eager", "compiled"])
def test_fast_mode_draws_nearly_the_same(flags, judged):
    """Another computation (the figures differ), of the same model (the error hardly grows)."""
    exact, fast = judged(), judged(*flags)
    assert fast["mode"] == "fast" and fast["nmse"] != exact["nmse"]
    assert fast["nmse"] == pytest.approx(exact["nmse"], rel=0.2)


# ----- quantizing and training


def test_calibrated_codes_are_as_good_as_the_cpus(script, pipeline_folder, tmp_path):
    """The error of the weights, by kind of layer, on a pipeline so small that the CPU is quick with it."""
    tables = []
    for device in ("cpu", DEVICE):
        flags = "--steps 4 --calibration_prompts 4 --calibration_stride 1 --num_images 0 --dtype float32".split()
        words = ("--model_id", pipeline_folder, "--output_path", tmp_path / str(device), "--device", device)
        script("run.py", *words, *flags)
        tables.append(json.loads((tmp_path / str(device) / "metrics.json").read_text())["layers"])
    here, there = tables
    assert here.keys() == there.keys()
    for kind, row in here.items():
        assert there[kind]["layers"] == row["layers"]
        assert there[kind]["weight_error"] == pytest.approx(row["weight_error"], rel=0.05), kind


def test_calibration_halves_the_error_of_the_velocity(script, tmp_path):
    """Against error-minimal step sizes alone; on tiny-flux in bfloat16, as FLUX.1-dev is calibrated."""
    errors = {}
    for method in ("mse", "calibrated"):
        folder, flags = tmp_path / method, "--calibration_prompts 8 --batch_size 8 --num_images 0".split()
        words = ("--model_id", TINY, "--output_path", folder, "--device", DEVICE, "--method", method)
        script("run.py", *words, *flags)
        words = ("--num_images", 4, "--steps", 8, "--device", DEVICE, "--output_dir", tmp_path / f"{method}_test")
        script("test.py", folder, 0, *words)
        errors[method] = json.loads((tmp_path / f"{method}_test" / "metrics.json").read_text())["nmse"]
    assert errors["calibrated"] < 0.5 * errors["mse"]


@pytest.mark.parametrize("lora", [(), ("--lora_r", 4, "--lora_alpha", 4)], ids=["all weights", "LoRA"])
def test_compiled_training_learns_what_it_learns_on_the_cpu(lora, script, tmp_path):
    """Ten steps from the same trajectories, which are drawn once, in bfloat16: the same errors before and after."""
    flags = "--num_train_prompts 8 --num_images 4 --num_inference_steps 4 --per_device_train_batch_size 4 --bf16 True"
    flags += " --max_steps 10 --save_steps 10 --eval_steps 10 --logging_steps 1 --report_to none --disable_tqdm True"
    errors = {}
    for name, more in {"cpu": (), "eager": (), "compiled": ("--torch_compile", "True")}.items():
        folder, device = tmp_path / name, "cpu" if name == "cpu" else DEVICE
        words = ("--device", device, "--local_dir", folder, "--output_dir", folder / "out", *more, *lora)
        words += ("--teacher_cache", tmp_path / "cache", "--input_model_filename", TINY)
        script("train.py", *words, *flags.split())
        summary = json.loads((folder / "out" / "summary.json").read_text())
        errors[name] = [summary[when]["eval_nmse"] for when in ("start", "final")]
    assert errors["cpu"][1] < errors["cpu"][0]
    for name in ("eager", "compiled"):
        assert errors[name][0] == pytest.approx(errors["cpu"][0], rel=0.03), name
        assert errors[name][1] == pytest.approx(errors["cpu"][1], rel=0.1), name


# ----- measuring


def test_the_bench_times_every_rival(script, tmp_path):
    """Its exit status tells of a row that failed; what the GPU has no type for says so."""
    script("bench.py", "--config", TINY, "--device", DEVICE, "--rounds", 1, "--layers", "--load", "--output", tmp_path)
    [file] = tmp_path.glob("*.json")
    figures = json.loads(file.read_text())
    assert all(row["ms"] > 0 for row in figures["steps"] if "problem" not in row)
    assert sum(row["rival"].startswith("ours") for row in figures["steps"]) >= 2


def test_random_weights_made_on_the_gpu_draw_something_finite(tmp_path):
    drawn = random_flux.student_t((1_000_000,), torch.Generator(DEVICE).manual_seed(0))
    assert drawn.var().item() == pytest.approx(1, abs=0.02)
    assert (drawn.abs() > 6.8688 * (3 / 5) ** 0.5).double().mean().item() == pytest.approx(0.001, rel=0.1)
    shard_bytes = random_flux.SHARD_BYTES[True]
    random_flux.write_transformer(tmp_path, random_flux.skeleton("small"), 0, shard_bytes, DEVICE)
    random_flux.write_rest(tmp_path, "small", 0, DEVICE)
    pipe = load_pipeline(str(tmp_path), torch.bfloat16).to(DEVICE)
    with record_velocities(pipe.transformer) as calls:
        pictures = generate_images(pipe, ["a dog"], num_inference_steps=28)
    assert len(calls) == 28 and all(velocity.isfinite().all() for _, velocity in calls)
    assert pictures.isfinite().all() and pictures.std() > 0.1


def test_the_rehearsal_sees_what_a_process_takes_of_the_gpu(tmp_path):
    """2 GiB of weights and, for CUDA itself, less than 1.5."""
    code = "import torch, time; held = torch.zeros(2**31, dtype=torch.uint8, device='cuda'); time.sleep(2)"
    stage = rehearsal.Stage(rehearsal.parse_args(["--output", str(tmp_path), "--scale", "small"]))
    step = rehearsal.Step("takes", f'{sys.executable} -c "{code}"', gpus=1)
    machine = rehearsal.describe_machine()
    row = rehearsal.play(step, stage, machine)
    assert not row["problem"] and len(row["gpu_peak_gib"]) == len(machine["gpus"])
    assert 2 <= max(row["gpu_peak_gib"]) < 3.5
