"""Replaying a FLUX transformer's steps. Where there is no GPU, something that replays in plain Python stands in for the
graph: what is tested is what goes in and what comes out."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch.nn import functional as F

from models.modeling_flux_quant import FluxTransformer2DModel as QuantizedFlux
from utils import cuda_graph

pytestmark = pytest.mark.on_gpu

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if GPU else "cpu")


@pytest.fixture
def captures(monkeypatch):
    """The number of graphs that were captured, as the length of a list."""
    made = []

    def stand_in(step):
        output = step()

        def replay():
            output.copy_(step())

        return replay, output

    real = cuda_graph.captured if GPU else stand_in
    monkeypatch.setattr(cuda_graph, "captured", lambda step: made.append(step) or real(step))
    return made


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model.to(DEVICE).eval()


def inputs(seed, count=1):
    torch.manual_seed(seed)
    given = {
        "hidden_states": torch.randn(count, 4, 16),
        "encoder_hidden_states": torch.randn(count, 3, 32),
        "pooled_projections": torch.randn(count, 32),
        "timestep": torch.rand(count),
        "guidance": torch.rand(count),
        "img_ids": torch.rand(4, 3).round(),
        "txt_ids": torch.zeros(3, 3),
    }
    return {name: tensor.to(DEVICE) for name, tensor in given.items()}


@torch.no_grad()
def test_replays_give_what_the_transformer_gives(transformer, captures):
    replayed = cuda_graph.replayed(transformer.forward, DEVICE, {})
    calls = [(1, 1), (2, 1), (3, 2), (4, 1), (5, 2)]  # seed, pictures
    found = [replayed(**inputs(*call), joint_attention_kwargs={}, return_dict=False)[0] for call in calls]
    assert len(captures) == 2  # one for each number of pictures
    for call, sample in zip(calls, found, strict=True):  # compared at the end: no step wrote over an earlier one
        torch.testing.assert_close(sample, transformer(**inputs(*call)).sample, rtol=1e-4, atol=1e-5)
    assert torch.equal(replayed(**inputs(1)).sample, found[0])


def test_what_cannot_be_replayed_runs_as_before(transformer, captures):
    replayed, given = cuda_graph.replayed(transformer.forward, DEVICE, {}), inputs(1)
    residuals = [torch.ones(1, 4, 32, device=DEVICE)]
    with torch.no_grad():
        found = replayed(**given, controlnet_block_samples=residuals).sample
        torch.testing.assert_close(found, transformer(**given, controlnet_block_samples=residuals).sample)
        positional = [given.pop(name) for name in ("hidden_states", "encoder_hidden_states")]
        torch.testing.assert_close(replayed(*positional, **given).sample, transformer(*positional, **given).sample)
    replayed(**inputs(1)).sample.sum().backward()  # the only one with a gradient
    assert transformer.proj_out.weight.grad is not None
    assert not captures


@torch.no_grad()
def test_steps_compile(transformer, captures, monkeypatch):
    asked = []
    monkeypatch.setattr(transformer, "compile_repeated_blocks", lambda **settings: asked.append(settings))
    expected = transformer(**inputs(1)).sample
    assert cuda_graph.compile_steps(transformer) is transformer
    assert asked == [{"fullgraph": True, "dynamic": False, "options": cuda_graph.compile_options(DEVICE)}]
    torch.testing.assert_close(transformer(**inputs(1)).sample, expected)
    assert len(captures) == GPU


@torch.no_grad()
def test_blocks_compile_for_more_sizes_than_torch_compiles_for_unasked(transformer, monkeypatch):
    """The ninth is an error (torch 2.11, 2.13); here, for quickness, the second would be."""
    torch._dynamo.reset()
    compile_blocks = transformer.compile_repeated_blocks
    monkeypatch.setattr(
        transformer, "compile_repeated_blocks",
        lambda options, **settings: compile_blocks(backend="eager", **settings),
    )  # fmt: skip
    expected = [transformer(**inputs(1, count)).sample for count in (1, 2)]
    with torch._dynamo.config.patch(recompile_limit=1):  # monkeypatch would leave it hidden from all later tests
        cuda_graph.compile_steps(transformer)
        for count, sample in enumerate(expected, 1):
            torch.testing.assert_close(transformer(**inputs(1, count)).sample, sample)


CHANGES = {
    "mode": lambda model: model.set_inference_mode("fast"),
    "adapter": lambda model: model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["proj_mlp"])),
    "disabled": lambda model: model.disable_adapters(),
    "removed": lambda model: model.delete_adapters("default"),
    "other weights": lambda model: model.to(torch.float64).to(torch.float32),
}


@torch.no_grad()
def test_a_changed_transformer_is_not_replayed_as_it_was(captures):
    torch.manual_seed(0)
    settings = {"in_channels": 16, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32}
    settings |= {"pooled_projection_dim": 32, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6)}
    model = QuantizedFlux(**settings, num_layers=1, num_single_layers=1, w_bits=0).pack().to(DEVICE)
    forward = model.forward
    cuda_graph.replay_steps(model)
    model(**inputs(1))
    model.to(DEVICE)
    model(**inputs(2))
    assert len(captures) == 1  # moved to where it was
    for number, (name, change) in enumerate(CHANGES.items(), 2):
        before = model(**inputs(1)).sample
        change(model)
        sample = model(**inputs(1)).sample
        assert len(captures) == number, name
        torch.testing.assert_close(sample, forward(**inputs(1)).sample, rtol=1e-4, atol=1e-5)
        if name in ("adapter", "disabled"):
            assert not torch.equal(sample, before), name


def test_pictures_are_drawn_in_inference_mode_and_out_of_it(transformer, captures):
    replayed = cuda_graph.replayed(transformer.forward, DEVICE, {})
    with torch.no_grad():
        expected = transformer(**inputs(2)).sample
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            replayed(**inputs(1))
            torch.testing.assert_close(replayed(**inputs(2)).sample, expected, rtol=1e-4, atol=1e-5)


def test_what_lies_elsewhere_is_not_replayed(transformer, captures):
    """A graph records the work of one device: on another all its replays would leave the first step's output."""
    replayed = cuda_graph.replayed(transformer.forward, torch.device("meta"), {})
    with torch.no_grad():
        torch.testing.assert_close(replayed(**inputs(1)).sample, transformer(**inputs(1)).sample)
    assert not captures


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@torch.no_grad()
def test_steps_are_replayed_on_another_gpu_than_the_current_one(transformer):
    cuda_graph.captured(lambda: torch.ones(2, device="cuda:0") * 2)
    there = transformer.to("cuda:1")
    given = [{name: tensor.to("cuda:1") for name, tensor in inputs(seed).items()} for seed in (1, 2, 3)]
    expected = [there(**each).sample for each in given]
    cuda_graph.replay_steps(there)
    assert torch.cuda.current_device() == 0
    for each, sample in zip(given, expected, strict=True):
        torch.testing.assert_close(there(**each).sample, sample, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_a_captured_step_reads_its_inputs_anew():
    x = torch.randn(4, device=DEVICE)
    replay, output = cuda_graph.captured(lambda: F.relu(x) * 2)
    x.copy_(torch.tensor([1.0, -1.0, 2.0, 3.0]))
    replay()
    assert output.tolist() == [2, 0, 4, 6]
