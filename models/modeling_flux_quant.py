"""FLUX.1's transformer with quantized linears: what it has of its own (see quantized_model.py for the rest).

99.5 % of FLUX.1-dev's weights lie in linears inside its blocks, modulation among them (27 %).
"""

import diffusers
import torch
from diffusers import ModelMixin  # found here by FluxPipeline.from_pretrained when a saved pipeline holds our class
from diffusers.models.activations import GELU
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from models.attention import FusedAttention
from models.kernels import gelu
from models.quantized_model import DEFAULT_SETTINGS, Blocks, Family, QuantizedTransformer, init_like, is_quantized
from models.utils_quant import QuantizeLinear

__all__ = ["DEFAULT_SETTINGS", "FluxTransformer2DModel", "ModelMixin", "QuantizeLinear", "is_quantized"]

MODULATION = ("norm1.linear", "norm1_context.linear", "norm.linear")  # AdaLN, inside a block


class FastGELU(nn.GELU):
    """torch's GELU, the tanh one computed by kernels.gelu."""

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input) if self.approximate == "tanh" else super().forward(input)


class FastProjectedGELU(GELU):
    """diffusers' linear layer with GELU behind it, the tanh one computed by kernels.gelu."""

    def gelu(self, gate: Tensor) -> Tensor:
        return gelu(gate) if self.approximate == "tanh" else super().gelu(gate)


class FusedFluxAttnProcessor(FusedAttention, FluxAttnProcessor):
    """diffusers' attention as FusedAttention has it."""


@torch.compiler.disable
def as_views_of_one(block: nn.Module, args: tuple, tokens: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Forward hook: text and image tokens [batch, tokens, channels] that a block returned, as views of one tensor."""
    return torch.cat(tokens, 1).tensor_split([tokens[0].shape[1]], 1)


class FluxTransformer2DModel(QuantizedTransformer, diffusers.FluxTransformer2DModel):
    """diffusers' FluxTransformer2DModel with quantized linears; arguments, and what it does: QuantizedTransformer."""

    family = Family(
        name="FLUX.1",
        blocks={
            "transformer_blocks": Blocks("num_layers", {"temb": "time_text_embed"}),
            "single_transformer_blocks": Blocks("num_single_layers", {"temb": "time_text_embed"}),
        },
        modulation=MODULATION,
        order=(
            MODULATION,
            (
                "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
                "proj_mlp",
            ),
            ("attn.to_out.0", "attn.to_add_out", "proj_out"),
            ("ff.net.0.proj", "ff_context.net.0.proj"),
            ("ff.net.2", "ff_context.net.2"),
        ),
        around=("pos_embed", "time_text_embed", "norm_out"),
        fused={nn.GELU: FastGELU, GELU: FastProjectedGELU, FluxAttnProcessor: FusedFluxAttnProcessor},
    )  # fmt: skip
    __init__ = init_like(diffusers.FluxTransformer2DModel)

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """As for every family, but a graph that does for all single blocks.

        They return views of one tensor. The first of them gets such views, too: other strides are another graph.
        """
        for block in self.transformer_blocks[-1:]:
            if as_views_of_one not in block._forward_hooks.values():
                block.register_forward_hook(as_views_of_one)
        super().compile_repeated_blocks(*args, **kwargs)
