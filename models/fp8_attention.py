"""Attention in 8 bits, where it is asked for: FlashAttention 3 in e4m3 (arXiv 2407.08608, section 3.3), on Hopper.

Queries and keys come normalized (norm_rotate): no number exceeds √width times its norm's largest weight, so they are
rounded as they are; e4m3 reaches 448. Values are rounded in steps of their own for each head, max|v| / 448. The kernel
rounds softmax's numerators, 0 … 1, times 256, and adds up in fp32. It comes with the package fa3-fwd.
"""

import importlib.util

import torch
from torch import Tensor, nn

from models.kernels import FP8

NAME = "fp8"  # among the backends of attention; the others are diffusers'
WIDEST = 256  # heads; multiples of 16


def choose(model: nn.Module | None = None) -> None:
    """Let the attention of fast mode in `model`, a QuantizedTransformer, be computed in 8 bits.

    ValueError, in one line, where that cannot be; without a model, that is all.
    """
    found = torch.cuda.get_device_capability() if torch.cuda.is_available() and torch.version.hip is None else None
    if found != (9, 0):
        here = f"this one has {found[0]}.{found[1]}" if found else "there is none"
        raise ValueError(f"it wants an NVIDIA GPU of compute capability 9.0 (H100, H200); {here}")
    if importlib.util.find_spec("fa3_fwd_interface") is None:
        raise ValueError("its kernel is missing: pip install fa3-fwd (Linux, CUDA 13)")
    if model is None:
        return
    width = model.config.attention_head_dim
    if width % 16 or width > WIDEST:
        raise ValueError(f"it wants heads of a multiple of 16, at most {WIDEST}; the model's have {width}")
    for module in model.modules():
        if hasattr(module, "processor"):
            module.processor.attention_in_fp8, module.processor._attention_backend = True, None


def fp8_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query keyᵀ / √width) value, each [batch, tokens, heads, width]; query, key: e4m3 -> in value's dtype."""
    # First within a token: at once, torch.compile would have one program for each head read all of its values.
    step = value.abs().amax(3).amax(1).float().clamp(min=1e-30) / 448
    rounded = value * step.reciprocal()[:, None, :, None]  # at most 448, in fp32
    return attention_op(query, key, rounded.to(FP8), step).to(value.dtype)


@torch.library.custom_op("flux158::fp8_attention", mutates_args=())
def attention_op(query: Tensor, key: Tensor, value: Tensor, step: Tensor) -> Tensor:
    """e4m3 [batch, tokens, heads, width] and the values' steps [batch, heads] (fp32) -> the same shape in bf16."""
    scale = query.shape[-1] ** -0.5
    if query.is_cuda:
        import fa3_fwd_interface  # noqa: F401  registers the kernel

        return torch.ops.fa3_fwd.fwd(query, key, value, v_descale=step, softmax_scale=scale, num_splits=1)[0]
    query, key, value = (x.transpose(1, 2).float() for x in (query, key, value))
    scores = query @ key.mT * scale
    numerators = (scores - scores.amax(-1, keepdim=True)).exp()
    total = numerators.sum(-1, keepdim=True) * 256  # of the numbers that were not rounded
    out = (numerators * 256).to(FP8).float() @ value / total * step[:, :, None, None]
    return out.transpose(1, 2).contiguous().bfloat16()


@attention_op.register_fake
def _(query, key, value, step):
    return query.new_empty(query.shape, dtype=torch.bfloat16)
