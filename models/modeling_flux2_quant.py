"""FLUX.2's transformer with quantized linears: what it has of its own (see quantized_model.py for the rest).

FLUX.2-klein-4B: 5 double and 20 single blocks, no biases. A single block is one attention with two linears: the first
makes query, key, value and both halves of the feed-forward, the second takes attention's and the feed-forward's
outputs. Modulation is made once for all blocks of a kind, by three linears outside of them.

    teacher = Flux2Transformer2DModel.from_pretrained(path, subfolder="transformer")  # diffusers' model, bit for bit
    student = Flux2Transformer2DModel.from_pretrained(path, subfolder="transformer", w_bits=0)
    pipe = Flux2KleinPipeline.from_pretrained(path, transformer=student)

from_single_file wants config="black-forest-labs/FLUX.2-klein-4B", subfolder="transformer": else diffusers takes
FLUX.2-dev's. Fast mode leaves SwiGLU, one exponential and two products, to the compiler, which can compute it where the
tokens are rounded to 8 bits.
"""

import diffusers
import torch
from diffusers import ModelMixin  # found here by diffusers' pipelines when a saved one holds our class
from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
)
from torch import Tensor

from models.attention import FusedAttention, FusedProcessor, Rotary, attend
from models.kernels import norm_rotate
from models.quantized_model import Blocks, Family, QuantizedTransformer, init_like

__all__ = ["Flux2Transformer2DModel", "ModelMixin"]


class FusedFlux2AttnProcessor(FusedAttention, Flux2AttnProcessor):
    """diffusers' attention of double blocks as FusedAttention has it."""


class FusedFlux2ParallelAttnProcessor(FusedProcessor, Flux2ParallelSelfAttnProcessor):
    """diffusers' attention of single blocks with queries and keys by norm_rotate; where it cannot, diffusers' own."""

    def __call__(
        self,
        attn: Flux2ParallelSelfAttention,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor:
        """Tokens [batch, tokens, channels] -> the same."""
        if not self.can_fuse(hidden_states, attn.head_dim, [attn.norm_q, attn.norm_k], image_rotary_emb):
            return super().__call__(attn, hidden_states, attention_mask, image_rotary_emb)
        parts = [attn.inner_dim] * 3 + [attn.mlp_hidden_dim * attn.mlp_mult_factor]
        *parts, gated = attn.to_qkv_mlp_proj(hidden_states).split(parts, -1)
        query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
        dtype = self.query_dtype(query, attention_mask)
        query, key = norm_rotate(None, [(query, attn.norm_q), (key, attn.norm_k)], image_rotary_emb, dtype)
        out = attend(self, query, key, value, attention_mask)
        return attn.to_out(torch.cat([out, attn.mlp_act_fn(gated)], -1))


class Flux2Transformer2DModel(QuantizedTransformer, diffusers.Flux2Transformer2DModel):
    """diffusers' Flux2Transformer2DModel with quantized linears; arguments, and what it does: QuantizedTransformer."""

    family = Family(
        name="FLUX.2",
        blocks={
            "transformer_blocks": Blocks(
                "num_layers",
                {"temb_mod_img": "double_stream_modulation_img", "temb_mod_txt": "double_stream_modulation_txt"},
            ),
            "single_transformer_blocks": Blocks(
                "num_single_layers", {"temb_mod": "single_stream_modulation"}, {"split_hidden_states": True}
            ),
        },
        modulation=(
            "double_stream_modulation_img.linear", "double_stream_modulation_txt.linear",
            "single_stream_modulation.linear",
        ),
        order=(
            (
                "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
                "attn.to_qkv_mlp_proj",
            ),
            ("attn.to_out.0", "attn.to_add_out", "attn.to_out"),
            ("ff.linear_in", "ff_context.linear_in"),
            ("ff.linear_out", "ff_context.linear_out"),
        ),
        around=(
            "pos_embed", "time_guidance_embed", "double_stream_modulation_img", "double_stream_modulation_txt",
            "single_stream_modulation", "norm_out",
        ),
        fused={
            Flux2AttnProcessor: FusedFlux2AttnProcessor,
            Flux2ParallelSelfAttnProcessor: FusedFlux2ParallelAttnProcessor,
        },
    )  # fmt: skip
    __init__ = init_like(diffusers.Flux2Transformer2DModel)
