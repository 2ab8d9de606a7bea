"""CUDA graphs: what a denoising step launches is recorded once and replayed in one go.

A compiled step of FLUX.1-dev is more than a thousand launches. At 512 pixels a GPU is through with them before the CPU
has made them; a graph leaves only the GPU's own time.
"""

from collections.abc import Callable
from functools import wraps

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

# By mode, and names, shapes and dtypes of the inputs: where they are read from, the replay, and what it writes.
Graphs = dict[tuple, tuple[dict[str, Tensor], Callable[[], None], Tensor]]
SHAPES = 64  # of inputs that blocks may be compiled for; torch would refuse the ninth
# Methods of a transformer after which it computes something else, or its weights lie elsewhere.
CHANGES = (
    "_apply", "set_inference_mode", "pack", "set_attention_backend", "reset_attention_backend", "set_attn_processor",
    "load_lora_adapter", "add_adapter", "set_adapter", "set_adapters", "enable_adapters", "disable_adapters",
    "enable_lora", "disable_lora", "delete_adapters", "unload_lora", "fuse_lora", "unfuse_lora",
)  # fmt: skip


def captured(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of `step` to replay, and the tensor that its replays write, as the first one left it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles and loads what a capture must not
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # its own is of the device that was the first to be captured on
        output = step()
    graph.replay()
    return graph.replay, output


def compile_options(device: torch.device) -> dict[str, bool] | None:
    """Options of torch.compile for the blocks on this device, and for what a packed model compiles beside them.

    On a GPU a concatenation is computed by the kernels that read it, and a token stays in registers from LayerNorm or
    GELU to its largest value and its 8 bits. Else it is written, read and worked on again.
    """
    if device.type != "cuda":
        return None
    from utils.inductor import keep_rows_in_registers  # which takes more than a second to import

    return {"force_pointwise_cat": True} | keep_rows_in_registers()


def compile_steps(transformer: nn.Module) -> nn.Module:
    """Compile the transformer's blocks; on CUDA also replay whole steps as CUDA graphs. Returns the transformer.

    For inference on one device. The first picture of a size takes a minute or so, and so does the first one after a
    change of the transformer (CHANGES): another mode, adapters, moving it. Calls with a gradient, or with more than
    tensors (a ControlNet's residuals, attention arguments), are compiled but not replayed.
    """
    device = next(transformer.parameters()).device
    torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)
    transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, options=compile_options(device))
    if device.type == "cuda":
        replay_steps(transformer)
    return transformer


def replay_steps(transformer: nn.Module) -> None:
    """Let calls of the transformer be replayed on the device where it is now, those after CHANGES as it is then."""
    graphs: Graphs = {}

    def addresses() -> list[int]:
        return [parameter.data_ptr() for parameter in transformer.parameters()]

    def forgetting(method: Callable, moves: bool) -> Callable:
        @wraps(method)
        def call(*args, **kwargs):
            before = addresses() if moves else None
            result = method(*args, **kwargs)
            if not moves or addresses() != before:  # offloading calls .to() in every step
                graphs.clear()
            return result

        return call

    device = next(transformer.parameters()).device
    transformer.forward = replayed(transformer.forward, device, graphs)
    for name in CHANGES:
        if hasattr(transformer, name):
            setattr(transformer, name, forgetting(getattr(transformer, name), moves=name == "_apply"))


def replayed(forward: Callable, device: torch.device, graphs: Graphs) -> Callable:
    """forward(**tensors) of a FLUX transformer on `device`, as a CUDA graph for each set of shapes and dtypes that it
    is called with; `graphs` keeps them."""

    def replay(*args, return_dict: bool = True, **kwargs):
        given = {name: value for name, value in kwargs.items() if value is not None and value != {}}
        replayable = all(isinstance(value, Tensor) and value.device == device for value in given.values())
        if args or torch.is_grad_enabled() or not replayable:
            return forward(*args, return_dict=return_dict, **kwargs)
        shapes = ((name, tensor.shape, tensor.dtype) for name, tensor in sorted(given.items()))
        key = (torch.is_inference_mode_enabled(), *shapes)  # tensors made in that mode are not to be written to later
        if key not in graphs:
            inputs = {name: tensor.clone() for name, tensor in given.items()}
            with torch.cuda.device_of(inputs["hidden_states"]):  # streams and graphs are the current device's
                graphs[key] = inputs, *captured(lambda: forward(**inputs, return_dict=False)[0])
        inputs, run, output = graphs[key]
        for name, tensor in given.items():
            inputs[name].copy_(tensor)
        run()
        sample = output.clone()  # the next step writes where this one did
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    return replay
