"""Replaying a FLUX transformer's steps. Where there is no GPU, something that replays in plain Python stands in for the
graph: what is tested is what goes in and what comes out."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch.nn import functional as F

from utils import cuda_graph

pytestmark = pytest.mark.on_gpu

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


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
    replayed = cuda_graph.replayed(transformer.forward)
    calls = [(1, 1), (2, 1), (3, 2), (4, 1), (5, 2)]  # seed, pictures
    found = [replayed(**inputs(*call), joint_attention_kwargs={}, return_dict=False)[0] for call in calls]
    assert len(captures) == 2  # one for each number of pictures
    for call, sample in zip(calls, found, strict=True):  # compared at the end: no step wrote over an earlier one
        torch.testing.assert_close(sample, transformer(**inputs(*call)).sample, rtol=1e-4, atol=1e-5)
    assert torch.equal(replayed(**inputs(1)).sample, found[0])


def test_what_cannot_be_replayed_runs_as_before(transformer, captures):
    replayed, given = cuda_graph.replayed(transformer.forward), inputs(1)
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


@pytest.mark.gpu
def test_a_captured_step_reads_its_inputs_anew():
    x = torch.randn(4, device=DEVICE)
    replay, output = cuda_graph.captured(lambda: F.relu(x) * 2)
    x.copy_(torch.tensor([1.0, -1.0, 2.0, 3.0]))
    replay()
    assert output.tolist() == [2, 0, 4, 6]
