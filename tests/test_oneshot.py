"""One-shot rounding against plain formulas and brute force; then run.py and test.py from end to end."""

import itertools
import json

import pytest
import torch
from diffusers import FluxPipeline

from models.modeling_flux_quant import FluxTransformer2DModel
from models.packing import PackedLinear
from models.utils_quant import code_grid, init_clip_val, quantize, quantize_codes
from utils import oneshot
from utils.utils import generate_images, record_velocities


@pytest.fixture
def problem():
    """A weight [5, 24] and a covariance [24, 24] of strongly correlated inputs, float32, seeded."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 24, generator=generator)
    mixed = torch.randn(24, 24, generator=generator)
    hessian = mixed @ torch.diag(torch.logspace(0, -3, 24)) @ mixed.T
    return weight, (hessian + hessian.T) / 2 + 1e-3 * torch.eye(24)


def dequantized(codes, alpha, bits):
    n, s = code_grid(bits)
    return alpha * ((codes.float() + s) / n)


def error(weight, codes, alpha, bits, hessian):
    """tr((W − Q) H (W − Q)ᵀ) in float64, row by row."""
    gap = (weight - dequantized(codes, alpha, bits)).double()
    return ((gap @ hessian.double()) * gap).sum(1)


def test_threshold_is_the_published_rule_at_the_least_squares_scale():
    weight = torch.tensor([[1.0, -0.04, 0.06, -0.5], [0.0, 0.0, 0.0, 0.0]])
    codes, alpha = oneshot.threshold_codes(weight, 0.05)
    assert codes.tolist() == [[1, 0, 1, -1], [0, 0, 0, 0]]
    assert alpha[0].item() * 2 / 3 == pytest.approx((1 + 0.06 + 0.5) / 3)
    assert alpha.isfinite().all()


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4, 8])
def test_mse_is_the_quantizer_at_its_error_minimal_step(bits, problem):
    weight, _ = problem
    codes, alpha = oneshot.round_weight(weight, bits, "mse", 0.05)
    assert torch.equal(dequantized(codes, alpha, bits), quantize(weight, init_clip_val(weight, bits), bits))


@pytest.mark.parametrize("bits", [0, 2, 4])
def test_the_fitted_scale_is_the_best_one(bits, problem):
    weight, hessian = problem
    start = init_clip_val(weight, bits)
    codes = quantize_codes(weight, start, bits)
    alpha = oneshot.fit_scale(weight, codes, bits, hessian, start)
    best = error(weight, codes, alpha, bits, hessian)
    for factor in (0.98, 1.02):
        assert (error(weight, codes, alpha * factor, bits, hessian) > best).all()


@pytest.mark.parametrize("bits", [0, 1, 2, 3])
def test_error_feedback_and_descent_each_lower_the_error(bits, problem):
    weight, hessian = problem
    alpha = init_clip_val(weight, bits)
    plain = quantize_codes(weight, alpha, bits)
    assert torch.equal(oneshot.gptq(weight, alpha, bits, torch.eye(24), block=8), plain)
    fed = oneshot.gptq(weight, alpha, bits, hessian, block=8)
    assert error(weight, fed, alpha, bits, hessian).sum() < error(weight, plain, alpha, bits, hessian).sum()
    better = oneshot.descend(weight, fed, alpha, bits, hessian)
    before, after = (error(weight, codes, alpha, bits, hessian) for codes in (fed, better))
    assert (after <= before * (1 + 1e-5)).all()


def test_descent_ends_where_no_single_code_does_better():
    generator = torch.Generator().manual_seed(1)
    weight, mixed = torch.randn(4, 6, generator=generator), torch.randn(6, 6, generator=generator)
    hessian, alpha = mixed @ mixed.T + 0.1 * torch.eye(6), torch.full((4, 1), 1.5)
    codes = quantize_codes(weight, alpha, 0)
    for _ in range(20):
        codes = oneshot.descend(weight, codes, alpha, 0, hessian)
    reached = error(weight, codes, alpha, 0, hessian)
    for column, code in itertools.product(range(6), (-1, 0, 1)):
        other = codes.clone()
        other[:, column] = code
        assert (error(weight, other, alpha, 0, hessian) >= reached - 1e-5).all()


def test_moments_are_weighted_covariances():
    generator = torch.Generator().manual_seed(2)
    x, t = torch.randn(2, 3, 10, 4, generator=generator).unbind()
    statistics = oneshot.Statistics(4, torch.device("cpu"))
    for i, weight in enumerate((1.0, 2.0, 0.5)):
        statistics.add(x[i], t[i], weight)
    mean, teacher_mean, square, cross = statistics.moments()
    share = torch.tensor([1.0, 2.0, 0.5]).double().repeat_interleave(10) / 35
    x, t = x.reshape(-1, 4).double(), t.reshape(-1, 4).double()
    torch.testing.assert_close(mean.double(), share @ x, atol=1e-5, rtol=0)
    torch.testing.assert_close(teacher_mean.double(), share @ t, atol=1e-5, rtol=0)
    centred, teacher = x - share @ x, t - share @ t
    torch.testing.assert_close(square.double(), centred.T @ (share[:, None] * centred), atol=1e-5, rtol=0)
    torch.testing.assert_close(cross.double(), teacher.T @ (share[:, None] * centred), atol=1e-5, rtol=0)


def test_a_calibrated_layer_keeps_its_outputs_better_than_a_rounded_one():
    """On other inputs of the same distribution; its mean output is kept whatever the codes."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(32, 32, generator=generator) @ torch.diag(torch.logspace(0, -2, 32))
    inputs, unseen = (torch.randn(2000, 32, generator=generator) @ mix.T + 1 for _ in range(2))
    layer = torch.nn.Linear(32, 16)
    statistics = oneshot.Statistics(32, torch.device("cpu"))
    statistics.add(inputs, inputs, 1.0)
    codes, alpha, bias = oneshot.calibrate_layer(layer, statistics, 0)
    with torch.no_grad():
        calibrated = torch.nn.functional.linear(unseen, dequantized(codes, alpha, 0), bias)
        rounded = torch.nn.functional.linear(
            unseen, quantize(layer.weight, init_clip_val(layer.weight, 0), 0), layer.bias
        )
        wanted = layer(unseen)
        mean = torch.nn.functional.linear(inputs, dequantized(codes, alpha, 0), bias).mean(0)
    assert (calibrated - wanted).square().mean() < 0.3 * (rounded - wanted).square().mean()
    torch.testing.assert_close(mean, layer(inputs).mean(0).detach(), atol=1e-4, rtol=0)


def test_calibration_covers_every_block_linear_once_and_leaves_no_hooks(pipeline_folder):
    pipe = FluxPipeline.from_pretrained(pipeline_folder)
    with record_velocities(pipe.transformer) as calls:
        generate_images(pipe, ["a red star", "two rings"], num_inference_steps=2, batch_size=2)
    done = []
    oneshot.calibrate(
        pipe.transformer, [inputs for inputs, _ in calls], [1.0, 1.0], 2, lambda n, p: done.append((n, p))
    )
    student = FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer", w_bits=2).pack()
    assert sorted(n for n, _ in done) == sorted(n for n, m in student.named_modules() if isinstance(m, PackedLinear))
    assert all(torch.equal(pipe.transformer.get_submodule(n).weight, p.dequantize()) for n, p in done)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.transformer.modules())


@pytest.mark.parametrize(("method", "bits"), [("threshold", 0), ("mse", 0), ("calibrated", 3)])
def test_run_writes_a_pipeline_that_loads_and_that_test_judges(method, bits, run, pipeline_folder, tmp_path):
    target = tmp_path / "quantized"
    mode = "fast" if method == "threshold" else "exact"
    flags = ("--steps", 2, "--device", "cpu", "--mode", mode)
    calibration = ("--calibration_prompts", 2, "--calibration_stride", 1)
    made = run("run.py", "--model_id", pipeline_folder, "--output_path", target, "--method", method, "--w_bits", bits,
               "--num_images", 2, *flags, *calibration)  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert (target / "samples" / "grid.png").is_file()
    pipe = FluxPipeline.from_pretrained(target)
    assert pipe.transformer.config.w_bits == bits and pipe.transformer.config.packed
    if method == "mse":
        expected = FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer", w_bits=0).pack()
        for name, parameter in expected.named_parameters():
            assert torch.equal(pipe.transformer.get_parameter(name), parameter), name

    judged = run("test.py", target, bits, "--model", pipeline_folder, "--num_images", 2, *flags,
                 "--output_dir", tmp_path / "test")  # fmt: skip
    assert judged.returncode == 0, judged.stderr
    metrics = json.loads((tmp_path / "test" / "metrics.json").read_text())
    assert metrics["w_bits"] == bits and metrics["mode"] == mode
    assert len(metrics["nmse_by_step"]) == 2 and metrics["nmse"] > 0
    assert (tmp_path / "test" / "samples" / "full" / "sample_001.png").is_file()

    again = run("run.py", "--model_id", pipeline_folder, "--output_path", target, "--method", method, "--w_bits", bits)
    assert again.returncode == 1 and again.stderr.strip().endswith("exists and is not empty; choose another")


def test_test_names_both_bit_widths(run, pipeline_folder, tmp_path):
    FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer", w_bits=4).save_pretrained(tmp_path)
    judged = run("test.py", tmp_path, 2, "--model", pipeline_folder)
    assert judged.returncode == 1
    line = judged.stderr.strip().splitlines()[-1]
    assert line.startswith("test.py: error: ") and "w_bits=2" in line and "w_bits=4" in line


def test_geneval_folders_are_filled_where_something_is_missing(run, pipeline_folder, tmp_path):
    FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer", w_bits=0).save_pretrained(tmp_path)
    prompts = [{"tag": "single_object", "prompt": "a photo of a bench"}, {"prompt": "two clocks"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(item) + "\n" for item in prompts))
    command = ("test.py", tmp_path, 0, "--model", pipeline_folder, "--geneval", tmp_path / "metadata.jsonl",
               "--output_dir", tmp_path, "--steps", 1, "--samples_per_prompt", 2, "--device", "cpu")  # fmt: skip
    assert run(*command).returncode == 0
    folder = tmp_path / "geneval" / "bits_0"
    pictures = {file: file.read_bytes() for file in folder.rglob("*.png")}
    expected = [f"{i:05d}/samples/{j:05d}.png" for i in range(2) for j in range(2)]
    assert sorted(str(file.relative_to(folder)) for file in pictures) == expected
    assert [json.loads((folder / f"{i:05d}" / "metadata.jsonl").read_text()) for i in range(2)] == prompts
    gone = folder / expected[1]
    gone.unlink()
    assert run(*command).returncode == 0
    assert {file: file.read_bytes() for file in folder.rglob("*.png")} == pictures


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (("--model_id", "nowhere"), 1, "nowhere: neither a folder nor"),
        (("--method", "threshold", "--w_bits", 4), 2, "--method threshold is a ternary rule"),
        (("--w_bits", 16), 2, "--w_bits 16: nothing to quantize"),
        (("--prompts_json", "nowhere.json"), 1, "--prompts_json nowhere.json: cannot be read"),
    ],
)
def test_run_errors_are_one_line(flags, status, message, run, pipeline_folder, tmp_path):
    result = run("run.py", "--model_id", pipeline_folder, "--output_path", tmp_path / "out", *flags)
    assert result.returncode == status
    assert message in result.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
