"""A wider FluxTransformer2DModel of the same function, to go on training from (Net2WiderNet, arXiv 1511.05641).

Every channel becomes k copies, in all hidden states, heads and MLPs; a wider model has more heads, not wider ones.
LayerNorm, AdaLN, RoPE and the norms of queries and keys treat copies alike, so that they stay equal if the weights of
an input's copies add up to the old weight:

    w → w_1 … w_k,    w_i = w/k + (n_i − mean_j n_j),    n_i ~ N(0, rms(row)²/k)

Without the noise n, rows would be k equal parts, which quantize as the narrow row does, and copies would stay copies
in training: a ladder of one rung. With it the weights' variance is that of the narrow row over k, as in a layer that
starts from variance 1/inputs; no two weights are equal, and copies drift apart with the first step, since the layers
after them weigh them differently. (A random rotation would also do away with equal weights, but AdaLN scales, shifts
and gates single channels, which rotations do not commute with.) `copies_differ` says how far training has come; until
then, a quantizer's errors average out over copies, which flatters what a wider model makes of it (STUDY.md 9).
"""

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor


def width_of(config: dict) -> int:
    """Channels of the hidden states of a transformer with this config."""
    return config["num_attention_heads"] * config["attention_head_dim"]


def check_width(width: int, config: dict) -> None:
    """ValueError unless a transformer with this config can be widened to `width`."""
    old = width_of(config)
    if width <= old or width % old:
        raise ValueError(f"--width {width}: no multiple of {old}, the width to start from; use {2 * old} or {4 * old}")


@torch.no_grad()
def widen(narrow: FluxTransformer2DModel, width: int, seed: int) -> FluxTransformer2DModel:
    """A model of `width` channels, on the CPU in fp32, with the function of `narrow`; ValueError as check_width."""
    old = width_of(narrow.config)
    check_width(width, narrow.config)
    copies, generator = width // old, torch.Generator().manual_seed(seed)
    heads = copies * narrow.config.num_attention_heads
    wide = FluxTransformer2DModel.from_config({**narrow.config, "num_attention_heads": heads})
    parameters = dict(wide.named_parameters())
    for name, parameter in narrow.named_parameters():
        found, target = parameter.float().cpu(), parameters[name]
        if found.shape[0] != target.shape[0]:
            found = _repeated(found, copies, old)
        if found.shape != target.shape:
            found = _shared(found, copies, old, generator)
        target.copy_(found)
    return wide


def _repeated(tensor: Tensor, copies: int, width: int) -> Tensor:
    """Rows [m·width, …] as [m·copies·width, …]: each run of `width` of them, `copies` times."""
    return tensor.unflatten(0, (-1, 1, width)).expand(-1, copies, *[-1] * tensor.ndim).flatten(0, 2)


def _shared(weight: Tensor, copies: int, width: int, generator: torch.Generator) -> Tensor:
    """A weight [out, m·width] as one [out, m·copies·width] of which each old one is shared by its copies."""
    parts = weight.unflatten(1, (-1, 1, width)) / copies
    noise = torch.randn(len(weight), parts.shape[1], copies, width, generator=generator)
    noise *= (weight.square().mean(1) / copies).sqrt().view(-1, 1, 1, 1)
    return (parts + noise - noise.mean(2, keepdim=True)).flatten(1)


def copies_differ(hidden: Tensor, copies: int, width: int) -> float:
    """How much of the energy of hidden states [..., copies·width], less each channel's mean, is in the differences of
    copies: 0 for copies, 1 for channels that are as independent as any."""
    states = hidden.float().flatten(0, -2)
    states = (states - states.mean(0)).unflatten(-1, (copies, width))
    differences = states - states.mean(1, keepdim=True)
    return (differences.square().sum() / states.square().sum() * copies / (copies - 1)).item()
