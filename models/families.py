"""Which class of ours a transformer belongs to: told by the class name in its config.json.

kind = transformer_class(config)                        # FluxTransformer2DModel or Flux2Transformer2DModel
model = load_transformer("student", dtype=torch.bfloat16)
transformer_class(pipe.transformer).family.order        # diffusers' own model, too
"""

import os
from collections.abc import Mapping

from torch import nn

from models.modeling_flux2_quant import Flux2Transformer2DModel
from models.modeling_flux_quant import FluxTransformer2DModel
from models.quantized_model import LOCATION, QuantizedTransformer

CLASSES = {kind.__name__: kind for kind in (FluxTransformer2DModel, Flux2Transformer2DModel)}


def transformer_class(of: str | Mapping | nn.Module, place: str | os.PathLike = "") -> type[QuantizedTransformer]:
    """The class for a class name, for a config that holds one, or for a model, ours or diffusers' own.

    ValueError, opening with `place`, on another.
    """
    if isinstance(of, nn.Module):  # FSDP2 and torch.compile make classes of their own
        found = [name for kind in type(getattr(of, "_orig_mod", of)).__mro__ if (name := kind.__name__) in CLASSES]
        name = found[0] if found else type(of).__name__
    else:
        name = of if isinstance(of, str) else of.get("_class_name")
    if name not in CLASSES:
        raise ValueError(f"{place}: " * bool(place) + f"a {name} is not supported, only {' and '.join(CLASSES)}")
    return CLASSES[name]


def load_transformer(path: str | os.PathLike, **kwargs) -> QuantizedTransformer:
    """from_pretrained of the class that `path`, a folder or hub id, names in its config; arguments and errors are
    those of QuantizedTransformer.from_pretrained."""
    where = {name: kwargs[name] for name in LOCATION if name in kwargs}
    config = FluxTransformer2DModel.load_config(path, **where)
    return transformer_class(config if isinstance(config, dict) else {}, path).from_pretrained(path, **kwargs)
