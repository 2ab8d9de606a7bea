"""utils/widen.py: a wider model is the same function, and its weights are no copies."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from utils.widen import copies_differ, widen, width_of

SMALL = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
    "joint_attention_dim": 32, "pooled_projection_dim": 24, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


@pytest.fixture
def narrow() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**SMALL)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: none may be zero or one
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def inputs(dtype: torch.dtype) -> dict:
    generator = torch.Generator().manual_seed(1)
    shapes = {"hidden_states": (2, 9, 16), "encoder_hidden_states": (2, 5, 32), "pooled_projections": (2, 24)}
    found = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    ids = {"img_ids": torch.rand(9, 3, generator=generator) * 4, "txt_ids": torch.zeros(5, 3)}
    return found | ids | {"timestep": torch.tensor([0.2, 0.9]).to(dtype), "guidance": torch.tensor([1.0, 3.5])}


@pytest.mark.parametrize("copies", [2, 3])
def test_a_wider_model_computes_the_same(narrow, copies):
    wide = widen(narrow, 32 * copies, seed=3)
    assert (wide.config.num_attention_heads, wide.config.attention_head_dim) == (2 * copies, 16)
    assert width_of(wide.config) == 32 * copies
    found, expected = (model.double()(**inputs(torch.float64)).sample for model in (wide, narrow))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # diffusers computes some of it in fp32
    assert expected.std() > 0.1


def test_weights_have_the_variance_of_their_width_and_no_equals(narrow):
    wide = widen(narrow, 128, seed=3)
    for name in ("transformer_blocks.0.ff.net.2.weight", "single_transformer_blocks.1.proj_out.weight"):
        old, new = narrow.get_parameter(name), wide.get_parameter(name)
        assert new.shape == (4 * old.shape[0], 4 * old.shape[1])
        ratio = (old.square().mean() / new.square().mean()).item()
        assert ratio == pytest.approx(4, rel=0.05)
        assert len(new.unique()) > 0.99 * new.numel()
        # in runs of 32 channels, four copies each: their weights add up to the old one
        added = new.view(len(new), -1, 4, 32).sum(2).flatten(1)
        torch.testing.assert_close(added, old.view(-1, 1, 32, old.shape[1]).expand(-1, 4, -1, -1).reshape(added.shape))


def test_how_far_copies_have_come_apart():
    torch.manual_seed(0)
    channels = torch.randn(4000, 8)
    assert copies_differ(torch.cat([channels] * 3, -1), 3, 8) == pytest.approx(0, abs=1e-6)
    assert copies_differ(torch.randn(4000, 24), 3, 8) == pytest.approx(1, abs=0.05)
    shifted = torch.cat([channels, channels + 5], -1)  # a mean of its own is no difference
    assert copies_differ(shifted, 2, 8) == pytest.approx(0, abs=1e-5)


def test_training_takes_copies_apart(narrow):
    wide = widen(narrow, 64, seed=3)
    kept: list[torch.Tensor] = []
    wide.single_transformer_blocks[-1].register_forward_hook(lambda _, __, output: kept.append(output[1].detach()))
    optimizer = torch.optim.AdamW(wide.parameters(), lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        (wide(**inputs(torch.float32)).sample - 1).square().mean().backward()
        optimizer.step()
    differences = [copies_differ(hidden, 2, 32) for hidden in kept]
    assert differences[0] < 1e-6 and differences[-1] > 1e-4
    assert differences == sorted(differences)


@pytest.mark.parametrize("width", [32, 48, 16])
def test_another_width_is_named(narrow, width):
    with pytest.raises(ValueError, match=rf"^--width {width}: no multiple of 32, the width to start from; use 64"):
        widen(narrow, width, seed=0)
