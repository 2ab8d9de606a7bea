"""Loading the transformer of a pipeline or of an earlier run."""

from types import SimpleNamespace

import diffusers
import pytest
import torch

from models.modeling_flux_quant import FluxTransformer2DModel
from utils.checkpoints import load_quantized_model


def arguments(name, **settings):
    training = SimpleNamespace(dtype=None)
    quantizer = {"lora_r": 0, "lora_alpha": 1.0, "clip_init": "mse", "quantize_modulation": True}
    return SimpleNamespace(input_model_filename=str(name), device="cpu", offload=None, **quantizer | settings), training


def test_load_quantized_model(pipeline_folder, tmp_path):
    import sanity

    assert sanity.load_quantized_model is load_quantized_model
    args = arguments(pipeline_folder)
    stock = diffusers.FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer")
    assert load_quantized_model(*args).config.w_bits == 16
    ternary = load_quantized_model(*args, w_bits=0)
    assert isinstance(ternary, FluxTransformer2DModel) and ternary.config.w_bits == 0
    for name, parameter in stock.named_parameters():
        assert torch.equal(ternary.get_parameter(name), parameter), name

    for parameter in ternary.parameters():
        parameter.data += 1
    ternary.save_pretrained(tmp_path)
    cached = load_quantized_model(*args, tmp_path, w_bits=0)
    assert torch.equal(cached.proj_out.weight, stock.proj_out.weight + 1)
    with pytest.raises(ValueError, match=f"^{tmp_path}: asked for w_bits=4 .* with w_bits=0"):
        load_quantized_model(*args, tmp_path, w_bits=4)
    fresh = load_quantized_model(*args, tmp_path / "nothing yet", w_bits=4)
    assert fresh.config.w_bits == 4 and torch.equal(fresh.proj_out.weight, stock.proj_out.weight)
