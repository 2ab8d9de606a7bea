"""Attention with queries and keys by one kernel (norm_rotate), in fast mode with projections of one input as one.

What stands here goes before one of diffusers' attention processors among the bases of a class; where the kernel cannot
do it or something hooks a norm, diffusers' own does. A projection that is hooked is called by itself. In exact mode
that is for torch.compile, which rounds queries and keys once, as the kernel does; diffusers does so twice.
"""

from collections.abc import Sequence

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from models.fp8_attention import fp8_attention
from models.kernels import FP8, can_rotate, norm_rotate
from models.packing import PackedLinear, is_unhooked

Rotary = tuple[Tensor, Tensor]  # cosines and sines [tokens, width of a head]


class FusedProcessor:
    """What the processors share; `mode` is the model's inference mode."""

    mode = "fast"
    attention_in_fp8 = False  # models/fp8_attention.py: choose

    def takes_fp8(self) -> bool:
        """Whether attention in 8 bits was chosen, and none of diffusers' backends since."""
        return self.attention_in_fp8 and self.mode == "fast" and self._attention_backend is None

    def can_fuse(self, tokens: Tensor, head_dim: int, norms: Sequence[nn.RMSNorm], rotary: Rotary | None) -> bool:
        """Whether norm_rotate is to make the queries and keys of `tokens`, and can by calling none of the norms."""
        wanted = rotary is not None and (self.mode == "fast" or torch.compiler.is_compiling())
        possible = wanted and all(
            is_unhooked(norm) and can_rotate(tokens, head_dim, norm) and norm.eps == norms[0].eps for norm in norms
        )
        if self.takes_fp8() and not possible:
            raise ValueError(
                "attention in fp8 wants rotated queries and keys whose norms nothing hooks, and no gradient: leave out "
                "--attention fp8, or what hooks them (--offload sequential does)"
            )
        return possible

    def query_dtype(self, tokens: Tensor, mask: Tensor | None) -> torch.dtype:
        """What norm_rotate is to round queries and keys to: e4m3 for attention in 8 bits."""
        if not self.takes_fp8():
            return tokens.dtype
        if mask is not None or self._parallel_config is not None:
            raise ValueError("attention in fp8 knows neither masks nor context parallelism: leave out --attention fp8")
        return FP8


def attend(processor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention [batch, tokens, heads, width] by what was chosen on the processor -> [batch, tokens, channels]."""
    if query.dtype == FP8:
        return fp8_attention(query, key, value).flatten(2)
    return dispatch_attention_fn(
        query, key, value, attn_mask=mask, backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    ).flatten(2)  # fmt: skip


class FusedAttention(FusedProcessor):
    """Of FluxAttention and Flux2Attention: text and image tokens, each with their projections, or one sort alone."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens [batch, tokens, channels] -> the same; with those of the text given, the pair of image and text."""
        joint = encoder_hidden_states is not None
        norms = [attn.norm_q, attn.norm_k] + ([attn.norm_added_q, attn.norm_added_k] if joint else [])
        if not self.can_fuse(hidden_states, attn.head_dim, norms, image_rotary_emb):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

        def heads(tokens: Tensor, *layers: nn.Module) -> list[Tensor]:
            return [part.unflatten(-1, (-1, attn.head_dim)) for part in PackedLinear.together(layers, tokens)]

        query, key, value = heads(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        image, text = [(query, attn.norm_q), (key, attn.norm_k)], None
        if joint:
            added = heads(encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text = [(added[0], attn.norm_added_q), (added[1], attn.norm_added_k)]
            value = torch.cat([added[2], value], 1)
        dtype = self.query_dtype(query, attention_mask)
        query, key = norm_rotate(text, image, image_rotary_emb, dtype)
        out = attend(self, query, key, value, attention_mask)
        if not joint:
            return out
        text_out, image_out = out.tensor_split([encoder_hidden_states.shape[1]], 1)
        return attn.to_out[1](attn.to_out[0](image_out.contiguous())), attn.to_add_out(text_out.contiguous())
