"""One-shot rounding against plain formulas and brute force."""

import pytest
import torch
from diffusers import FluxPipeline

from models.modeling_flux_quant import FluxTransformer2DModel
from models.packing import PackedLinear, unpack_codes, unpack_trits
from models.utils_quant import code_grid, init_clip_val, quantize
from utils import oneshot
from utils.sampling import generate_images, record_inputs, record_velocities
from utils.walk import Work, first_inputs, make_block, stored_tensors

CPU = torch.device("cpu")


def test_threshold_is_the_published_rule_at_the_least_squares_scale():
    weight = torch.tensor([[1.0, -0.04, 0.06, -0.5], [0.0, 0.0, 0.0, 0.0]])
    codes, alpha = oneshot.threshold_codes(weight, 0.05)
    assert codes.tolist() == [[1, 0, 1, -1], [0, 0, 0, 0]]
    assert alpha[0].item() * 2 / 3 == pytest.approx((1 + 0.06 + 0.5) / 3)
    assert alpha.isfinite().all()


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4, 8])
def test_mse_is_the_quantizer_at_its_error_minimal_step(bits):
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    codes, alpha = oneshot.round_weight(weight, bits, "mse", 0.05)
    n, s = code_grid(bits)
    assert torch.equal(alpha * ((codes.float() + s) / n), quantize(weight, init_clip_val(weight, bits), bits))


def exact_moments(x, t, weights):
    """Means, covariance and cross-covariance in float64 of samples x, t [calls, N, in], calls weighted."""
    share = torch.tensor(weights).double().repeat_interleave(x.shape[1])
    share /= share.sum()
    x, t = (tensor.reshape(-1, tensor.shape[-1]).double() for tensor in (x, t))
    mean, teacher_mean = share @ x, share @ t
    x, t = x - mean, t - teacher_mean
    return mean, teacher_mean, x.T @ (share[:, None] * x), t.T @ (share[:, None] * x)


@pytest.mark.parametrize(("samples", "width"), [(10, 4), (1, 6)])
def test_moments_are_weighted_covariances(samples, width):
    generator, weights = torch.Generator().manual_seed(2), [1.0, 2.0, 0.5]
    x, t = torch.randn(2, 3, samples, width, generator=generator).unbind()
    statistics = oneshot.Statistics(width, CPU)
    for i, weight in enumerate(weights):
        statistics.add(x[i], t[i], weight)
    for found, wanted in zip(statistics.moments(), exact_moments(x, t, weights), strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)


def test_moments_do_not_cancel_far_from_zero():
    """Means 3,000 times the spread, drifting from call to call, and channels a hundred times the others."""
    generator, weights = torch.Generator().manual_seed(5), [1.0, 0.3, 2.0, 1.0]
    scale = torch.ones(16)
    scale[:4] = 100
    x, t = torch.randn(2, 4, 500, 16, generator=generator).mul_(scale).unbind()
    drift = torch.randn(4, 1, 16, generator=generator) * scale
    x, t = x + drift + 3000 * scale, t - drift - 3000 * scale
    t += x / 2
    statistics = oneshot.Statistics(16, CPU)
    for i, weight in enumerate(weights):
        statistics.add(x[i], t[i], weight)
    wanted = exact_moments(x, t, weights)
    unit = torch.outer(scale, scale)
    for found, exact in zip(statistics.moments()[2:], wanted[2:], strict=True):
        assert ((found - exact) / unit).abs().max() < 1e-3 * (exact / unit).abs().max()


def dequantized(codes, alpha, bits):
    n, s = code_grid(bits)
    return alpha * ((codes.float() + s) / n)


def correlated(samples, width, generator, spread=-2):
    mix = torch.randn(width, width, generator=generator) @ torch.diag(torch.logspace(0, spread, width))
    return torch.randn(samples, width, generator=generator) @ mix.T + 1


def test_a_calibrated_layer_keeps_its_outputs_better_than_a_rounded_one():
    """On other inputs of the same distribution; its mean output is kept whatever the codes."""
    generator = torch.Generator().manual_seed(3)
    inputs, unseen = correlated(4000, 32, generator).split(2000)
    layer = torch.nn.Linear(32, 16)
    statistics = oneshot.Statistics(32, CPU)
    statistics.add(inputs, inputs, 1.0)
    codes, alpha, shift = oneshot.calibrate_weight(layer.weight, statistics, 0)
    with torch.no_grad():
        bias = layer.bias + shift
        calibrated = torch.nn.functional.linear(unseen, dequantized(codes, alpha, 0), bias)
        rounded = torch.nn.functional.linear(
            unseen, quantize(layer.weight, init_clip_val(layer.weight, 0), 0), layer.bias
        )
        wanted = layer(unseen)
        mean = torch.nn.functional.linear(inputs, dequantized(codes, alpha, 0), bias).mean(0)
    assert (calibrated - wanted).square().mean() < 0.3 * (rounded - wanted).square().mean()
    torch.testing.assert_close(mean, layer(inputs).mean(0).detach(), atol=1e-4, rtol=0)


def test_a_layer_without_a_bias_makes_up_for_means_with_its_codes():
    """Its moments are about zero, which the formula in float64 says; its outputs are kept, their mean among them."""
    generator = torch.Generator().manual_seed(4)
    inputs, unseen = (correlated(4000, 32, generator) + 2 * torch.randn(32, generator=generator)).split(2000)
    weight = torch.randn(16, 32, generator=generator)
    statistics = oneshot.Statistics(32, CPU)
    statistics.add(inputs[:500], inputs[:500] + 0.5, 3.0)
    statistics.add(inputs[500:], inputs[500:] + 0.5, 1.0)
    *_, square, cross = statistics.moments(centred=False)
    x = inputs.double()
    counts = torch.where(torch.arange(2000) < 500, 3.0, 1.0).double()[:, None]
    torch.testing.assert_close(square.double(), x.T @ (counts * x) / counts.sum(), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(cross.double(), (x + 0.5).T @ (counts * x) / counts.sum(), atol=1e-3, rtol=1e-4)

    errors = {}
    for has_bias in (False, True):
        statistics = oneshot.Statistics(32, CPU)
        statistics.add(inputs, inputs, 1.0)
        codes, alpha, shift = oneshot.calibrate_weight(weight, statistics, 0, has_bias=has_bias)
        assert has_bias or not shift.any()
        errors[has_bias] = (unseen @ (dequantized(codes, alpha, 0) - weight).T).square().mean().item()
    rounded = quantize(weight, init_clip_val(weight, 0), 0)
    assert errors[False] < 0.5 * errors[True]  # moments about the mean leave the mean to a bias, which is not there
    assert errors[False] < 0.3 * (unseen @ (rounded - weight).T).square().mean()


def test_the_target_undoes_what_earlier_layers_did():
    """Without rounding errors to speak of (8 bits), the layer on bent inputs gives what it gave on the teacher's."""
    generator = torch.Generator().manual_seed(6)
    teacher = torch.randn(4000, 16, generator=generator)
    bent = teacher @ (torch.eye(16) + 0.2 * torch.randn(16, 16, generator=generator)).T + 0.5
    weight = torch.randn(8, 16, generator=generator)
    wanted, errors = teacher @ weight.T, {}
    for without in ([], ["target"]):
        statistics = oneshot.Statistics(16, CPU)
        statistics.add(bent, teacher, 1.0)
        codes, alpha, shift = oneshot.calibrate_weight(weight, statistics, 8, without)
        errors[len(without)] = (bent @ dequantized(codes, alpha, 8).T + shift - wanted).square().mean().item()
    assert errors[0] < 0.2 * errors[1]


def test_stacked_layers_are_rounded_as_each_would_be_alone():
    generator = torch.Generator().manual_seed(7)
    inputs, weight = correlated(500, 40, generator), torch.randn(24, 40, generator=generator)

    def calibrated(rows):
        statistics = oneshot.Statistics(40, CPU)
        statistics.add(inputs, inputs + 0.1, 1.0)
        return oneshot.calibrate_weight(weight[rows], statistics, 0)

    whole, parts = calibrated(slice(24)), [calibrated(slice(8)), calibrated(slice(8, 24))]
    for i, found in enumerate(whole):
        torch.testing.assert_close(torch.cat([part[i] for part in parts]), found, atol=1e-5, rtol=1e-5)


def test_damping_rises_until_the_covariance_can_be_factorized():
    """A matrix with a negative eigenvalue of 0.3 of its mean diagonal, as rounding errors may leave one."""
    generator = torch.Generator().manual_seed(8)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    values = torch.tensor([-0.3, 0.1, 0.5, 0.7, 1.0, 1.5, 2.0, 2.5])
    hessian = basis @ torch.diag(values) @ basis.T
    damped = hessian.clone()
    factor, added = oneshot._damped(damped)
    assert added == pytest.approx(0.05 * 4**2 * values.mean().item(), rel=1e-3)
    torch.testing.assert_close(damped, hessian + added * torch.eye(8))
    torch.testing.assert_close(factor @ factor.T, damped)
    with pytest.raises(oneshot.Uncalibratable, match="not positive definite, damped by"):
        oneshot._damped(hessian - 100 * torch.eye(8))


@pytest.fixture
def recorded(pipeline_folder):
    pipe = FluxPipeline.from_pretrained(pipeline_folder)
    with record_inputs(pipe.transformer, lambda number: True) as calls:
        generate_images(pipe, ["a red star", "two rings"], num_inference_steps=2, batch_size=2)
    return pipe.transformer, calls


def test_calibration_covers_every_block_linear_and_leaves_no_hooks(recorded, pipeline_folder, tmp_path):
    transformer, calls = recorded
    before = {name: p.detach().clone() for name, p in transformer.named_parameters()}
    work = Work(tmp_path, {})
    oneshot.calibrate(transformer, calls, [1.0, 1.0], 2, work)
    student = FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer", w_bits=2).pack()
    names = {n for n, m in student.named_modules() if isinstance(m, PackedLinear)}
    stored = dict(stored_tensors(transformer, work))
    assert stored.keys() == {name for name, _ in student.named_parameters()}
    layers = {}
    for block in ("transformer_blocks.0", "single_transformer_blocks.0"):
        notes = work.notes(block)
        layers |= notes["layers"]
        assert notes["fell_back"] == {}
    assert layers.keys() == names
    for name, (squared, energy) in layers.items():
        layer = student.get_submodule(name)
        codes, alpha = stored[f"{name}.weight_codes"], stored[f"{name}.weight_clip_val"]
        weight = before[f"{name}.weight"]
        values = PackedLinear.from_codes(unpack_codes(codes, 2, layer.in_features), alpha, None, 2).dequantize()
        assert squared == pytest.approx((weight - values).square().sum().item(), rel=1e-4)
        assert energy == pytest.approx(weight.square().sum().item(), rel=1e-4)
    for name, value in stored.items():
        if name.rpartition(".")[0] not in names:
            assert torch.equal(value, before[name]), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in transformer.modules())


def test_a_layer_that_cannot_be_calibrated_falls_back_to_mse_and_is_named(recorded, tmp_path, monkeypatch):
    """Here one group of layers gets an infinite input."""
    transformer, calls = recorded
    attention = transformer.transformer_blocks[0].attn
    wanted = quantize(attention.to_out[0].weight, init_clip_val(attention.to_out[0].weight, 0), 0).detach()
    add = oneshot.Statistics.add
    number = iter(range(100))

    def spoiled(self, x, t, weight):
        add(self, x * (torch.inf if next(number) in (4, 5) else 1), t, weight)  # the third group's

    monkeypatch.setattr(oneshot.Statistics, "add", spoiled)
    work = Work(tmp_path, {})
    oneshot.calibrate(transformer, calls[:1], [1.0], 0, work)
    notes = [work.notes(name)["fell_back"] for name in ("transformer_blocks.0", "single_transformer_blocks.0")]
    names = [f"transformer_blocks.0.attn.{name}" for name in ("to_out.0", "to_add_out")]
    assert notes == [dict.fromkeys(names, "its inputs' moments are not finite"), {}]
    stored = work.block("transformer_blocks.0")
    codes = unpack_trits(stored["transformer_blocks.0.attn.to_out.0.weight_codes"], wanted.shape[1])
    found = dequantized(codes, stored["transformer_blocks.0.attn.to_out.0.weight_clip_val"], 0)
    torch.testing.assert_close(found, wanted)


def test_a_weight_of_nan_is_named(recorded, tmp_path):
    transformer, calls = recorded
    with torch.no_grad():
        transformer.transformer_blocks[0].ff.net[2].weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"transformer_blocks.0.ff.net.2: its weight holds NaN or inf"):
        oneshot.calibrate(transformer, calls[:1], [1.0], 0, Work(tmp_path, {}))


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


def test_moments_are_those_of_each_layers_own_inputs(recorded):
    """Layers with one input share one object; the teacher's inputs are those that the block's own parameters make."""
    transformer, calls = recorded
    module = transformer.transformer_blocks[0]
    block = make_block(transformer, "transformer_blocks.0", first_inputs(transformer, calls, CPU))
    finished = {name: p.detach() * 1.5 for name, p in module.named_parameters()}
    linears = {name: m for name, m in module.named_modules() if isinstance(m, torch.nn.Linear)}
    weights = [1.0, 3.0]

    def inputs(parameters):
        seen = {name: [] for name in linears}
        hooks = [m.register_forward_pre_hook(lambda _, args, n=n: seen[n].append(args[0])) for n, m in linears.items()]
        for i in range(len(calls)):
            with torch.no_grad():
                torch.func.functional_call(module, parameters, kwargs=block.teacher_inputs(i))
        for hook in hooks:
            hook.remove()
        return seen

    teachers, students = inputs({}), inputs(finished)
    covered = []
    for group in block.order:
        names = [name for name in linears if name in group]
        with torch.no_grad():
            found = oneshot.collect(block, names, finished, weights)
        for together, statistics in found:
            covered += together
            moments = statistics.moments()
            for name in together:
                expected = oneshot.Statistics(linears[name].in_features, CPU)
                for x, t, weight in zip(students[name], teachers[name], weights, strict=True):
                    expected.add(x, t, weight)
                for a, b in zip(moments, expected.moments(), strict=True):
                    torch.testing.assert_close(a, b)
    assert sorted(covered) == sorted(linears)
    qkv = oneshot.collect(block, ["attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj"], finished, weights)
    assert [names for names, _ in qkv] == [["attn.to_q", "attn.to_k", "attn.to_v"], ["attn.add_q_proj"]]
