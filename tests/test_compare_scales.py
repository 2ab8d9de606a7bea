"""Finer step sizes against plain Python and float64 least squares; the program on a small pipeline."""

import json
import math
from dataclasses import asdict

import pytest
import torch

from models.modeling_flux_quant import FluxTransformer2DModel
from utils import compare_scales as scales
from utils.compare_scales import Scheme
from utils.metrics import velocity_nmse
from utils.oneshot import Statistics, Uncalibratable, calibrate_weight
from utils.random_flux import student_t
from utils.rounding import to_values
from utils.sampling import load_pipeline
from utils.walk import record_calls


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(samples: int, width: int, seed: int = 0) -> torch.Tensor:
    """Correlated, of unequal size, not about zero."""
    mixing = numbers(width, width, seed=seed + 1) / width**0.5 + torch.eye(width)
    return numbers(samples, width, seed=seed) @ mixing * numbers(width, seed=seed + 2).exp() + 0.5


def gathered(x: torch.Tensor) -> Statistics:
    statistics = Statistics(x.shape[1], torch.device("cpu"))
    statistics.add(x, x, 1.0)
    return statistics


def moment(x: torch.Tensor) -> torch.Tensor:
    return (x.double().T @ x.double() / len(x)).to(x.dtype)


def lost(error: torch.Tensor, hessian: torch.Tensor) -> float:
    return ((error.double() @ hessian.double()) * error.double()).sum().item()


def ternary(value: float, alpha: float) -> float:
    level = 2 / 3 * alpha
    return 0.0 if abs(value) < level / 2 else math.copysign(level, value)


# ------------------------------------------------------------------------------------------------------- groups


def test_each_group_gets_its_error_minimal_step_size():
    """In plain Python: the k largest weights of a group get the level that is their mean; the best k."""
    weight = numbers(3, 12, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1], dtype=torch.float64).repeat(4)
    alpha = scales.step_sizes(weight, 0, 4)
    assert alpha.shape == (3, 3)
    found = scales.nearest(weight, alpha, 0)
    for row in range(3):
        for group in range(3):
            own = weight[row, 4 * group : 4 * group + 4].tolist()
            sizes, energy = sorted(map(abs, own), reverse=True), sum(w * w for w in own)
            least, mean = min((energy - sum(sizes[:k]) ** 2 / k, sum(sizes[:k]) / k) for k in range(1, 5))
            assert alpha[row, group].item() == pytest.approx(1.5 * mean)
            made = found[row, 4 * group : 4 * group + 4].tolist()
            assert made == pytest.approx([ternary(w, 1.5 * mean) for w in own])
            assert sum((w - q) ** 2 for w, q in zip(own, made, strict=True)) == pytest.approx(least)


def plain_sweep(target, base, alpha, matrix):
    """Column by column, row by row: q_k = level(b_k + s_k/M_kk), s_j = Σ (errors of the others) M_kj."""
    size, rows = len(target[0]) // len(alpha[0]), []
    for t, b, steps in zip(target, base, alpha, strict=True):
        errors, row = [x - y for x, y in zip(t, b, strict=True)], []
        for k in range(len(t)):
            slack = sum(error * matrix[j][k] for j, error in enumerate(errors))
            row.append(ternary(b[k] + slack / matrix[k][k], steps[k // size]))
            errors[k] = t[k] - row[k]
        rows.append(row)
    return rows


@pytest.mark.parametrize(("width", "group"), [(12, 12), (12, 3), (384, 192), (256, 256)])
def test_columns_are_rounded_in_turn_with_the_step_size_of_their_group(width, group):
    """Groups longer than the block of columns that is rounded at once among them."""
    target, hessian = numbers(2, width, dtype=torch.float64), moment(inputs(3 * width, width).double())
    alpha = scales.step_sizes(target, 0, group)
    factor = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    found = scales.sweep(target, target, alpha, 0, factor)
    plain = plain_sweep(target.tolist(), target.tolist(), alpha.tolist(), factor.tolist())
    assert torch.allclose(found, torch.tensor(plain, dtype=torch.float64))
    better = scales.sweep(target, found, alpha, 0, hessian)
    plain = plain_sweep(target.tolist(), found.tolist(), alpha.tolist(), hessian.tolist())
    assert torch.allclose(better, torch.tensor(plain, dtype=torch.float64))
    assert lost(target - better, hessian) <= lost(target - found, hessian) < lost(target, hessian)


def test_step_sizes_of_groups_become_those_of_least_squares():
    """One pass at a time lowers the error; many end where least squares over all groups of a row does."""
    target, hessian = numbers(4, 12, dtype=torch.float64), moment(inputs(100, 12).double())
    alpha = scales.step_sizes(target, 0, 4)
    quantized = scales.nearest(target, alpha, 0)
    levels = (quantized.view(4, 3, 4) / alpha.unsqueeze(2)).view(4, 12)
    root, before = torch.linalg.cholesky(hessian), lost(target - quantized, hessian)
    for _ in range(200):
        alpha, quantized = scales.fit_alpha(target, quantized, alpha, hessian)
        now = lost(target - quantized, hessian)
        assert now <= before * (1 + 1e-12)
        before = now
    for row in range(4):
        parts = torch.zeros(3, 12, dtype=torch.float64)
        for group in range(3):
            parts[group, 4 * group : 4 * group + 4] = levels[row, 4 * group : 4 * group + 4]
        wanted = torch.linalg.lstsq((parts @ root).T, (target[row] @ root).unsqueeze(1)).solution[:, 0]
        assert torch.allclose(alpha[row], wanted, rtol=1e-6)


def test_with_a_step_size_a_row_it_is_the_calibration_of_run_py():
    weight, x = numbers(16, 32), inputs(400, 32)
    codes, alpha, shift = calibrate_weight(weight, gathered(x), 0)
    made, own_shift = scales.round_matrix(weight, gathered(x), Scheme("calibrated"), True)
    assert torch.allclose(made, to_values(codes, alpha, 0), rtol=1e-4, atol=1e-6)
    assert torch.allclose(own_shift, shift, rtol=1e-3, atol=1e-5)


def test_groups_are_rounded_in_one_piece_and_the_largest_inputs_first():
    order = scales.column_order(torch.tensor([1.0, 2.0, 9.0, 0.0, 3.0, 4.0]), 2)
    assert order.tolist() == [2, 3, 5, 4, 1, 0]
    assert scales.column_order(torch.tensor([1.0, 3.0, 2.0]), 3).tolist() == [1, 2, 0]


@pytest.mark.parametrize("method", ["mse", "calibrated"])
def test_groups_help_where_the_weights_of_a_row_differ_in_size(method):
    weight, x = numbers(16, 32) * torch.tensor([1.0, 8.0]).repeat_interleave(16), inputs(400, 32)
    x[:, 16:] /= 8
    errors = {}
    for group in (0, 16):
        made, _ = scales.round_matrix(weight, gathered(x), Scheme(method, group=group), False)
        errors[group] = lost(weight - made, moment(x))
    assert errors[16] < 0.8 * errors[0]


# ------------------------------------------------------------------------------------------------------ columns


def test_statistics_of_scaled_inputs():
    x, s = inputs(200, 8), numbers(8).exp()
    scaled, wanted = gathered(x), gathered(x / s)
    scales.scale_inputs(scaled, s)
    for name in ("mean", "teacher_mean", "square", "cross"):
        assert torch.allclose(getattr(scaled, name), getattr(wanted, name), rtol=1e-3, atol=1e-3), name
    assert torch.allclose(scales.second_moment(wanted), moment(x / s), rtol=1e-3, atol=1e-4)


def plain_power(weight: list[list[float]], hessian: list[list[float]]) -> list[float]:
    """All powers in plain Python: the scales with the least output error."""
    width, best = range(len(hessian)), (math.inf, [])
    rms = [math.sqrt(hessian[j][j]) for j in width]
    columns = [math.sqrt(sum(row[j] ** 2 for row in weight) / len(weight)) for j in width]
    rms, columns = ([max(v, 0.1 * sum(values) / len(values)) for v in values] for values in (rms, columns))
    for p in (0, -0.25, 0.25, 0.5, 1):
        for q in (0, 1):
            s = [rms[j] ** p / columns[j] ** q for j in width]
            mean = math.exp(sum(map(math.log, s)) / len(s))
            s, error = [v / mean for v in s], 0.0
            for row in weight:
                scaled = [w * v for w, v in zip(row, s, strict=True)]
                sizes = sorted(map(abs, scaled), reverse=True)
                k = max(range(1, len(sizes) + 1), key=lambda k: sum(sizes[:k]) ** 2 / k)
                alpha = 1.5 * sum(sizes[:k]) / k
                off = [w - ternary(v, alpha) / c for w, v, c in zip(row, scaled, s, strict=True)]
                error += sum(off[i] * hessian[i][j] * off[j] for i in width for j in width)
            best = min(best, (error, s))
    return best[1]


@pytest.mark.parametrize("seed", range(4))
def test_the_power_of_the_least_output_error_is_taken(seed):
    weight, x = numbers(6, 8, seed=seed).double(), inputs(50, 8, seed=seed).double()
    found = scales.power_scales(weight, moment(x), 0)
    assert found.tolist() == pytest.approx(plain_power(weight.tolist(), moment(x).tolist()))


def test_an_input_that_never_fires_gets_a_scale_that_is_bounded(monkeypatch):
    """Else its weights, divided by the scale, would be anything, and it may fire on another prompt."""
    monkeypatch.setattr(scales, "X_POWERS", (1.0,))
    monkeypatch.setattr(scales, "W_POWERS", (0,))
    hessian = torch.eye(8)
    hessian[:4] = 0
    found = scales.power_scales(numbers(6, 8), hessian, 0)
    # The mean RMS is 1/2, a tenth of it 1/20; the geometric mean is 1.
    assert found.tolist() == pytest.approx([20**-0.5] * 4 + [20**0.5] * 4)


def test_fitted_column_scales_are_those_of_least_squares(monkeypatch):
    monkeypatch.setattr(scales, "RIDGE", 0.0)
    target, hessian = numbers(20, 6, dtype=torch.float64), moment(inputs(100, 6).double())
    quantized = scales.nearest(target, scales.step_sizes(target, 0, 6), 0)
    root = torch.linalg.cholesky(hessian)
    design = torch.cat([root.T @ row.diag() for row in quantized])
    wanted = torch.linalg.lstsq(design, (target @ root).flatten().unsqueeze(1)).solution[:, 0]
    assert torch.allclose(scales.fit_columns(target, quantized, hessian), wanted)


@pytest.mark.parametrize("method", ["mse", "calibrated"])
def test_column_scales_help_where_columns_differ_in_size(method):
    """Of all methods the weight comes back unscaled, and with the bias the mean output is kept."""
    weight, x = numbers(48, 32) * numbers(32, seed=5).exp(), inputs(600, 32) / numbers(32, seed=5).exp()
    errors = {}
    for columns in ("", "power", "fitted"):
        made, shift = scales.round_matrix(weight, gathered(x), Scheme(method, columns=columns), True)
        outputs = x @ (made - weight).T + (0 if shift is None else shift)
        if method == "calibrated":
            assert outputs.mean(0).abs().max() < 1e-3 * (x @ weight.T).std()
        errors[columns] = outputs.square().mean().item()
    assert errors["power"] < 0.9 * errors[""] and errors["fitted"] < 0.98 * errors["power"]


def test_moments_that_are_not_finite_are_refused():
    x = inputs(40, 8)
    x[0, 0] = float("inf")
    with pytest.raises(Uncalibratable, match="its inputs' moments are not finite"):
        scales.round_matrix(numbers(4, 8), gathered(x), Scheme("mse", columns="power"), True)


@pytest.mark.parametrize("method", ["threshold", "mse"])
def test_heavy_tails_are_for_those_who_look_at_the_inputs(method):
    """A layer as of utils/random_flux.py: on other samples of its inputs, of which one is a hundred times the others,
    calibrated codes keep the outputs, those found from the weights alone do not."""
    generator = torch.Generator().manual_seed(0)
    weight, x = student_t((64, 128), generator), inputs(1200, 128) + 3 * numbers(128, seed=9)
    x[:, 40] = 100 + 10 * x[:, 40]
    seen, other = x[:800], x[800:]
    errors = {}
    for name in (method, "calibrated"):
        statistics = gathered(seen) if name == "calibrated" else None
        made, shift = scales.round_matrix(weight, statistics, Scheme(name), True)
        wrong = other @ (made - weight).T + (0 if shift is None else shift)
        errors[name] = (wrong.square().sum() / (other @ weight.T).square().sum()).item()
    assert errors["calibrated"] < 0.05 and errors[method] > 5 * errors["calibrated"]


# ------------------------------------------------------------------------------------------------- bits and verdict


def test_bits_a_weight_by_hand():
    shapes = [(6, 10), (3, 20)]  # 2 and 4 bytes a row
    codes = 6 * 16 + 3 * 32
    assert scales.bits_a_weight(shapes, Scheme("mse"), 16) == (codes + 16 * (6 + 3)) / 120
    assert scales.bits_a_weight(shapes, Scheme("mse", group=5), 32) == (codes + 32 * (6 * 2 + 3 * 4)) / 120
    assert scales.bits_a_weight(shapes, Scheme("mse", group=20), 16) == (codes + 16 * (6 + 3)) / 120
    assert scales.bits_a_weight(shapes, Scheme("mse", columns="power"), 16) == (codes + 16 * (6 + 3 + 10 + 20)) / 120
    assert scales.bits_a_weight([(1, 4)], Scheme("mse", w_bits=2), 16) == (8 + 16) / 4


def cell(scheme: Scheme, bits: float, nmse: float) -> dict:
    outputs = {place: {"nmse": nmse, "median_channel": nmse} for place in ("transformer_blocks.0", "velocity")}
    figures = {"bits_16": bits, "bits_32": bits, "weight_error": 0.2, "velocity_nmse": nmse, "outputs": outputs}
    return asdict(scheme) | figures


def test_finer_scales_are_judged_by_what_their_bits_buy_elsewhere(tmp_path):
    given = [
        (Scheme("mse"), 1.6, 0.4),
        (Scheme("mse", 2), 2.0, 0.1),
        (Scheme("mse", group=64), 1.8, 0.15),  # halfway: sqrt(0.4 · 0.1) = 0.2
        (Scheme("mse", group=128), 1.7, 0.27),  # a quarter of the way: 0.4^¾ · 0.1^¼
        (Scheme("mse", group=4), 5.6, 0.09),  # beyond 2 bits
        (Scheme("blockwise"), 1.6, 0.05),
    ]
    cells = {scheme.name: cell(scheme, bits, nmse) for scheme, bits, nmse in given}
    verdict = scales.judge(cells)
    assert verdict.keys() == {"mse, groups of 64", "mse, groups of 128", "mse, groups of 4"}
    assert verdict["mse, groups of 64"]["same_bits"] == pytest.approx(0.2)
    assert verdict["mse, groups of 64"]["ratio"] == pytest.approx(0.75) and verdict["mse, groups of 64"]["earns"]
    assert verdict["mse, groups of 128"]["same_bits"] == pytest.approx(0.4**0.75 * 0.1**0.25)
    assert not verdict["mse, groups of 128"]["earns"] and not verdict["mse, groups of 4"]["earns"]
    lines = scales.table(cells, verdict).splitlines()
    assert "| mse, groups of 64 | 1.800 | 1.800 | 0.200 | 0.15 | 0.75 | yes |" in lines
    scales.plot(cells, tmp_path / "scales.png")
    assert (tmp_path / "scales.png").stat().st_size > 10_000
    assert scales.judge({name: c for name, c in cells.items() if c["w_bits"] == 0}) == {}


def test_errors_of_outputs_far_from_zero():
    target = numbers(4, 50, 6, dtype=torch.float64) * torch.tensor([1, 1, 1, 1, 1, 300.0]) + 1000
    found = target + torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 900.0]) * numbers(4, 50, 6, seed=1)
    errors = scales.Errors()
    for i in range(4):
        errors.add(found[i].float(), target[i].float())
    found, target = found.view(-1, 6), target.view(-1, 6)
    each = (found - target).square().mean(0) / target.var(0, unbiased=False)
    wanted = {"nmse": ((found - target).square().sum() / target.square().sum()).item()}
    wanted["median_channel"] = each.median().item()  # of six, the third
    assert errors.figures() == pytest.approx(wanted, rel=1e-3)


# ------------------------------------------------------------------------------------------------------ the program

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLAGS = "--calibration_prompts 3 --num_prompts 2 --batch_size 2 --num_inference_steps 4 --stride 2 --dtype float32"
FLAGS += f" --device {DEVICE}"
FLAGS += " --block_steps 3 --block_batch_size 4 --groups 16 --methods threshold mse calibrated blockwise"


@pytest.mark.on_gpu
def test_the_table_of_a_small_pipeline(start, pipeline_folder, monkeypatch, capsys, tmp_path):
    """`mse` with rows is what the quantized model itself has; finished cells are not measured again."""
    command = ["compare_scales.py", "--model", pipeline_folder, "--output", tmp_path, *FLAGS.split()]
    assert start(scales.main, *command) == 0
    report = json.loads((tmp_path / "scales.json").read_text())
    cells = report["cells"]
    finer = ["rows", "groups of 16", "rows, columns power", "rows, columns fitted", "rows, 2 bits"]
    names = ["threshold, rows", *(f"{method}, {how}" for method in ("mse", "calibrated") for how in finer)]
    assert list(cells) == [*names, "blockwise, rows"] and len(report["verdict"]) == 6
    places = ["transformer_blocks.0", "single_transformer_blocks.0", "velocity"]
    for name, found in cells.items():
        assert list(found["outputs"]) == places and found["fell_back"] == {}, name
        assert 0 < found["velocity_nmse"] < 2 and found["bits_16"] < found["bits_32"], name
    assert cells["mse, groups of 16"]["weight_error"] < cells["mse, rows"]["weight_error"]
    assert cells["mse, rows"]["weight_error"] < cells["threshold, rows"]["weight_error"]
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in cells) and (tmp_path / "scales.png").exists()

    pipe = load_pipeline(str(pipeline_folder), torch.float32)
    prompts, _ = scales.pick_prompts(pipe, 2)
    settings = {"seed": 42, "size": 128, "num_inference_steps": 4, "guidance_scale": 3.5, "batch_size": 2}
    calls = record_calls(pipe, prompts, (0, 2), device=torch.device("cpu"), **settings)
    for call in calls:
        del call["weight"]
    teacher_calls = [(call, pipe.transformer(**call)[0].detach()) for call in calls]
    student = FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer", w_bits=0)
    wanted, _ = velocity_nmse(student, teacher_calls, 2, torch.device("cpu"))
    assert cells["mse, rows"]["velocity_nmse"] == pytest.approx(wanted, rel=1e-3)

    monkeypatch.setattr(scales, "measure", lambda *args: pytest.fail("measured again"))
    assert start(scales.main, *command) == 0
    assert start(scales.main, *command, "--seed", 1) == 1
    assert "scales.json: measured with seed=42, asked for 1" in capsys.readouterr().err


def test_a_layer_that_cannot_be_calibrated_is_named(start, pipeline_folder, monkeypatch, tmp_path):
    def refuse(*args):
        raise Uncalibratable("not positive definite")

    monkeypatch.setattr(scales, "calibrated", refuse)
    command = ["compare_scales.py", "--model", pipeline_folder, "--output", tmp_path, *FLAGS.split()]
    assert start(scales.main, *command, "--methods", "mse", "calibrated", "--groups", "--columns") == 0
    cells = json.loads((tmp_path / "scales.json").read_text())["cells"]
    fallen = cells["calibrated, rows"]["fell_back"]
    assert fallen["transformer_blocks.0.attn.to_q"] == "not positive definite"
    assert cells["calibrated, rows"]["velocity_nmse"] == pytest.approx(cells["mse, rows"]["velocity_nmse"], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--groups", 24], 1, "--groups 24: transformer_blocks.0.norm1.linear has 32 inputs, no multiple of it"),
        (["--groups", 0], 2, "--groups must be at least 1, got 0"),
        (["--block_learning_rate", 0], 2, "--block_learning_rate must be above 0, got 0"),
        (["--num_prompts", 0], 2, "--num_prompts must be at least 1, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(flags, status, message, start, pipeline_folder, capsys, tmp_path):
    command = ["compare_scales.py", "--model", pipeline_folder, "--output", tmp_path / "none", "--device", "cpu"]
    assert start(scales.main, *command, *flags) == status
    assert message in capsys.readouterr().err and not (tmp_path / "none").exists()
