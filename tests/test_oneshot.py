"""One-shot rounding against plain formulas and brute force."""

import itertools

import pytest
import torch
from diffusers import FluxPipeline

from models.modeling_flux_quant import FluxTransformer2DModel
from models.packing import PackedLinear
from models.utils_quant import code_grid, init_clip_val, quantize, quantize_codes
from utils import oneshot
from utils.sampling import generate_images, record_inputs, record_velocities


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


def test_calibration_covers_every_block_linear_once_frees_it_and_leaves_no_hooks(pipeline_folder):
    pipe = FluxPipeline.from_pretrained(pipeline_folder)
    before = {name: p.detach().clone() for name, p in pipe.transformer.named_parameters()}
    with record_velocities(pipe.transformer) as calls:
        generate_images(pipe, ["a red star", "two rings"], num_inference_steps=2, batch_size=2)
    done = []
    oneshot.calibrate(
        pipe.transformer, [inputs for inputs, _ in calls], [1.0, 1.0], 2, lambda *found: done.append(found)
    )
    student = FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer", w_bits=2).pack()
    assert sorted(n for n, *_ in done) == sorted(n for n, m in student.named_modules() if isinstance(m, PackedLinear))
    assert all(torch.equal(weight, before[f"{name}.weight"]) for name, _, weight in done)
    freed = {f"{name}.{kind}" for name, *_ in done for kind in ("weight", "bias")}
    for name, parameter in pipe.transformer.named_parameters():
        assert parameter.is_meta if name in freed else torch.equal(parameter, before[name]), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.transformer.modules())


def test_recorded_inputs_are_those_of_the_wanted_calls(pipeline_folder):
    pipe = FluxPipeline.from_pretrained(pipeline_folder)
    with record_velocities(pipe.transformer) as every, record_inputs(pipe.transformer, (1, 2).count) as calls:
        generate_images(pipe, ["a red star"], num_inference_steps=4)
    assert len(calls) == 2 and not pipe.transformer._forward_pre_hooks
    for found, (wanted, _) in zip(calls, every[1:3], strict=True):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
    assert calls[0]["encoder_hidden_states"] is calls[1]["encoder_hidden_states"]


def test_moments_are_those_of_each_layers_own_inputs(pipeline_folder):
    """Layers with one input share one object; the teacher's inputs are those that the original parameters make."""
    pipe = FluxPipeline.from_pretrained(pipeline_folder)
    with record_inputs(pipe.transformer, lambda number: True) as calls:
        generate_images(pipe, ["a red star", "two rings"], num_inference_steps=2)
    block, cpu = pipe.transformer.transformer_blocks[0], torch.device("cpu")
    streams = [oneshot.block_inputs(pipe.transformer, calls, cpu)] * 2
    original = {name: p.detach() * 1.5 for name, p in block.named_parameters()}
    layers = {name: m for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    weights = [1.0, 2.0, 3.0, 4.0]
    found = oneshot._collect(block, original, layers, streams, weights, cpu)
    assert found["attn.to_q"] is found["attn.to_v"] and found["attn.to_q"] is not found["attn.add_q_proj"]
    assert len(found) == len(layers) == 14

    def inputs(parameters):
        seen = {name: [] for name in layers}
        hooks = [m.register_forward_pre_hook(lambda _, args, n=n: seen[n].append(args[0])) for n, m in layers.items()]
        for call in streams[0]:
            with torch.no_grad():
                torch.func.functional_call(block, parameters, kwargs=call)
        for hook in hooks:
            hook.remove()
        return seen

    students, teachers = inputs({}), inputs(original)
    for name, layer in layers.items():
        expected = oneshot.Statistics(layer.in_features, cpu)
        for x, t, weight in zip(students[name], teachers[name], weights, strict=True):
            expected.add(x, t, weight)
        for a, b in zip(found[name].moments(), expected.moments(), strict=True):
            torch.testing.assert_close(a, b)


def test_only_one_block_and_one_call_are_away_from_the_cpu(pipeline_folder, monkeypatch):
    """As seen from the calls of .to(): each block goes to the device once, the next only when it is back."""
    pipe = FluxPipeline.from_pretrained(pipeline_folder)
    with record_inputs(pipe.transformer, lambda number: True) as calls:
        generate_images(pipe, ["a red star"], num_inference_steps=1)
    moves, device = [], torch.device("cpu", 0)
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    for i, block in enumerate(blocks):
        monkeypatch.setattr(block, "to", lambda where, i=i: moves.append((i, where)))
        monkeypatch.setattr(block, "_apply", lambda fn, i=i: moves.append((i, fn(torch.zeros(1)).device)))
    oneshot.calibrate(pipe.transformer, calls, [1.0], 0, lambda *found: None, device)
    assert moves == [(0, device), (0, torch.device("cpu")), (1, device), (1, torch.device("cpu"))]
