"""A diffusers transformer with quantized linears, saved and loaded the diffusers way: what all families share.

QuantizedTransformer goes before one of diffusers' transformers among the bases of a class, which then is diffusers' own
with the nn.Linears inside its blocks, and those of its modulation, swapped for QuantizeLinears that share their
parameters. Embedders, the last norm and the last projection stay as they are. What the swap needs stands in
config.json, so from_pretrained can tell what a folder or hub repository holds:

    full precision  (no w_bits in its config, or 16 and no LoRA)  any settings can be asked for; α starts from weights
    quantized       (w_bits < 16, or LoRA)                        loaded as it is; contradicting settings are an error
    packed          (the same, and packed)                        likewise; as small in memory as its codes
    trained         (the same, and base.json)                     likewise; the rest comes from its base (trained.py)

    teacher = FluxTransformer2DModel.from_pretrained(path, subfolder="transformer")  # diffusers' model, bit for bit
    student = FluxTransformer2DModel.from_pretrained(path, subfolder="transformer", w_bits=0)
    student.pack().save_pretrained("student")  # without pack(): the weights, to train on; with it: adapters on top
    pipe = FluxPipeline.from_pretrained(path, transformer=FluxTransformer2DModel.from_pretrained("student"))

A new family is a file like modeling_flux2_quant.py: its class with __init__ = init_like(diffusers' class) and a Family,
and its name in families.py.
"""

import contextlib
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import convert_file_size_to_int
from diffusers.configuration_utils import register_to_config
from huggingface_hub import snapshot_download
from torch import nn

from models.attention import FusedProcessor
from models.kernels import MODES
from models.packing import (
    DERIVED,
    FORMAT,
    PackedLinear,
    PackedWriter,
    adopt_codes,
    index_name,
    load_packed,
    read_index,
    stored_tensors,
)
from models.trained import BASE, load_trained
from models.utils_quant import (
    FULL_PRECISION_BITS,
    LoRAQuantizeLinear,
    QuantizeLinear,
    check_bits,
    check_clip_init,
    check_lora_r,
)

DEFAULT_SETTINGS = {  # arguments of every family's class, after diffusers' own
    "w_bits": 16,
    "lora_r": 0,
    "lora_alpha": 1.0,
    "clip_init": "mse",
    "weight_layerwise": False,
    "quantize_modulation": True,
    "packed": 0,
}
NOTHING_ODD = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
QUANT_METHOD = "flux-1.58bit"  # and after it which class reads the folder
UPLOAD = {"repo_id", "commit_message", "private", "create_pr", "token"}  # what save_pretrained passes to the hub
LOCATION = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"}
LOADING = LOCATION | {
    "device_map", "disable_mmap", "dtype", "flashpack_kwargs", "ignore_mismatched_sizes", "low_cpu_mem_usage",
    "max_memory", "offload_folder", "offload_state_dict", "output_loading_info", "parallel_config",
    "quantization_config", "torch_dtype", "use_flashpack", "use_safetensors", "user_agent", "variant",
}  # fmt: skip
SINGLE_FILE = {"config", "config_revision", "device", "original_config"}  # and what from_single_file takes beside it


@dataclass(frozen=True)
class Blocks:
    """A list of blocks, each called with hidden_states, encoder_hidden_states, image_rotary_emb and what stands here.

    count: the config's entry with their number.
    made: keyword arguments, the same for all of them; of each the module before the blocks whose output it is.
    fixed: further ones, with which a block takes text and image apart and returns (encoder_hidden_states,
        hidden_states), whether or not the model itself calls it so.
    """

    count: str
    made: Mapping[str, str]
    fixed: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """What tells one family of transformers from another.

    name: as its makers call it.
    blocks: the lists of its blocks by name, in the order in which they compute.
    modulation: linears that make AdaLN's shifts, scales and gates; how their names end, as modules of the model.
    order: linears inside a block by their names there, in the order in which they compute. The inputs of those of one
        group are made before any of the group is called; q, k and v of one stream get the same tensor.
    around: modules outside of the blocks that are many small operations each: embeddings, modulation, the last norm.
    fused: classes of modules and attention processors, each with the one that takes its place in fast mode and in
        compiled blocks of a packed model. A module only changes its class; a processor's is called without arguments.
    """

    name: str
    blocks: Mapping[str, Blocks]
    modulation: tuple[str, ...]
    order: tuple[tuple[str, ...], ...]
    around: tuple[str, ...] = ()
    fused: Mapping[type, type] = field(default_factory=dict)

    def block_names(self, model: nn.Module) -> list[str]:
        """The names of the model's blocks, in the order in which they compute; diffusers' own class will do."""
        return [f"{name}.{i}" for name in self.blocks for i in range(len(getattr(model, name)))]

    def counts(self) -> dict[str, str]:
        """By the name of a list of blocks, the config's entry with its length."""
        return {name: blocks.count for name, blocks in self.blocks.items()}

    def is_modulation(self, name: str) -> bool:
        """Whether this is the name of a modulation linear of the model, inside a block or outside of them."""
        return f".{name}".endswith(tuple(f".{ending}" for ending in self.modulation))

    def linears(self, model: nn.Module, quantize_modulation: bool = True) -> dict[str, nn.Linear]:
        """By name, the linears of the model that are quantized; diffusers' own class will do."""
        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and (quantize_modulation if self.is_modulation(name) else name.partition(".")[0] in self.blocks)
        }


def is_quantized(settings: dict) -> bool:
    """Whether these settings (or a config that holds them) ask for any layer other than nn.Linear."""
    return settings.get("w_bits", 16) < FULL_PRECISION_BITS or settings.get("lora_r", 0) > 0


def check_settings(settings: dict) -> None:
    """ValueError on a bit width, rank, initialisation or packed format that does not exist."""
    check_bits(settings["w_bits"])
    check_lora_r(settings["lora_r"])
    check_clip_init(settings["clip_init"])
    if settings["packed"] and (settings["packed"] != FORMAT or settings["w_bits"] >= 16 or settings["lora_r"]):
        raise ValueError(
            f"packed={settings['packed']!r} with w_bits={settings['w_bits']}, lora_r={settings['lora_r']}: a packed "
            f"model has format {FORMAT}, fewer than 16 bits and no LoRA in its quantizers"
        )


def init_like(stock: type) -> Callable:
    """__init__ of a class between QuantizedTransformer and `stock`, one of diffusers' transformers.

    Its arguments are those of `stock` and after them the settings, all of them in the config. TypeError on others.
    """
    theirs = inspect.signature(stock.__init__)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    settings = [inspect.Parameter(k, kind, default=v, annotation=type(v)) for k, v in DEFAULT_SETTINGS.items()]
    signature = theirs.replace(parameters=[*theirs.parameters.values(), *settings])

    def __init__(self, *args, **kwargs):
        signature.bind(self, *args, **kwargs)
        check_settings(self.config)
        stock.__init__(self, **{name: self.config[name] for name in list(theirs.parameters)[1:]})
        self._swap_linears()

    __init__.__signature__ = signature
    return register_to_config(__init__)


class QuantizedTransformer:
    """What goes before diffusers' class; its arguments are that class's, and after them

    w_bits: 0 (1.58 bit), 1 … 8; 16 and above is full precision.
    lora_r, lora_alpha: rank (0: none) and numerator of the scaling lora_alpha/lora_r of a LoRA inside the quantizer.
    clip_init: how step sizes start, "mse" or "max" (see utils_quant.init_clip_val).
    weight_layerwise: one step size a matrix instead of one a row.
    quantize_modulation: False leaves the AdaLN modulation linears in full precision.
    packed: format version of the packed weights, 0 if they are not packed; made by `pack()`.

    Step sizes and LoRA stay fp32 under `torch_dtype` and `.to(dtype)`; `model.dtype` is that of the other parameters.
    """

    family: Family
    # Read by from_pretrained (which is told a torch_dtype) and by `dtype`; QuantizeLinear sees to `.to(dtype)`.
    _keep_in_fp32_modules = list(LoRAQuantizeLinear._fp32_parameters)
    inference_mode = "exact"
    _blocks_are_compiled = False

    def quantize_as(self, config: Mapping) -> None:
        """Make this full-precision model one of the settings in `config`, whose step sizes are yet to be loaded."""
        self.register_to_config(**{key: config[key] for key in DEFAULT_SETTINGS if key in config})
        self._swap_linears(clip_init="max")  # found in no time

    def _swap_linears(self, **overrides) -> None:
        """Replace the linears as the config says, each sharing its parameters with the old one."""
        config = self.config
        if not is_quantized(config):
            return
        layer_class, settings = QuantizeLinear, {k: config[k] for k in ("w_bits", "clip_init", "weight_layerwise")}
        if config.lora_r:
            layer_class = LoRAQuantizeLinear
            settings |= {"lora_r": config.lora_r, "lora_alpha": config.lora_alpha}
        settings |= overrides
        for name, linear in self.family.linears(self, config.quantize_modulation).items():
            self.set_submodule(name, layer_class.from_linear(linear, name, **settings))
        if config.packed:
            self._pack_linears()

    def _pack_linears(self) -> None:
        modules = self.named_modules()
        packed = {n: PackedLinear.from_quantized(m, n) for n, m in modules if isinstance(m, QuantizeLinear)}
        for name, layer in packed.items():  # all of them or, after an error, none
            self.set_submodule(name, layer)
        self.requires_grad_(False)
        self.eval()

    def pack(self) -> "QuantizedTransformer":
        """Replace every quantized weight by its codes, in place; the outputs stay the same, codes are not trained.

        ValueError on a model that is not quantized. Returns the model.
        """
        if self.config.w_bits >= FULL_PRECISION_BITS:
            raise ValueError(f"pack(): w_bits={self.config.w_bits} has no codes; quantize the model first")
        if not self.config.packed:
            self._pack_linears()
            self._set_in_config(packed=FORMAT, lora_r=0)
        return self

    def _set_in_config(self, **settings) -> None:
        """Change the config, also for from_config(), which leaves out what is noted as a default."""
        defaults = [key for key in self.config.get("_use_default_values", []) if key not in settings]
        self.register_to_config(**settings, _use_default_values=defaults)

    def start_from(self, packed: "QuantizedTransformer") -> "QuantizedTransformer":
        """Move the weights to where they quantize to the codes of `packed`, a one-shot of the same transformer.

        A weight with another code goes just across the threshold between the two, the others stay; step sizes, biases,
        norms and embedders become those of `packed`. For a model that is not trained yet. Returns it.
        ValueError, naming the setting or the layer, unless both are quantized alike.
        """
        for key in ("w_bits", "weight_layerwise"):
            if packed.config[key] != self.config[key]:
                raise ValueError(f"start_from(): {key}={packed.config[key]}, this model has {key}={self.config[key]}")
        codes = {name: layer for name, layer in packed.named_modules() if isinstance(layer, PackedLinear)}
        layers = {name: layer for name, layer in self.named_modules() if isinstance(layer, QuantizeLinear)}
        if other := sorted(codes.keys() ^ layers.keys()):
            raise ValueError(f"start_from(): {other[0]} is quantized in one of the models only")
        for name, layer in layers.items():
            adopt_codes(layer, codes[name], name)
        with torch.no_grad():
            for name, parameter in packed.named_parameters():
                if name.rpartition(".")[0] not in codes:
                    self.get_parameter(name).copy_(parameter)
        return self

    def set_inference_mode(self, mode: str) -> "QuantizedTransformer":
        """How a packed model multiplies: "exact" (the default) or "fast", with activations in 8 bits (see kernels.py).

        Returns the model. ValueError on another word or a model that is not packed.
        """
        if mode not in MODES:
            raise ValueError(f"inference mode {mode!r}: expected one of {', '.join(MODES)}")
        if not self.config.packed:
            raise ValueError(f"inference mode {mode!r}: this model holds weights, not codes; pack() it first")
        self.inference_mode = mode
        for module in self.modules():
            if isinstance(module, PackedLinear):
                module.mode = mode
        self._set_fused()
        return self

    def _set_fused(self) -> None:
        """Let modules and attention processors of diffusers' own give way to the family's, or those to diffusers'.

        The family's are for fast mode and for compiled blocks of a packed model: in exact mode they do what diffusers'
        do wherever torch.compile is not at work. Other classes (an IP-Adapter's processors) stay. Hooks stay: a
        module's class is changed and not its forward, which is where they are. What was chosen on a processor, such as
        the attention backend, goes along.
        """
        swap = self.family.fused
        if not (self.inference_mode == "fast" or self._blocks_are_compiled and self.config.packed):
            swap = {fused: stock for stock, fused in swap.items()}
        for module in self.modules():
            if type(module) in swap:
                module.__class__ = swap[type(module)]
            processor = getattr(module, "processor", None)
            if type(processor) in swap:
                new = swap[type(processor)]()
                vars(new).update((name, value) for name, value in vars(processor).items() if name != "mode")
                module.set_processor(new)
            if isinstance(getattr(module, "processor", None), FusedProcessor):
                module.processor.mode = self.inference_mode

    def set_attn_processor(self, processor) -> None:
        """As in diffusers; its own processor gives way to ours, as when an IP-Adapter is unloaded (see _set_fused)."""
        super().set_attn_processor(processor)
        self._set_fused()

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """As in diffusers; of a packed model what is around the blocks, too, with fast mode's queries, keys and GELU.

        Around the blocks some hundred small operations would keep a GPU waiting, nearly half of them for the rotary
        embedding. Queries, keys and GELU are computed in fp32 and rounded once, as the compiler does it too, but in
        fewer instructions.
        """
        self._blocks_are_compiled = True
        self._set_fused()
        super().compile_repeated_blocks(*args, **kwargs)
        if self.config.packed:
            for name in self.family.around:
                self.get_submodule(name).compile(*args, **kwargs)

    def requires_grad_(self, requires_grad: bool = True) -> "QuantizedTransformer":
        """As in torch; ValueError on a packed model, whose codes and step sizes stay as they are."""
        if requires_grad and self.config.packed:
            raise ValueError("codes cannot be trained: leave the packed model frozen and train an adapter on top of it")
        return super().requires_grad_(requires_grad)

    def fuse_lora(self, *args, **kwargs) -> None:
        """As in diffusers; ValueError on a quantized model, whose codes would round the adapter away."""
        if is_quantized(self.config):
            raise ValueError("fuse_lora() cannot merge an adapter into quantized weights: leave it unfused")
        super().fuse_lora(*args, **kwargs)

    def to_json_string(self) -> str:
        """As in diffusers; a quantized model's config says so in the way that keeps other classes from loading it."""
        config = json.loads(super().to_json_string())
        if is_quantized(config):
            kind = next(each for each in type(self).__mro__ if "family" in vars(each))  # FSDP2 makes a class of its own
            method = f"{QUANT_METHOD} (to be loaded with {kind.__module__}.{kind.__name__})"
            config[DERIVED] = {"quant_method": method}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def load_config(cls, *args, **kwargs) -> dict | tuple:
        """As in diffusers, without the entry that is there for other classes."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        method = config.get(DERIVED) if isinstance(config, dict) else None
        if isinstance(method, dict) and str(method.get("quant_method")).startswith(f"{QUANT_METHOD} "):
            del config[DERIVED]
        return loaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "2GB",
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        **kwargs,
    ) -> None:
        """As in diffusers; a packed model is written as models/packing.py describes, in shards of max_shard_size.

        kwargs: those of push_to_hub; TypeError on others. ValueError, before anything is written, if the model holds
        what from_pretrained could not read again (adapters), and on a quantized one in another format than safetensors.
        """
        _check_arguments("save_pretrained", kwargs, UPLOAD)
        if os.path.isfile(save_directory):
            raise NotADirectoryError(f"save_pretrained(): {save_directory} is a file; name a folder")
        if is_quantized(self.config) and (use_flashpack or not safe_serialization):
            raise ValueError("save_pretrained(): a quantized model is saved as safetensors only")
        self._check_tensors()
        if self.config.packed:
            if is_main_process:
                self._save_packed(save_directory, convert_file_size_to_int(max_shard_size), variant)
                if push_to_hub:
                    self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), variant=variant, **kwargs)
            return
        if is_main_process:
            (Path(save_directory) / index_name(variant)).unlink(missing_ok=True)  # of an earlier model
        super().save_pretrained(
            os.fspath(save_directory), is_main_process, save_function, safe_serialization, variant, max_shard_size,
            push_to_hub, use_flashpack, **kwargs,
        )  # fmt: skip

    def _check_tensors(self) -> None:
        """ValueError unless the parameters are those of a model with this config; PEFT's empty layers are removed."""
        wrappers = [module for module in self.modules() if "base_layer" in module._modules]
        inside = [name for module in wrappers for name, _ in module.named_parameters()]
        if wrappers and all(name.startswith("base_layer.") for name in inside):
            self.unload_lora()  # delete_adapters() leaves them
        with torch.device("meta"):
            wanted = {name: parameter.shape for name, parameter in self.from_config(self.config).named_parameters()}
        found = {name: parameter.shape for name, parameter in self.named_parameters()}
        if odd := sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)):
            raise ValueError(
                f"save_pretrained(): {odd[0]} is not what this model's config describes; adapters (LoRA, IP-Adapter) "
                "are files of their own: save and unload them first"
            )

    def _save_packed(self, folder: str | os.PathLike, shard_bytes: int, variant: str | None) -> None:
        writer = PackedWriter(folder, shard_bytes, variant)
        for name, tensor in stored_tensors(self):
            writer.add(name, tensor)
        self.save_config(folder)
        writer.close(dict(self.config))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "QuantizedTransformer":
        """Load a full-precision or a quantized transformer of this family from a folder or the hub; safetensors only.

        kwargs: those of diffusers' from_pretrained (subfolder, variant, torch_dtype, …), entries of the config to be
        changed, and this class's settings (w_bits, lora_r, …). Weights are mapped from disk where their dtype allows
        and α is found layer by layer on the device that `device_map` puts them on (default: CPU).
        TypeError on other words; ValueError on settings that do not exist or contradict a quantized checkpoint's
        config, on missing, unexpected or wrongly shaped tensors, and on NaN or inf in a weight; OSError on a missing or
        truncated file.
        """
        path = pretrained_model_name_or_path
        _check_arguments("from_pretrained", kwargs, LOADING | cls._get_init_keys(cls))
        wants_info = kwargs.pop("output_loading_info", False)
        asked = {key: kwargs.pop(key) for key in DEFAULT_SETTINGS if key in kwargs}
        _check_device_map(kwargs.get("device_map"))
        config, _ = cls.load_config(path, return_unused_kwargs=True, **kwargs)
        kind = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
        if kind != cls.__name__:
            wanted = f"expected a {cls.__name__}; load it with the class of that name"
            raise ValueError(f"{path}: config.json describes a {kind}, {wanted}")
        stored = {key: config.get(key, default) for key, default in DEFAULT_SETTINGS.items()}
        settings = stored | asked
        if stored["packed"]:
            changes = {key: value for key, value in kwargs.items() if key not in LOADING}
            _check_agreement(path, asked | changes, config | stored)
        check_settings(settings)
        if is_quantized(settings):
            _check_alone(path, kwargs | {DERIVED: config.get(DERIVED) or kwargs.get(DERIVED)})
        if stored["packed"]:
            model = cls._from_packed(path, config, kwargs)
            return (model, NOTHING_ODD) if wants_info else model
        if (Path(path) / (kwargs.get("subfolder") or "") / BASE).is_file():
            _check_agreement(path, asked, stored)
            folder = Path(path) / (kwargs.get("subfolder") or "")
            dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
            model = load_trained(cls, folder, config, dtype, device_map=kwargs.get("device_map"))
            return (model, NOTHING_ODD) if wants_info else model
        if is_quantized(stored):
            _check_agreement(path, asked, stored)
            kwargs |= settings
        else:  # the linears are swapped after loading, so that nothing is missing while diffusers reads
            kwargs |= settings | {"w_bits": 16, "lora_r": 0}

        kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        try:
            with _without_loading_warnings():
                model, info = super().from_pretrained(path, **kwargs)
        except OSError as error:
            if not os.path.isdir(path):  # the hub's own errors say what to do
                raise
            raise OSError(f"{' '.join(str(error).split())} Save or download {path} again.") from error
        _check_loading_info(path, model, info)
        if is_quantized(settings) and not is_quantized(stored):
            model._set_in_config(w_bits=settings["w_bits"], lora_r=settings["lora_r"])
            model._swap_linears()
        return (model, info) if wants_info else model

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path_or_dict, **kwargs) -> "QuantizedTransformer":
        """As in diffusers, from one file in full precision; kwargs may hold this class's settings (w_bits, …).

        TypeError on other words than diffusers' and the config's; ValueError on settings that do not exist, on a file
        that holds another model or not all of this one.
        """
        source = pretrained_model_link_or_path_or_dict
        _check_arguments("from_single_file", kwargs, LOADING | SINGLE_FILE | cls._get_init_keys(cls))
        name = "the state dict" if isinstance(source, dict) else source
        settings = DEFAULT_SETTINGS | {key: kwargs.pop(key) for key in DEFAULT_SETTINGS if key in kwargs}
        check_settings(settings)
        if settings["packed"]:
            raise ValueError(f"{name}: packed={settings['packed']} is no setting to load a file with; use pack()")
        if is_quantized(settings):
            _check_alone(name, kwargs)
        try:
            with _without_loading_warnings():
                model = super().from_single_file(source, **kwargs, w_bits=16, lora_r=0, packed=0)
        except (LookupError, NotImplementedError, TypeError, ValueError) as error:  # of reading what is not there
            problem = " ".join(str(error).split())[:200]
            family = cls.family.name
            raise ValueError(f"{name}: no full-precision {family} transformer in one file ({problem})") from error
        if is_quantized(settings):
            model._set_in_config(**settings)
            model._swap_linears()
        return model

    @classmethod
    def _from_packed(cls, path: str | os.PathLike, config: dict, kwargs: dict) -> "QuantizedTransformer":
        """The model of a packed folder or hub id; of kwargs, those that say where it is, its dtype and its device."""
        subfolder = kwargs.get("subfolder") or ""
        if not os.path.isdir(path):
            names = LOCATION - {"subfolder"}
            allowed = [os.path.join(subfolder, name) for name in ("*.json", "*.safetensors")]
            asked = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            path = snapshot_download(path, allow_patterns=allowed, **asked)
        folder = Path(path) / subfolder
        index = read_index(folder, config, cls.family.counts(), kwargs.get("variant"))
        try:
            with torch.device("meta"):
                model = cls.from_config(config)
        except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            problem = " ".join(str(error).split())[:200]
            raise ValueError(f"{folder / 'config.json'}: describes no transformer ({problem}); save it again") from None
        device_map = kwargs.get("device_map")
        device = next(iter(device_map.values()), None) if isinstance(device_map, dict) else device_map
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype") or torch.float32  # as diffusers does
        dtype = None if dtype == "auto" else dtype  # as they are stored
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype={dtype!r} is not supported: name a torch dtype, such as torch.bfloat16, or 'auto'")
        device = torch.device("cpu" if device is None else device)
        if device.type == "cuda" and device.index is None:  # threads that load have a current device of their own: 0
            device = torch.device("cuda", torch.cuda.current_device())
        load_packed(model, folder, index, dtype, device)
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.weight_dtype = model.dtype
        model.register_to_config(_name_or_path=str(path))
        return model.eval()

    def fuse_qkv_projections(self) -> None:
        """As in diffusers; ValueError on a quantized model, whose fused weights would be the unquantized ones."""
        if is_quantized(self.config):
            raise ValueError("fuse_qkv_projections() would drop the quantizers: use it with w_bits=16, lora_r=0 only")
        super().fuse_qkv_projections()


def _check_arguments(method: str, kwargs: dict, known: Iterable[str]) -> None:
    """TypeError if kwargs hold a word that the method does not know."""
    if unknown := sorted(kwargs.keys() - known):
        raise TypeError(f"{method}() got an unexpected keyword argument {unknown[0]!r}")


def _check_alone(path: str | os.PathLike, kwargs: dict) -> None:
    """ValueError if kwargs ask for what the layers of a quantized model cannot do."""
    for key in ("quantization_config", "parallel_config", "use_flashpack"):
        if kwargs.get(key):
            raise ValueError(f"{path}: {key} does not go with w_bits below 16 or a LoRA in the quantizer; leave it out")
    if kwargs.get("use_safetensors") is False:
        raise ValueError(f"{path}: use_safetensors=False is not supported; only safetensors are read")


def _check_device_map(device_map) -> None:
    """ValueError unless it is one device: the hooks that spread a model over several would not survive the swap."""
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    try:
        known = all(torch.device(device) for device in devices - {None})
    except (RuntimeError, TypeError):  # "auto" and the like are no devices
        known = False
    if len(devices) > 1 or not known:
        raise ValueError(f"device_map={device_map!r} is not supported: name one device, such as 'cuda'")


def _check_agreement(path: str | os.PathLike, asked: dict, stored: dict) -> None:
    """ValueError if a setting asked for is not that of the quantized checkpoint."""
    for key, value in asked.items():
        if value != stored[key]:
            raise ValueError(
                f"{path}: asked for {key}={value} but the checkpoint was quantized with {key}={stored[key]}; "
                f"leave {key} out or start from a full-precision checkpoint"
            )


@contextlib.contextmanager
def _without_loading_warnings():
    """What diffusers warns of while loading, missing or superfluous or misshapen tensors, is an error here."""
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_loading_info(path: str | os.PathLike, model: nn.Module, info: dict) -> None:
    """ValueError, naming the first tensor concerned, unless checkpoint and model hold the same tensors."""

    def refuse(names, problem):
        more = f" (and {len(names) - 1} more tensors)" if len(names) > 1 else ""
        raise ValueError(f"{path}: {problem}{more}; config.json and weights do not belong together or are incomplete")

    if mismatched := sorted(info["mismatched_keys"]):
        name, found, expected = mismatched[0]
        refuse(mismatched, f"{name} has shape {list(found)}, expected {list(expected)}")
    # A tensor that the shard index promises and the shard lacks is not in missing_keys: it just stays on meta.
    on_meta = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    if missing := sorted(on_meta.union(info["missing_keys"])):
        refuse(missing, f"{missing[0]} is missing")
    if unexpected := sorted(info["unexpected_keys"]):
        refuse(unexpected, f"{unexpected[0]} is not expected by a model with w_bits={model.config.w_bits}")
