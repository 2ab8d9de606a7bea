"""What training leaves on disk: whole models, packed ones, and checkpoints that name the base they were made from.

A LoRA inside the quantizers of FLUX.1-dev is 1 GB; its frozen weights are 24 GB, and they lie where the model lies. So
a checkpoint of a model of which something is frozen holds

    config.json            the model's settings, as in every folder of diffusers
    base.json              the full-precision transformer it was made from: where, in which dtype it was kept, and a
                           fingerprint of its weights
    trained*.safetensors   every trained parameter and all step sizes, and the step sizes at which codes were frozen

Everything is written tensor by tensor, gathered from all ranks where FSDP2 has spread it; so all ranks call the savers,
and one of them writes.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.packing import FORMAT, PackedLinear, PackedWriter, stored_tensors
from models.utils_quant import QuantizeLinear

BASE, TRAINED = "base.json", "trained"
STEP_SIZE, FROZEN = "weight_clip_val", "frozen_clip_val"
SHARD_BYTES = 2 * 10**9


# -------------------------------------------------------------------------------------------------------- shards


def save_shards(
    tensors: Iterable[tuple[str, Tensor]], folder: Path | None, stem: str, metadata: dict | None = None
) -> None:
    """Write named tensors as stem.safetensors, or in shards with an index as diffusers does, holding one at a time.

    `folder` is None on ranks that only help to gather them.
    """
    if folder is None:
        return _drain(tensors)
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(pending, folder / f"{stem}-{len(shards)}.part", {"format": "pt"} | (metadata or {}))
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if pending and size + bytes_ > SHARD_BYTES:
            flush()
            size = 0
        pending[name] = tensor.detach().cpu().contiguous().clone()  # parts of one storage are no parts of a file
        size, total = size + bytes_, total + bytes_
    flush()
    count = len(shards)
    files = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [
        f"{stem}.safetensors"
    ]  # fmt: skip
    for i, file in enumerate(files):
        os.replace(folder / f"{stem}-{i}.part", folder / file)
    if count > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


class Shards:
    """Reads what save_shards wrote, a tensor at a time; ValueError, naming the file, if something is damaged."""

    def __init__(self, folder: Path, stem: str):
        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        try:
            names = {single.name}
            if index.is_file():
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            self.places: dict = {}
            for name in sorted(names):
                single = folder / name
                file = safe_open(single, "pt")
                self.metadata = file.metadata() or {}
                self.places |= dict.fromkeys(file.keys(), file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            file = index if index.is_file() and isinstance(error, ValueError | KeyError | TypeError) else single
            raise ValueError(f"{file}: cannot be read ({' '.join(str(error).split())})") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __getitem__(self, name: str) -> Tensor:
        return self.places[name].get_tensor(name)

    def __contains__(self, name: str) -> bool:
        return name in self.places


# ------------------------------------------------------------------------------------------------------- what is saved


def full(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered if FSDP2 has spread it; then all ranks have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_layer(layer: nn.Module) -> nn.Module:
    """The layer without its children, its parameters gathered."""
    whole = object.__new__(type(layer))  # copy.copy of what FSDP2 has spread would make a whole transformer anew
    whole.__dict__.update(layer.__dict__)
    whole._parameters = {
        name: None if p is None else nn.Parameter(full(p.detach()), requires_grad=False)
        for name, p in layer._parameters.items()
    }
    whole._modules, whole._buffers = {}, dict(layer._buffers)
    return whole


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module's prefix ("" or "path.") and the module, gathered, without its children."""
    for path, layer in model.named_modules():
        yield (f"{path}." if path else ""), full_layer(layer)


@torch.no_grad()
def whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter; where the codes are frozen, a weight that quantizes to them and a LoRA of nothing."""
    for prefix, layer in layers(model):
        settled = {}
        if isinstance(layer, QuantizeLinear) and layer.frozen is not None:
            settled["weight"] = layer.quantized_weight().to(layer.weight.dtype)
            if getattr(layer, "lora_B", None) is not None:
                settled["lora_B"] = torch.zeros_like(layer.lora_B)
        for name, parameter in layer.named_parameters():
            yield prefix + name, settled.get(name, parameter)


@torch.no_grad()
def trained_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every trained parameter, all step sizes, and as NAME.frozen_clip_val those at which codes were frozen."""
    left = set(frozen_names(model))
    for name, parameter in model.named_parameters():
        if name not in left:
            yield name, full(parameter.detach())
    for path, layer in model.named_modules():
        if isinstance(layer, QuantizeLinear) and layer.frozen is not None:
            yield f"{path}.{FROZEN}", layer.frozen


@torch.no_grad()
def packed_tensors(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the model's packed twin, in `dtype` what is not quantized."""
    for prefix, layer in layers(model):
        if isinstance(layer, QuantizeLinear):
            layer = PackedLinear.from_quantized(layer, prefix.removesuffix("."))
        for name, tensor in stored_tensors(layer):
            kept = isinstance(layer, PackedLinear) and name in ("weight_codes", STEP_SIZE)
            yield prefix + name, tensor if kept else tensor.to(dtype)


def save_config(model: nn.Module, folder: Path | None, **changes) -> dict:
    """Write config.json, with `changes`; returns what stands there as settings."""
    config = json.loads(model.to_json_string())
    config |= {"_class_name": config["_class_name"].removeprefix("FSDP"), **changes}  # FSDP2 changes the model's class
    if folder is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return config


def save_whole(model: nn.Module, folder: Path | None) -> None:
    """The model for from_pretrained. `folder` is None on the ranks that do not write, here and below."""
    save_config(model, folder)
    save_shards(whole_tensors(model), folder, "diffusion_pytorch_model")


def save_packed(model: nn.Module, folder: Path | None, dtype: torch.dtype) -> None:
    """The packed twin of the model, layer by layer: the model stays as it is."""
    if folder is None:
        return _drain(packed_tensors(model, dtype))
    writer = PackedWriter(folder)
    for name, tensor in packed_tensors(model, dtype):
        writer.add(name, tensor)
    writer.close(save_config(model, folder, packed=FORMAT, lora_r=0))


def save_trained(model: nn.Module, folder: Path | None, base: dict) -> None:
    """What load_trained reads."""
    save_config(model, folder)
    save_shards(trained_tensors(model), folder, TRAINED)
    if folder is not None:
        (folder / BASE).write_text(json.dumps(base, indent=2) + "\n")


def _drain(tensors: Iterable) -> None:
    for _ in tensors:
        pass


# ------------------------------------------------------------------------------------------------------------ the base


def frozen_names(model: nn.Module) -> list[str]:
    """The parameters that a checkpoint leaves to the base."""
    return [n for n, p in model.named_parameters() if not p.requires_grad and not n.endswith(f".{STEP_SIZE}")]


@torch.no_grad()
def fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and eight values of each tensor, rounded to bfloat16: the same in any dtype."""
    digest, picked = hashlib.sha256(), [torch.zeros(1)]
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().flatten()
        picked.append(flat[:: max(1, len(flat) // 8)][:8].bfloat16().float().cpu())
        digest.update(f"{name} {list(tensor.shape)}".encode())
    digest.update(torch.cat(picked).numpy().tobytes())
    return digest.hexdigest()


def describe_base(model: nn.Module, name: str, start_from: str | Path | None = None) -> dict | None:
    """What base.json holds for a model made from pipeline `name`, its weights moved to the codes of the transformer in
    `start_from` if that is given (see QuantizedTransformer.start_from); None if no parameter of it is frozen."""
    parameters = dict(model.named_parameters())
    frozen = {name: parameters[name] for name in frozen_names(model)}
    if not frozen:
        return None
    dtypes = {str(p.dtype).removeprefix("torch.") for p in frozen.values()}
    places = [str(Path(p).absolute()) if p and Path(p).is_dir() else p for p in (name, start_from)]
    return {"model": places[0], "start_from": places[1], "dtype": min(dtypes), "sha256": fingerprint(frozen)}


def read_base(folder: Path) -> dict:
    """base.json; ValueError if it is not whole."""
    file = folder / BASE
    try:
        base = json.loads(file.read_text(encoding="utf-8"))
        if not all(isinstance(base[field], str) for field in ("model", "sha256")):
            raise ValueError("a field is of another kind")
        return base | {"dtype": getattr(torch, base["dtype"]), "start_from": base["start_from"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); go on from another checkpoint") from None


@torch.no_grad()
def load_trained(kind: type, folder: Path, config: dict, dtype: torch.dtype | None, **kwargs) -> nn.Module:
    """The model in `folder`, its frozen parameters from the base, its codes frozen if they were.

    `dtype` is that of what is neither quantized nor trained; weights under a quantizer keep the dtype that they were
    trained in, since the codes depend on it. ValueError, naming the file, unless the base is there and the same, and
    the folder holds all that the base lacks.
    """
    base, tensors = read_base(folder), Shards(folder, TRAINED)
    place = base["model"]
    try:
        model = kind.from_pretrained(place, subfolder="transformer", dtype=base["dtype"], **kwargs)
        model.quantize_as(config)
        if base["start_from"] is not None:
            place = base["start_from"]
            model.start_from(kind.from_pretrained(place, **kwargs).pack())
    except OSError as error:
        problem = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder / BASE}: the base {place} cannot be read ({problem}); put it back") from None
    parameters = dict(model.named_parameters())
    frozen = {name: p for name, p in parameters.items() if name not in tensors}
    lost = [name for name in frozen if name.rpartition(".")[2] in (STEP_SIZE, "lora_A", "lora_B")]
    odd = [name for name in tensors if name not in parameters and not name.endswith(f".{FROZEN}")]
    if lost or odd:
        problem = f"{lost[0]} is missing" if lost else f"{odd[0]} is of no such model"
        raise ValueError(f"{folder / TRAINED}.safetensors: {problem}; go on from another checkpoint")
    if fingerprint(frozen) != base["sha256"]:
        raise ValueError(f"{folder / BASE}: {base['model']} holds other weights than it was trained on; put them back")
    for path, layer in model.named_modules():
        prefix, quantized = f"{path}." if path else "", isinstance(layer, QuantizeLinear)
        for name, parameter in layer.named_parameters(recurse=False):
            if prefix + name in tensors:
                parameter.data = tensors[prefix + name].to(parameter.device)
            elif dtype is not None and not (quantized and name == "weight"):
                parameter.data = parameter.data.to(dtype)
        if prefix + FROZEN in tensors:
            layer.freeze_codes(tensors[prefix + FROZEN].to(layer.weight.device))
    return model
