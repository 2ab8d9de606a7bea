"""What FLUX.1's transformer has of its own; the rest is tested in test_quantized_model.py."""

import diffusers
import pytest
import torch
from tiny_models import inputs, output, stock

from models.modeling_flux_quant import FluxTransformer2DModel


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """diffusers' model, and the folder of its checkpoint."""
    folder, model = tmp_path_factory.mktemp("plain"), stock("FLUX.1")
    model.save_pretrained(folder)
    return model, folder


def test_residuals_of_a_controlnet_in_full_precision_are_added_as_by_diffusers(plain):
    reference, folder = plain
    model = FluxTransformer2DModel.from_pretrained(folder)
    residuals = {
        "controlnet_block_samples": [torch.randn(2, 6, 32) for _ in range(2)],
        "controlnet_single_block_samples": [torch.randn(2, 6, 32) for _ in range(2)],
    }
    assert torch.equal(output(model, **residuals), output(reference, **residuals))
    assert not torch.equal(output(model, **residuals), output(model))


def test_pipelines_take_and_save_it(plain, tmp_path):
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    diffusers.FluxPipeline(scheduler, transformer=plain[0], **parts).save_pretrained(tmp_path / "base")
    model = FluxTransformer2DModel.from_pretrained(plain[1], w_bits=0)
    pipe = diffusers.FluxPipeline.from_pretrained(tmp_path / "base", transformer=model, **parts)
    assert pipe.transformer is model
    pipe.save_pretrained(tmp_path / "pipe")
    again = diffusers.FluxPipeline.from_pretrained(tmp_path / "pipe", **parts).transformer
    assert isinstance(again, FluxTransformer2DModel)
    assert torch.equal(output(again), output(model))


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("trained", [False, True])
def test_compiled_blocks_of_a_kind_are_one_graph_and_change_nothing(plain, pictures, trained):
    model = FluxTransformer2DModel.from_pretrained(plain[1]).train(trained)
    given = inputs(model.config)
    for name, part in given.items():
        if torch.is_tensor(part) and not name.endswith("_ids"):
            given[name] = part[:pictures]

    def found():
        model.zero_grad()
        with torch.set_grad_enabled(trained):
            velocity = model(**given)[0]
        if trained:
            velocity.square().mean().backward()
        return [velocity, *(parameter.grad for parameter in model.parameters() if trained)]

    expected, graphs = found(), torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    try:
        for _ in range(2):  # asking twice is asking once
            model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend="eager")
        before = graphs["unique_graphs"]
        for first, second in zip(found(), expected, strict=True):
            assert torch.equal(first, second)
        assert graphs["unique_graphs"] - before == 2
        assert len(model.transformer_blocks[-1]._forward_hooks) == 1
    finally:
        torch._dynamo.reset()
