"""CUDA graphs: what a denoising step launches is recorded once and replayed in one go.

A compiled step of FLUX.1-dev is more than a thousand launches. At 512 pixels a GPU is through with them before the CPU
has made them; a graph leaves only the GPU's own time.
"""

from collections.abc import Callable

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn


def captured(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of `step` to replay, and the tensor that its replays write, as the first one left it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles and loads what a capture must not
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
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

    For inference on one device, of the transformer as it stands at its first call: choose the inference mode and load
    adapters before. The first picture of a size takes a minute or so. Calls with a gradient, or with more than tensors
    (a ControlNet's residuals, attention arguments), are compiled but not replayed.
    """
    device = next(transformer.parameters()).device
    transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, options=compile_options(device))
    if device.type == "cuda":
        transformer.forward = replayed(transformer.forward)
    return transformer


def replayed(forward: Callable) -> Callable:
    """forward(**tensors) of a FLUX transformer, as a CUDA graph for each set of shapes and dtypes it is called with."""
    graphs: dict[tuple, tuple[dict[str, Tensor], Callable[[], None], Tensor]] = {}

    def replay(*args, return_dict: bool = True, **kwargs):
        given = {name: value for name, value in kwargs.items() if value is not None and value != {}}
        if args or torch.is_grad_enabled() or not all(isinstance(value, Tensor) for value in given.values()):
            return forward(*args, return_dict=return_dict, **kwargs)
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in sorted(given.items()))
        if key not in graphs:
            inputs = {name: tensor.clone() for name, tensor in given.items()}
            graphs[key] = inputs, *captured(lambda: forward(**inputs, return_dict=False)[0])
        inputs, run, output = graphs[key]
        for name, tensor in given.items():
            inputs[name].copy_(tensor)
        run()
        sample = output.clone()  # the next step writes where this one did
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    return replay
