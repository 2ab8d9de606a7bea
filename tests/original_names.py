"""The names that tensors have in Black Forest Labs' own files."""

import itertools

import torch


class Renamed:
    """A state dict that is taken apart, and what became of it."""

    def __init__(self, model):
        self.state, self.result = model.state_dict(), {}

    def move(self, new, *old):
        for kind in ("weight", "bias"):
            found = [self.state.pop(f"{name}.{kind}", None) for name in old]
            if found[0] is not None:
                self.result[f"{new}.scale" if "_norm" in new else f"{new}.{kind}"] = torch.cat(found)

    def swap_last_norm(self):
        """Shift and scale are in the other order."""
        self.move("final_layer.adaLN_modulation.1", "norm_out.linear")
        for name in [name for name in self.result if "adaLN" in name]:
            self.result[name] = self.result[name].roll(len(self.result[name]) // 2, 0)

    def move_double_blocks(self, model, first, second):
        """Attention and feed-forward, whose linears have these names."""
        for i, text in itertools.product(range(model.config.num_layers), (False, True)):
            old, new = f"transformer_blocks.{i}", f"double_blocks.{i}.{'txt' if text else 'img'}"
            ff, out = ("ff_context", "to_add_out") if text else ("ff", "to_out.0")
            names = ("add_q_proj", "add_k_proj", "add_v_proj") if text else ("to_q", "to_k", "to_v")
            self.move(f"{new}_attn.qkv", *(f"{old}.attn.{name}" for name in names))
            self.move(f"{new}_attn.norm.query_norm", f"{old}.attn.norm_{'added_' if text else ''}q")
            self.move(f"{new}_attn.norm.key_norm", f"{old}.attn.norm_{'added_' if text else ''}k")
            self.move(f"{new}_attn.proj", f"{old}.attn.{out}")
            self.move(f"{new}_mlp.0", f"{old}.{ff}.{first}")
            self.move(f"{new}_mlp.2", f"{old}.{ff}.{second}")


def flux_names(model):
    """The tensors of a FluxTransformer2DModel under the names of FLUX.1's first code."""
    renamed = Renamed(model)
    move = renamed.move
    for new, old in {"time": "timestep", "vector": "text", "guidance": "guidance"}.items():
        move(f"{new}_in.in_layer", f"time_text_embed.{old}_embedder.linear_1")
        move(f"{new}_in.out_layer", f"time_text_embed.{old}_embedder.linear_2")
    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    move("final_layer.linear", "proj_out")
    renamed.swap_last_norm()
    for i in range(model.config.num_layers):
        move(f"double_blocks.{i}.img_mod.lin", f"transformer_blocks.{i}.norm1.linear")
        move(f"double_blocks.{i}.txt_mod.lin", f"transformer_blocks.{i}.norm1_context.linear")
    renamed.move_double_blocks(model, "net.0.proj", "net.2")
    for i in range(model.config.num_single_layers):
        old, new = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        move(f"{new}.modulation.lin", f"{old}.norm.linear")
        move(f"{new}.linear1", *(f"{old}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")))
        move(f"{new}.linear2", f"{old}.proj_out")
        move(f"{new}.norm.query_norm", f"{old}.attn.norm_q")
        move(f"{new}.norm.key_norm", f"{old}.attn.norm_k")
    assert not renamed.state
    return renamed.result


def flux2_names(model):
    """The tensors of a Flux2Transformer2DModel under the names of FLUX.2's first code."""
    renamed = Renamed(model)
    move = renamed.move
    for new, old in {"time": "timestep", "guidance": "guidance"}.items():
        move(f"{new}_in.in_layer", f"time_guidance_embed.{old}_embedder.linear_1")
        move(f"{new}_in.out_layer", f"time_guidance_embed.{old}_embedder.linear_2")
    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    move("final_layer.linear", "proj_out")
    renamed.swap_last_norm()
    for stream in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        move(f"{stream}.lin", f"{stream}.linear")
    renamed.move_double_blocks(model, "linear_in", "linear_out")
    for i in range(model.config.num_single_layers):
        old, new = f"single_transformer_blocks.{i}.attn", f"single_blocks.{i}"
        move(f"{new}.linear1", f"{old}.to_qkv_mlp_proj")
        move(f"{new}.linear2", f"{old}.to_out")
        move(f"{new}.norm.query_norm", f"{old}.norm_q")
        move(f"{new}.norm.key_norm", f"{old}.norm_k")
    assert not renamed.state
    return renamed.result


def original_names(model):
    """The tensors of a transformer of either family under the names of its makers' first code."""
    return (flux_names if "pooled_projection_dim" in model.config else flux2_names)(model)
