"""Quantized weights as small as their bits: codes, layers that hold them, and the files they are kept in.

A code is the integer c of w = α·(c + s)/n (utils_quant.py); a row of codes is laid out in planes: with n codes a byte
and ⌈in/n⌉ bytes a row, byte j holds the codes j, j + ⌈in/n⌉, j + 2⌈in/n⌉ …, so that unpacking is a few whole-row
operations. Missing codes at a row's end are zero.

    bits       in memory                        on disk
    0          2 bits, two's complement         5 codes a byte (1.6 bits): the digits of a fraction in base 3
    1, 2, 4, 8 1, 2, 4, 8 bits                  the same
    3, 5, 6, 7 two or three such planes         the same

A packed folder holds config.json, safetensors shards and diffusion_pytorch_model.safetensors.index.json. The index
carries a SHA-256 of the config and of every shard: whatever is damaged is an error, not another picture.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models import kernels
from models.kernels import PLANES, row_chunks, unpack_codes
from models.utils_quant import (
    ALPHA_FLOOR,
    QuantizedLayer,
    QuantizeLinear,
    ReadOnlyWeight,
    check_bits,
    code_grid,
    quantize_codes,
    refuse_writing,
)

FORMAT = 1
INDEX = "diffusion_pytorch_model.safetensors.index.json"
DERIVED = "quantization_config"  # an entry of config.json that follows from the others
TRITS = 5  # a byte: 3^5 = 243 of its 256 values
PROBLEMS = ("a byte holds no five ternary codes", "the padding is not zero")  # of codes on disk
LOADERS = 8  # threads, each with one layer in its hands
MARGIN = 0.05  # of the distance between two levels: adopt_codes keeps so far from a threshold

# ------------------------------------------------------------------------------------------------- codes and bytes


def row_bytes(in_features: int, w_bits: int) -> int:
    """Bytes of one packed row in memory."""
    return sum(-(-in_features // (8 // width)) for width in PLANES[w_bits])


def disk_row_bytes(in_features: int, w_bits: int) -> int:
    """Bytes of one packed row on disk."""
    return -(-in_features // TRITS) if w_bits == 0 else row_bytes(in_features, w_bits)


def _pad(codes: Tensor, per_byte: int, value: int = 0) -> Tensor:
    """[rows, in] as [rows, per_byte, ⌈in / per_byte⌉], `value` where there is none."""
    columns = -(-codes.shape[1] // per_byte)
    if missing := columns * per_byte - codes.shape[1]:
        codes = F.pad(codes, (0, missing), value=value)
    return codes.unflatten(1, (per_byte, columns))


def pack_codes(codes: Tensor, w_bits: int) -> Tensor:
    """Signed codes [rows, in] (int8) to bytes [rows, row_bytes] (uint8)."""
    codes, planes = codes.view(torch.uint8), []
    for width in PLANES[w_bits]:  # the lowest bits first
        fields = _pad(codes & (2**width - 1), 8 // width)
        packed = fields[:, 0].clone()
        for i in range(1, 8 // width):
            packed |= fields[:, i] << i * width
        planes.append(packed)
        codes = codes >> width
    return torch.cat(planes, 1)


def pack_trits(codes: Tensor) -> Tensor:
    """Ternary codes [rows, in] (int8, −1 0 1) to bytes [rows, ⌈in/5⌉] (uint8).

    The number v whose base-3 digits are the codes plus one is kept as ⌈256·v/243⌉, the fraction v/243 rounded up to a
    byte: multiplying by 3 then moves one digit after the other into the carry.
    """
    digits = _pad(codes, TRITS).to(torch.int16)
    value = digits[:, 0] + 1
    for i in range(1, TRITS):
        value.mul_(3).add_(digits[:, i]).add_(1)
    return (value + (value * 13 + 242) // 243).to(torch.uint8)  # 256 = 243 + 13: all fits 16 bits


def _digits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The digits of bytes [rows, columns] in base 3, [rows, 5·columns] (uint8), and whether a byte holds no five."""
    rest = packed.to(torch.int16)
    digits = torch.empty(len(packed), TRITS, packed.shape[1], dtype=torch.uint8, device=packed.device)
    for i in range(TRITS):
        digits[:, i] = rest.mul_(3).view(torch.uint8)[:, 1::2]  # the upper bytes; CUDA's shift to a uint8 gives zeros
        rest &= 255
    return digits.flatten(1), rest.max() > 242


def _refuse(wrong: Tensor) -> None:
    for problem, found in zip(PROBLEMS, wrong.tolist(), strict=True):
        if found:
            raise ValueError(problem)


def unpack_trits(packed: Tensor, in_features: int) -> Tensor:
    """Bytes [rows, ⌈in/5⌉] back to ternary codes [rows, in_features] (int8); ValueError on bytes that none gives."""
    digits, impossible = _digits(packed)
    _refuse(torch.stack([impossible, (digits[:, in_features:] != 1).any()]))
    return digits.view(torch.int8).sub_(1)[:, :in_features]


def store_codes(codes: Tensor, w_bits: int) -> Tensor:
    """Signed codes [rows, in] (int8) to codes as on disk [rows, disk_row_bytes]."""
    return pack_codes(codes, w_bits) if w_bits else pack_trits(codes)


def to_disk(packed: Tensor, w_bits: int, in_features: int) -> Tensor:
    """Codes as in memory [rows, row_bytes] to codes as on disk [rows, disk_row_bytes]."""
    if w_bits:
        return packed
    parts = [packed[rows] for rows in row_chunks(len(packed), in_features)]
    return torch.cat([store_codes(unpack_codes(part, 0, in_features), 0) for part in parts])


def decode(stored: Tensor, w_bits: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Codes as on disk to codes as in memory, and which of PROBLEMS they have (bool [2]), on the same device.

    Nothing waits for the device: what is wrong is looked up when all layers are on their way.
    """
    wrong = torch.zeros(len(PROBLEMS), dtype=torch.bool, device=stored.device)
    chunks = list(row_chunks(len(stored), in_features, stored.device))
    if w_bits:
        if stored.shape[1] * 8 > w_bits * in_features:  # padding that is not zero is lost on the way
            for rows in chunks:
                again = pack_codes(unpack_codes(stored[rows], w_bits, in_features), w_bits)
                wrong[1] |= (again != stored[rows]).any()
        return stored, wrong
    packed = torch.empty(len(stored), row_bytes(in_features, 0), dtype=torch.uint8, device=stored.device)
    for rows in chunks:
        digits, impossible = _digits(stored[rows])
        wrong |= torch.stack([impossible, (digits[:, in_features:] != 1).any()])
        fields = _pad(digits[:, :in_features], 4, value=1)
        byte = fields[:, 3].clone()
        for i in (2, 1, 0):
            byte.bitwise_left_shift_(2).bitwise_or_(fields[:, i])
        packed[rows] = byte.add_(0x55).bitwise_xor_(0xAA)  # (d + 1) ^ 2 is d − 1 in two bits, for all four at a time
    return packed, wrong


def from_disk(stored: Tensor, w_bits: int, in_features: int) -> Tensor:
    """Codes as on disk to codes as in memory, on the same device; ValueError on what no codes give."""
    packed, wrong = decode(stored, w_bits, in_features)
    _refuse(wrong)
    return packed


# ------------------------------------------------------------------------------------------------------------ layer


def is_unhooked(module: nn.Module) -> bool:
    """Whether a call of the module is one of its class's forward: if not, its parameters may be elsewhere until then.

    Libraries that offload, cast or cache hook a module so, or put another forward into its place.
    """
    return not (module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__)


def _autocast(input: Tensor) -> Tensor:
    """The input in the autocast dtype, if there is one."""
    autocast = torch.is_autocast_enabled(input.device.type)
    return input.to(torch.get_autocast_dtype(input.device.type)) if autocast else input


class PackedLinear(ReadOnlyWeight, QuantizedLayer, nn.Linear):
    """A linear layer that holds codes instead of weights, for inference and for training adapters on top.

    x [..., in] -> [..., out] in the autocast dtype, else in x's; `mode` "exact" gives the numbers of
    QuantizeLinear up to the order of the sum, "fast" those of activations in 8 bits (kernels.py). Parameters, none
    of which wants a gradient: weight_codes [out, row_bytes] uint8, weight_clip_val [out, 1] or [1, 1] fp32, bias [out].
    Gradients reach x and the bias; asking for those of codes or step sizes is a ValueError. `weight` is a
    ComputedWeight in the bias's dtype; without a bias in `weight_dtype`, which follows .to(dtype).
    """

    _fp32_parameters = ("weight_clip_val",)
    mode = "exact"

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None, *, w_bits: int,
        weight_layerwise: bool = False,
    ):  # fmt: skip
        nn.Module.__init__(self)  # not Linear's, which would allocate the weight
        self.in_features, self.out_features = in_features, out_features
        self.w_bits, self.weight_layerwise = check_bits(w_bits), weight_layerwise
        self.kept = None  # see kernels.kept
        self.weight_dtype = torch.get_default_dtype() if dtype is None else dtype

        def parameter(*shape: int, dtype: torch.dtype | None) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)

        self.weight_codes = parameter(out_features, row_bytes(in_features, w_bits), dtype=torch.uint8)
        self.weight_clip_val = parameter(1 if weight_layerwise else out_features, 1, dtype=torch.float32)
        self.register_parameter("bias", parameter(out_features, dtype=dtype) if bias else None)

    @classmethod
    def from_codes(
        cls, codes: Tensor, alpha: Tensor, bias: Tensor | None, w_bits: int, layerwise: bool = False
    ) -> "PackedLinear":
        """A layer of the signed codes [out, in] (int8), step sizes α ([out, 1], or one element) and bias [out]."""
        out_features, in_features = codes.shape
        settings = {"device": "meta", "w_bits": w_bits, "weight_layerwise": layerwise}
        layer = cls(in_features, out_features, bias is not None, **settings)
        packed = torch.cat([pack_codes(codes[rows], w_bits) for rows in row_chunks(*codes.shape)])
        layer.weight_codes = nn.Parameter(packed, requires_grad=False)
        layer.weight_clip_val = nn.Parameter(
            alpha.detach().float().clamp(min=ALPHA_FLOOR).reshape(layer.weight_clip_val.shape), requires_grad=False
        )
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer.eval()

    @classmethod
    @torch.no_grad()
    def from_quantized(cls, layer: QuantizeLinear, name: str = "") -> "PackedLinear":
        """The packed twin of a trained or rounded layer, sharing its bias; on the meta device an empty one.

        ValueError, opening with `name`, if weight or step sizes hold NaN or inf.
        """
        dtype = layer.latent_weight().dtype
        if layer.latent_weight().is_meta:
            sizes = (layer.in_features, layer.out_features, layer.bias is not None)
            settings = {"w_bits": layer.w_bits, "weight_layerwise": layer.weight_layerwise}
            return cls(*sizes, device="meta", dtype=dtype, **settings).eval()
        weight, alpha = layer.effective_weight(), layer.weight_clip_val
        if not (weight.sum().isfinite() or weight.isfinite().all()) or not alpha.isfinite().all():
            raise ValueError(f"{name or cls.__name__}: the weight or its step sizes hold NaN or inf")
        weight, steps = layer.code_source()
        steps = steps.expand(len(weight), 1)
        codes = torch.cat([
            quantize_codes(weight[rows], steps[rows], layer.w_bits) for rows in row_chunks(*weight.shape)
        ])  # fmt: skip
        packed = cls.from_codes(codes, alpha, layer.bias, layer.w_bits, layer.weight_layerwise)
        packed.weight_dtype = dtype
        return packed

    def codes(self) -> Tensor:
        """Signed codes [out, in] (int8)."""
        return unpack_codes(self.weight_codes, self.w_bits, self.in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in], equal to the quantizer's output."""
        return kernels.dequantize(self.weight_codes, self.weight_clip_val, self.w_bits, self.in_features, dtype)

    def weight_like(self) -> tuple[torch.dtype, torch.device]:
        return self.weight_dtype if self.bias is None else self.bias.dtype, self.weight_codes.device

    def _apply(self, fn, recurse=True):
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device="cpu")).dtype
        return super()._apply(fn, recurse)

    # diffusers looks an adapter's layers up in state_dict(), under the name of their weight. What stands there is
    # [out, in, bits]: no other layer can take it for a weight, and it costs nothing in a file.
    def _signature(self) -> list[int]:
        return [self.out_features, self.in_features, self.w_bits]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = torch.tensor(self._signature(), device="cpu")

    def _load_from_state_dict(self, state_dict, prefix, *args):
        signature = state_dict.pop(f"{prefix}weight", None)
        if signature is not None and signature.tolist() != self._signature():
            raise ValueError(f"{prefix}weight: codes take no other weight; load it before the model is packed")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def requires_grad_(self, requires_grad: bool = True) -> "PackedLinear":
        return refuse_writing() if requires_grad else super().requires_grad_(False)

    def __getstate__(self) -> dict:
        return vars(self) | {"kept": None}  # a copy makes its own

    def _token_dtype(self, x: Tensor) -> torch.dtype | None:
        """What tokens x [..., in] are quantized to; None in exact mode and where it has to serve."""
        parameters = self._parameters  # nn.Module would look for each in vain before it looks here
        if parameters["weight_clip_val"].requires_grad:
            refuse_writing()
        if self.mode != "fast" or kernels.wants_gradient(x, parameters["bias"]):
            return None
        return kernels.token_dtype(x, self.out_features, self.w_bits)

    def forward(self, input: Tensor) -> Tensor:
        watched = torch.compiler.is_compiling() or torch.is_grad_enabled()
        if not watched and self.kept is not None and self.mode == "exact":
            # The short way through what follows, where kernels.kept has nothing to renew: of a small layer on a CPU
            # every call of another function shows.
            parameters = self._parameters
            codes, alpha, bias = parameters["weight_codes"], parameters["weight_clip_val"], parameters["bias"]
            state = input.dtype, codes.data_ptr(), codes._version, alpha.data_ptr(), alpha._version
            usual = not alpha.requires_grad and (bias is None or bias.dtype == input.dtype)
            if usual and self.kept[0] == state:
                return F.linear(input, self.kept[1], bias)  # which autocast rounds as the rest of this would
        x = _autocast(input)
        if (dtype := self._token_dtype(x)) is not None:
            return kernels.fast_linear(x, dtype, [self])[0]
        bias = self._parameters["bias"]
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        if not kernels.wants_gradient(x, bias) and (weight := kernels.kept(self, x.dtype)) is not None:
            return F.linear(x, weight, bias)
        return kernels.exact_linear(x, self.weight_codes, self.weight_clip_val, bias, self.w_bits)

    @staticmethod
    def together(layers: Sequence[nn.Module], input: Tensor) -> Sequence[Tensor]:
        """[layer(input) for layer in layers]; packed ones in fast mode that nothing hooks are multiplied as one."""
        if all(type(layer) is PackedLinear and is_unhooked(layer) for layer in layers):
            x = _autocast(input)
            dtype = layers[0]._token_dtype(x)
            if dtype is not None and all(layer._token_dtype(x) == dtype for layer in layers):
                return kernels.fast_linear(x, dtype, layers)
        return [layer(input) for layer in layers]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, w_bits={self.w_bits}"


@torch.no_grad()
def adopt_codes(layer: QuantizeLinear, packed: "PackedLinear", name: str = "") -> None:
    """Give `layer` the step sizes [out, 1] and the bias [out] of `packed`, and weights that quantize to its codes.

    Each weight of [out, in] goes the shortest way into the range of its code c, between α·(c + s ± 1/2)/n and open
    beyond the outermost codes, and stays MARGIN of α/n inside. In fp32 all codes are met; a weight kept in bf16 may
    miss one at 8 bits. ValueError, opening with `name`, if the layers differ in shape.
    """
    weight = layer.latent_weight()
    if (packed.out_features, packed.in_features) != weight.shape or (packed.bias is None) != (layer.bias is None):
        raise ValueError(f"{name or type(layer).__name__}: {packed}, expected the shape of {layer}")
    (n, s), bits = code_grid(layer.w_bits), layer.w_bits
    lowest, highest = (-1, 1) if bits == 0 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    codes, step = packed.codes().to(weight.device), packed.weight_clip_val.to(weight.device)
    low, high = ((codes + s + side) * (step / n) for side in (MARGIN - 0.5, 0.5 - MARGIN))
    low[codes == lowest], high[codes == highest] = -torch.inf, torch.inf
    weight.copy_(weight.float().clamp(low, high))
    layer.weight_clip_val.copy_(step)
    if layer.bias is not None:
        layer.bias.copy_(packed.bias)


# ------------------------------------------------------------------------------------------------------------ files


def config_digest(config: dict) -> str:
    """SHA-256 of a config without the entries that open with an underscore and the derived one."""
    kept = {name: value for name, value in config.items() if not name.startswith("_") and name != DERIVED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def index_name(variant: str | None) -> str:
    """The file name of the index of a variant, as diffusers has it."""
    return INDEX if variant is None else INDEX.replace(".json", f".{variant}.json")


class PackedWriter:
    """Writes a packed folder tensor by tensor, holding no more than one shard in memory.

    Files of the same variant that stood there are replaced, those of others stay.
    """

    def __init__(self, folder: str | os.PathLike, shard_bytes: int = 2 * 10**9, variant: str | None = None):
        self.folder, self.shard_bytes, self.variant = Path(folder), shard_bytes, variant
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shards: list[list[str]] = []
        self.pending: dict[str, Tensor] = {}
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor, as it is to be stored."""
        size = tensor.numel() * tensor.element_size()
        if self.pending and sum(t.numel() * t.element_size() for t in self.pending.values()) + size > self.shard_bytes:
            self._flush()
        self.pending[name] = tensor.detach().cpu().contiguous()
        self.total += size

    def _flush(self) -> None:
        save_file(self.pending, self.folder / f"shard-{len(self.shards)}", metadata={"format": "pt"})
        self.shards.append(list(self.pending))
        self.pending = {}

    def close(self, config: dict) -> None:
        """Give the shards their names and write the index; config.json is written by the model."""
        self._flush()
        stem, index_file = "diffusion_pytorch_model", self.folder / index_name(self.variant)
        stem += f".{self.variant}" if self.variant else ""
        index_file.unlink(missing_ok=True)
        for earlier in self.folder.glob("*.safetensors"):
            if re.fullmatch(rf"{re.escape(stem)}(-\d+-of-\d+)?", earlier.stem):
                earlier.unlink()
        files = [f"{stem}-{i + 1:05d}-of-{len(self.shards):05d}.safetensors" for i in range(len(self.shards))]
        for i, file in enumerate(files):
            os.replace(self.folder / f"shard-{i}", self.folder / file)
        index = {
            "metadata": {
                "packed_format": FORMAT,
                "total_size": self.total,
                "config_sha256": config_digest(config),
                "sha256": {file: _file_digest(self.folder / file) for file in files},
            },
            "weight_map": {name: file for file, names in zip(files, self.shards, strict=True) for name in names},
        }
        index_file.write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a packed model as they stand on disk."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if isinstance(module, PackedLinear) and name == "weight_codes":
                parameter = to_disk(parameter.detach(), module.w_bits, module.in_features)
            yield full, parameter


def read_index(folder: Path, config: dict, blocks: Mapping[str, str], variant: str | None = None) -> dict:
    """The index of a packed folder; ValueError if it is unreadable, of another format, or not that of `config`.

    blocks: the model's lists of blocks, of each the config's entry with its length.
    """
    file = folder / index_name(variant)
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        metadata, weight_map = index["metadata"], index["weight_map"]
        version, digests, wanted = metadata["packed_format"], metadata["sha256"], metadata["config_sha256"]
        sound = isinstance(digests, dict) and set(digests) == set(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: no index of a packed checkpoint ({error!r}); save or download it again") from None
    if version != FORMAT:
        raise ValueError(f"{file}: packed format {version!r}, this code reads {FORMAT}; update the code")
    if not sound or not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in digests):
        raise ValueError(f"{file}: shards and checksums do not belong together; save or download it again")
    if config_digest(config) != wanted:
        raise ValueError(f"{folder / 'config.json'}: differs from what was saved; save or download it again")
    for kind, entry in blocks.items():  # before a model of that size is built
        found = len({name.split(".")[1] for name in weight_map if name.startswith(f"{kind}.")})
        if config.get(entry) != found:
            raise ValueError(f"{file}: holds {found} {kind}, config.json says {entry}={config.get(entry)!r}")
    return index


def load_packed(model: nn.Module, folder: Path, index: dict, dtype: torch.dtype | None, device: torch.device) -> None:
    """Fill `model`, built on the meta device, from a packed folder; `dtype` is that of what is not quantized.

    Codes travel to a GPU as they are on disk and are decoded there, several layers at a time, while the shards'
    checksums are computed. Every tensor's name, shape and dtype, the range of the codes and their padding are checked:
    ValueError names the first that is wrong. No weight is ever larger than its codes.
    """
    weight_map, digests = index["weight_map"], index["metadata"]["sha256"]
    wanted = {name for name, _ in model.named_parameters()}
    for names, problem in ((wanted - set(weight_map), "is missing"), (set(weight_map) - wanted, "is not expected")):
        if names:
            raise ValueError(f"{folder}: {min(names)} {problem} in the index; it does not belong to config.json")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a thread a layer, not one a part of each step
    try:
        with ThreadPoolExecutor() as hashing, ThreadPoolExecutor(LOADERS) as loading:
            verified = [hashing.submit(_verify, folder / name, digests[name]) for name in sorted(digests)]
            try:
                _fill(model, folder, weight_map, dtype, device, loading)
            finally:
                for each in verified:  # of a damaged file that is said, and not what followed from it
                    each.result()
    finally:
        torch.set_num_threads(threads)


def _verify(file: Path, wanted: str) -> None:
    """ValueError unless the file's SHA-256 is the one of the index."""
    try:
        digest = _file_digest(file)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); save or download it again") from None
    if digest != wanted:
        raise ValueError(f"{file}: damaged (its SHA-256 differs from the index); save or download it again")


def _fill(
    model: nn.Module, folder: Path, weight_map: dict[str, str], dtype: torch.dtype | None, device: torch.device,
    pool: ThreadPoolExecutor,
) -> None:  # fmt: skip
    """Give `model` its parameters, a thread of the pool each; ValueError on the first that is wrong."""
    problems, flags = [], []
    reading = device if device.type == "cuda" else torch.device("cpu")  # the others lack one or the other operation
    for shard in sorted(set(weight_map.values())):
        file, names = folder / shard, sorted(name for name, where in weight_map.items() if where == shard)
        try:
            with safe_open(file, framework="pt", device=str(reading)) as tensors:
                if odd := set(tensors.keys()) ^ set(names):
                    raise ValueError(f"{file}: holds other tensors than the index says, such as {min(odd)}")

                def load(name: str, file=file, tensors=tensors) -> tuple[list[str], Tensor]:
                    path, _, kind = name.rpartition(".")
                    module, found = model.get_submodule(path), tensors.get_slice(name)
                    _check_tensor(file, name, found.get_shape(), found.get_dtype(), module, kind)
                    value, found, wrong = _finish(tensors.get_tensor(name), module, kind, dtype)
                    setattr(module, kind, nn.Parameter(value.to(device), requires_grad=False))
                    return [f"{file}: {name}{problem}" for problem in found], wrong

                loaded = [pool.submit(load, name) for name in names]
                wait(loaded)  # the file stays open as long as one reads
                for found, wrong in (each.result() for each in loaded):
                    problems += found
                    flags.append(wrong)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error}); save or download it again") from None
    for problem, found in zip(problems, torch.cat(flags).tolist(), strict=True):
        if found:
            raise ValueError(problem)


def _check_tensor(file: Path, name: str, shape: list[int], dtype: str, module: nn.Module, kind: str) -> None:
    """ValueError unless the stored tensor has the shape and the dtype that the layer needs."""
    expected = list(getattr(module, kind).shape)
    dtypes = {"F32", "F16", "BF16"}
    if isinstance(module, PackedLinear):
        if kind == "weight_codes":
            expected, dtypes = [expected[0], disk_row_bytes(module.in_features, module.w_bits)], {"U8"}
        elif kind == "weight_clip_val":
            dtypes = {"F32"}
    if list(shape) != expected or dtype not in dtypes:
        raise ValueError(f"{file}: {name} is {dtype} {list(shape)}, expected {' or '.join(sorted(dtypes))} {expected}")


def _finish(
    tensor: Tensor, module: nn.Module, kind: str, dtype: torch.dtype | None
) -> tuple[Tensor, tuple[str, ...], Tensor]:
    """The stored tensor as it is kept in memory, what can be wrong with it, and whether it is (bool, on its device)."""
    packed = isinstance(module, PackedLinear)
    if packed and kind == "weight_codes":
        codes, wrong = decode(tensor, module.w_bits, module.in_features)
        return codes, tuple(f": {problem}" for problem in PROBLEMS), wrong
    low, high = tensor.aminmax()  # NaN if one is
    wrong = torch.stack([~(low.isfinite() & high.isfinite()), low <= 0])
    if packed and kind == "weight_clip_val":
        return tensor, (" holds NaN or inf", " holds step sizes that are not positive"), wrong
    return tensor if dtype is None else tensor.to(dtype), (" holds NaN or inf",), wrong[:1]
