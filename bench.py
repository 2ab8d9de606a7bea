"""Speed, memory and size of a ternary FLUX transformer beside the alternatives, in one process.

    python bench.py --config flux-dev --resolution 1024 512 --layers --load      # everything, on one 80 GB GPU
    python bench.py --config flux-schnell --resolution 512
    python bench.py --config flux2-klein-4b --resolution 1024                    # FLUX.2-klein-4B
    python bench.py --config tiny-flux --device cpu                              # on a laptop, in seconds
    python bench.py --config flux-dev --device cpu --layers --no_steps           # its matrix multiplications only
    python bench.py --model MY_MODEL                                             # a transformer's or pipeline's folder

The transformer gets random ternary weights on the device itself; every rival holds the same numbers in its own form, so
that the relative error ‖y − y_ref‖/‖y_ref‖ of the velocity says what that form costs. The reference is the uncompiled
full-precision rival, for the fast mode the uncompiled exact mode. All compiled rivals are compiled block by block: ours
with the options of utils/cuda_graph.py and with what is around its blocks (models/quantized_model.py), the others as
diffusers and torch do it, or with --same_options with the options of ours. The eager ones are the same models with
compilation switched off, the graphs are CUDA graphs of the compiled ones, in which the CPU's part of a step is gone.
Where the CPU is slower than the GPU (--resolution 512 on an H100), --cpp_wrapper halves its part for the compiled ones.

    ms         median over rounds in which the rivals take turns, each after one untimed step of its own
    ratio      to the anchor: the full-precision rival run the same way, that is as a graph for graphs, else compiled if
               anything is
    resident   bytes of the rival's own parameters
    peak       resident + what it left allocated in its first steps + (largest allocation during a step − allocation
               before it): its own, whatever else is on the card; only on CUDA
    disk       bytes of its tensors in a checkpoint

It writes OUTPUT_DIR/NAME.json with every figure and OUTPUT_DIR/NAME.png, a chart of the steps. NAME is made of the
command: the first one above writes flux-dev_resolution_1024_512_layers_load.json. Given again, a command replaces its
own figures and no others.
"""

import utils.interrupt  # noqa: F401 (Ctrl-C is a line from here on)

import argparse
import contextlib
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

from models.families import CLASSES
from models.kernels import MODES
from models.packing import PackedLinear, decode, store_codes
from models.quantized_model import DEFAULT_SETTINGS, QuantizedTransformer
from utils.cuda_graph import captured, compile_options
from utils.folders import check_disk, scratch_folder, tidy, whole_file, write_json
from utils.metrics import nmse
from utils.pipelines import family_with
from utils.random_flux import CONFIGS, stock_class
from utils.rivals import (
    MAKERS,
    NO_MEMORY,
    RUNS,
    Allocations,
    Rival,
    model_bytes,
    one_line,
    random_packed,
    seconds,
    skeleton,
    take_turns,
    twin,
    why_not,
)
from utils.sampling import set_attention
from utils.utils import (
    DTYPES,
    ROOT,
    ArgumentParser,
    check_counts,
    check_resolution,
    check_seed,
    device_name,
    empty_cache,
    from_root,
    get_logger,
    memory_named,
    peak_words,
    pick_device,
    run_script,
)

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 (the backend is to be chosen first)

log = get_logger("bench")
TEXT_TOKENS = {"flux-dev": 512, "flux-schnell": 256, "flux2-klein-4b": 512}  # that their pipelines pad a prompt to
CPU_ROWS = 512  # M of the multiplications on a CPU, at most
IN_A_ROW = 8  # layers that see one token, timed together
LESS_MEMORY = "try a smaller --resolution, or --no-compile, which leaves out the CUDA graphs"
CPU_WEIGHTS = 10**9  # a larger transformer is cut down to a block of each kind there


# ------------------------------------------------------------------------------------------------------------ shapes


def read_config(name: str) -> tuple[dict, int, list[int], type[QuantizedTransformer]]:
    """Architecture, text tokens, pixels a side and class of a --config; ValueError if it is neither a name nor a
    folder."""
    if name in TEXT_TOKENS:
        return CONFIGS[name], TEXT_TOKENS[name], [1024, 512], CLASSES[stock_class(name).__name__]
    folder = ROOT / "assets" / name if name == "tiny-flux" else Path(from_root(name))
    found = [path for path in (folder / "config.json", folder / "transformer" / "config.json") if path.is_file()]
    if not found:
        names = ", ".join((*TEXT_TOKENS, "tiny-flux"))
        raise ValueError(f"--config {name}: use one of {names}, or a folder with a transformer's config.json")

    def read(file: Path) -> dict:
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise ValueError(f"--config {name}: {file} is not JSON ({error}); save or download it again") from None

    config = read(found[0])
    kind = config.get("_class_name")
    if kind not in CLASSES:
        raise ValueError(f"--config {name}: describes a {kind}, expected a {' or a '.join(CLASSES)}")
    config = {key: value for key, value in config.items() if key[0] != "_" and key not in DEFAULT_SETTINGS}
    tokenizer = family_with(CLASSES[kind]).tokenizers[-1]
    length = read(folder / tokenizer / "tokenizer_config.json").get("model_max_length", 512)
    size = read(folder / "vae" / "config.json").get("sample_size")
    return config, min(length, 512), [size] if size else [1024, 512], CLASSES[kind]


def step_inputs(config: Mapping, size: int, args: argparse.Namespace) -> dict[str, Tensor]:
    """What a pipeline hands to the transformer in one step, args.batch_size pictures of `size` pixels a side."""
    side, text, count = size // 16, args.text_tokens, args.batch_size
    family = family_with(args.kind)
    generator = torch.Generator().manual_seed(args.seed)
    inputs = {
        "hidden_states": torch.randn(count, side**2, config["in_channels"], generator=generator),
        "encoder_hidden_states": torch.randn(count, text, config["joint_attention_dim"], generator=generator),
        "timestep": torch.full([count], 0.5),
        "img_ids": family.image_ids(side, args.dtype),
        "txt_ids": family.text_ids(text, args.dtype),
    }
    if "pooled_projection_dim" in config:
        inputs["pooled_projections"] = torch.randn(count, config["pooled_projection_dim"], generator=generator)
    if config["guidance_embeds"]:
        inputs["guidance"] = torch.full([count], 3.5)
    return {
        name: tensor.to(args.device, args.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }


def layer_shapes(model: QuantizedTransformer) -> dict[tuple[bool, int, int], list[str]]:
    """Names of the packed layers by (modulation?, out, in)."""
    shapes: dict[tuple[bool, int, int], list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            key = (type(model).family.is_modulation(name), module.out_features, module.in_features)
            shapes.setdefault(key, []).append(name)
    return shapes


# ------------------------------------------------------------------------------------------------------------ tables


def possible_ways(args: argparse.Namespace) -> list[str]:
    """Those in which this device can run a rival; graphs are of what is compiled, on CUDA alone."""
    return ["eager"] + ["compiled"] * args.compile + ["graph"] * (args.compile and args.device.type == "cuda")


def step_rivals(args: argparse.Namespace) -> list[Rival]:
    """In the order of the table: full precision, the others, ours."""
    ways = possible_ways(args)
    rivals = [Rival(f"{args.dtype_name}, {way}", args.dtype_name, way) for way in ways]
    for kind in ("fp8 row-wise, torchao", "fp8 row-wise, torch._scaled_mm"):
        rivals += [Rival(f"{kind}, {way}", kind, way) for way in ways[1:] or ways]
    rivals += [Rival(f"int8 codes, cast, {way}", "int8 codes, cast", way) for way in ways[:2]]
    for mode in args.mode:
        rivals += [Rival(f"ours {mode}, {way}", "ours", way, mode) for way in ways]
    words = args.rivals or [""]
    asked = [rival for rival in rivals if rival.kind == args.dtype_name or any(word in rival.name for word in words)]
    return [rival for rival in asked if rival.way in (args.ways or ways)]


def compile_settings(args: argparse.Namespace, ours: bool) -> dict:
    """What ours or the other rivals are compiled with."""
    options = {"cpp_wrapper": True} if args.cpp_wrapper else {}
    if ours or args.same_options:
        options |= compile_options(args.device) or {}
    return {"fullgraph": True, "dynamic": False, "options": options or None}


def anchor_of(rival: Rival, rivals: list[Rival]) -> Rival:
    """The full-precision rival to compare with."""
    full = [
        other for other in rivals if other.kind == rivals[0].kind and (other.way == "graph") <= (rival.way == "graph")
    ]
    return full[-1]


def groups_that_fit(packed: nn.Module, kinds: list[str], args: argparse.Namespace) -> list[list[str]]:
    """Kinds to hold in memory together: all, or where they do not fit each beside the first."""
    weights = sum(m.in_features * m.out_features for m in packed.modules() if isinstance(m, PackedLinear))
    needed = 1.1 * weights * sum({"ours": 0, args.dtype_name: args.dtype.itemsize}.get(kind, 1) for kind in kinds)
    if args.device.type != "cuda" or needed < torch.cuda.mem_get_info(args.device)[0]:
        return [kinds]
    log.info("%s do not fit in memory together: each in its turn, beside %s", ", ".join(kinds), kinds[0])
    return [[kinds[0], kind] for kind in kinds[1:]]


def steps_at(
    inputs: dict[str, Tensor], cast: list[Rival], models: dict[str, nn.Module], args: argparse.Namespace
) -> dict[Rival, dict]:
    """What is measured of each rival in steps on `inputs`, among it its "output"; or its `problem`."""
    torch._dynamo.reset()  # the other resolution's code would be looked through at every call
    rows: dict[Rival, dict] = {rival: {} for rival in cast}
    cases, kept, memory = [], Counter(), Allocations(args.device)
    for rival in cast:
        model, before = models[rival.kind], memory.now()

        def step(model=model) -> Tensor:
            return model(**inputs, return_dict=False)[0]

        try:
            with rival.on_stage(model):
                call, output = captured(step) if rival.way == "graph" else (step, step())
                rows[rival]["output"] = output.float().cpu()
            cases.append((rival, model, call))
        except Exception as error:
            rows[rival]["problem"] = one_line(error)
        if rival.way != "graph":  # whose pool holds everything that lives in a step
            kept[rival.kind] += memory.now() - before
    for rival, model, step in cases:
        resident, disk = model_bytes(model)
        rows[rival] |= {"resident_bytes": resident, "disk_bytes": disk}
        if rival.way != "graph":
            with rival.on_stage(model):
                beyond = memory.peak_of(step)
            rows[rival]["peak_bytes"] = None if beyond is None else resident + kept[rival.kind] + beyond
    for name, runs in take_turns(cases, args.rounds, args.device).items():
        row = next(rows[rival] for rival in cast if rival.name == name)
        row |= {"problem": runs} if isinstance(runs, str) else {"runs_ms": runs}
    return rows


def bench_steps(args: argparse.Namespace, packed: QuantizedTransformer) -> list[dict]:
    """A row for each resolution and rival: its figures, or its `problem`."""
    rivals = step_rivals(args)
    problems = {rival.kind: why_not(rival.kind, args.dtype, args.device) for rival in rivals}
    rows = {(size, rival): {"resolution": size, "rival": rival.name} for size in args.resolution for rival in rivals}
    models: dict[str, nn.Module] = {}
    for group in groups_that_fit(packed, [kind for kind in problems if not problems[kind]], args):
        for kind in [kind for kind in group if kind not in models and not problems[kind]]:
            try:
                models[kind] = packed if kind == "ours" else twin(packed, MAKERS[kind])
                if args.compile:
                    models[kind].compile_repeated_blocks(**compile_settings(args, kind == "ours"))
            except Exception as error:
                problems[kind] = one_line(error)
        for size in args.resolution:
            log.info("%d pixels: %s", size, "; ".join(models))
            inputs = step_inputs(packed.config, size, args)
            found = steps_at(inputs, [rival for rival in rivals if rival.kind in models], models, args)
            for rival, row in found.items():
                runs, anchor = row.get("runs_ms"), found.get(anchor_of(rival, rivals), {}).get("runs_ms")
                if runs and anchor:
                    row["ratio"] = statistics.median(runs) / statistics.median(anchor)
                if runs:
                    row["runs_ms"] = rows[size, rival].get("runs_ms", []) + runs
                    row["ms"] = statistics.median(row["runs_ms"])
                rows[size, rival] |= row
        for kind in group[1:]:
            models.pop(kind, None)
        gc.collect()
        empty_cache(args.device)
    outputs = {(size, rival.name): row.pop("output") for (size, rival), row in rows.items() if "output" in row}
    for (size, rival), row in rows.items():
        if problems[rival.kind]:
            row["problem"] = problems[rival.kind]
        reference = "ours exact, eager" if rival.mode == "fast" else rivals[0].name
        if (size, reference) in outputs and (size, rival.name) in outputs:
            row["relative_error"] = nmse(outputs[size, rival.name], outputs[size, reference]) ** 0.5
            row["error_against"] = reference
    return list(rows.values())


def bench_layers(args: argparse.Namespace, whole: nn.Module, packed: QuantizedTransformer) -> list[dict]:
    """A row for each GEMM shape of the `whole` transformer and rival, timed on a layer of `packed`.

    M is 1 for modulation, IN_A_ROW layers of a shape one after the other, else all tokens; on a CPU at most CPU_ROWS,
    and modulation's shapes at that M too.
    """
    gpu = args.device.type == "cuda"
    flush = torch.empty(2**28, dtype=torch.uint8, device=args.device) if gpu else None
    tokens = {(size // 16) ** 2 + args.text_tokens for size in args.resolution}
    kinds = dict.fromkeys([args.dtype_name, "bfloat16", *list(MAKERS)[3:], *(f"ours {mode}" for mode in args.mode)])
    dtypes = {kind: torch.bfloat16 if kind == "bfloat16" else args.dtype for kind in kinds}
    problems = {kind: why_not(kind, dtypes[kind], args.device) for kind in kinds}
    held = dict(packed.named_modules())  # on a CPU a block of each kind, of all that `whole` has
    rows = []
    for (modulation, n, k), names in layer_shapes(whole).items():
        chosen = names[:1]
        if modulation:  # so short that a launch would count, were it not for the next ones behind it
            chosen = [name for name in names if name in held][:IN_A_ROW]
        counts = {1} if modulation else tokens
        if not gpu:
            counts = {1, CPU_ROWS} if modulation else {min(m, CPU_ROWS) for m in tokens}
        for m in sorted(counts):
            entry = {"m": m, "n": n, "k": k, "count": len(names), "modulation": modulation, "in_a_row": len(chosen)}
            found = layer_times(m, packed, chosen, [kind for kind in kinds if not problems[kind]], args, flush)
            for kind, runs in found.items():
                row = entry | {"rival": kind}
                rows.append(row)
                if isinstance(runs, str):
                    row["problem"] = runs
                    continue
                row |= {"runs_ms": runs, "ms": statistics.median(runs)}
                row["tflops"] = 2 * m * n * k / row["ms"] / 1e9
                if not isinstance(found[args.dtype_name], str):
                    row["ratio"] = row["ms"] / statistics.median(found[args.dtype_name])
    ceiling = max((row["tflops"] for row in rows if row["rival"] == args.dtype_name and "ms" in row), default=None)
    for row in rows:
        if ceiling and "ms" in row:
            row["of_ceiling"] = row["tflops"] / ceiling
    return rows + [{"rival": kind, "problem": problem} for kind, problem in problems.items() if problem]


def layer_times(
    m: int, packed: QuantizedTransformer, names: list[str], kinds: list[str], args: argparse.Namespace,
    flush: Tensor | None,
) -> dict[str, list[float] | str]:  # fmt: skip
    """Milliseconds of random x [m, in] through each kind of a layer, those called `names` one after the other, on CUDA
    as a graph; of a kind that fails, the reason."""
    torch._dynamo.reset()
    layers, cases, problems = [packed.get_submodule(name) for name in names], [], {}
    kept = []  # what the graphs read, which they do not hold
    x = torch.randn(m, layers[0].in_features, device=args.device, dtype=args.dtype)
    for kind in kinds:
        mode = kind.removeprefix("ours ") if kind.startswith("ours") else None
        given = x.bfloat16() if kind == "bfloat16" else x
        try:
            modules = layers if mode else [MAKERS[kind](layer) for layer in layers]
            if args.compile and kind not in ("float32", "float16", "bfloat16") and "gemlite" not in kind:
                modules = [torch.compile(module, **compile_settings(args, bool(mode))) for module in modules]
        except Exception as error:
            problems[kind] = one_line(error)
            continue
        rival = Rival(kind, kind, "compiled" if args.compile else "eager", mode)

        def call(modules=modules, given=given) -> Tensor:
            return [module(given) for module in modules][-1]

        try:
            if args.device.type == "cuda":
                kept.append(call)
                with rival.on_stage(packed):
                    call, _ = captured(call)
            cases.append((rival, packed, call))
        except Exception as error:
            problems[kind] = one_line(error)
    times = problems | take_turns(cases, args.rounds, args.device, flush)
    return {
        kind: times[kind] if isinstance(times[kind], str) else [ms / len(layers) for ms in times[kind]]
        for kind in kinds
    }


def bench_load(args: argparse.Namespace, packed: QuantizedTransformer) -> dict:
    """Seconds from a packed checkpoint, read once before, to a transformer on the device, and to the end of its first
    step in exact mode, for which the kernels were compiled before; the checkpoint's bytes."""
    inputs = step_inputs(packed.config, args.resolution[0], args)
    check_disk(args.output, model_bytes(packed)[1], "the packed checkpoint")
    with scratch_folder(args.output) as folder:
        packed.save_pretrained(folder)
        size = sum(file.stat().st_size for file in folder.iterdir())

        def load() -> QuantizedTransformer:
            return type(packed).from_pretrained(folder, device_map=str(args.device), dtype=args.dtype)

        @torch.no_grad()
        def first_step() -> None:
            load()(**inputs)

        first_step()
        loaded, stepped = seconds(load, args.device), seconds(first_step, args.device)
        return {"seconds": loaded, "seconds_to_first_step": stepped, "bytes": size}


def bench_decoding(args: argparse.Namespace, packed: QuantizedTransformer) -> dict[str, float]:
    """Ternary codes a second, 1e9 of them (GB, at a byte each), that go from their form on disk, five a byte, to four a
    byte in memory: of the largest layer, by one thread of the CPU and by the device."""
    layer = max((m for m in packed.modules() if isinstance(m, PackedLinear)), key=lambda m: m.weight_codes.numel())
    codes, k = layer.codes().cpu(), layer.in_features
    stored, threads, rates = store_codes(codes, 0), torch.get_num_threads(), {}
    torch.set_num_threads(1)
    for device in dict.fromkeys([torch.device("cpu"), args.device]):
        given = stored.to(device)

        def call(given=given) -> None:
            decode(given, 0, k)

        call()
        rates[device.type] = codes.numel() / 1e9 / statistics.median(seconds(call, device) for _ in range(5 * RUNS))
    torch.set_num_threads(threads)
    return rates


# ------------------------------------------------------------------------------------------------------------ output


def table(rows: list[dict], columns: dict[str, tuple[str, Callable]]) -> str:
    """Aligned text: a line for each row; columns: heading -> (key, how to write it). A problem stands in the last."""
    cells = [list(columns)]
    for row in rows:
        values = [(row.get(key), write) for key, write in columns.values()]
        cells.append(["–" if value is None else write(value) for value, write in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(c, widths, strict=True))]
             for c in cells]  # fmt: skip
    problems = ["", *(row.get("problem") or "" for row in rows)]
    return "\n".join(f"{'  '.join(line)}  {text}".rstrip() for line, text in zip(lines, problems, strict=True))


def _number(form: str, scale: float = 1.0) -> Callable[[float], str]:
    return lambda value: format(value * scale, form)


STEP_COLUMNS = {
    "one denoising step": ("rival", str), "pixels": ("resolution", str), "ms": ("ms", _number(".2f")),
    "ratio": ("ratio", _number(".3f")), "resident GiB": ("resident_bytes", _number(".3f", 2**-30)),
    "peak GiB": ("peak_bytes", _number(".3f", 2**-30)), "disk GB": ("disk_bytes", _number(".3f", 1e-9)),
    "rel. error": ("relative_error", _number(".1e")),
}  # fmt: skip
LAYER_COLUMNS = {
    "matrix multiplication": ("rival", str), "M": ("m", str), "N": ("n", str), "K": ("k", str),
    "layers": ("count", str), "ms": ("ms", _number(".4f")), "ratio": ("ratio", _number(".3f")),
    "TFLOP/s": ("tflops", _number(".2f")), "of ceiling": ("of_ceiling", _number(".1%")),
}  # fmt: skip


def chart(rows: list[dict], title: str, file: Path) -> None:
    """Bars of milliseconds, a panel for each resolution, and of GiB at the first one; of what could be measured."""
    rows = [row for row in rows if "ms" in row]
    sizes = list(dict.fromkeys(row["resolution"] for row in rows))
    if not sizes:
        return
    figure, panels = pyplot.subplots(1, len(sizes) + 1, figsize=(7 + 3.2 * len(sizes), 4.5), sharey=True)
    for panel, size in zip(panels, sizes, strict=False):
        shown = [row for row in rows if row["resolution"] == size]
        colours = ["tab:orange" if row["rival"].startswith("ours") else "tab:blue" for row in shown]
        bars = panel.barh([row["rival"] for row in shown], [row["ms"] for row in shown], color=colours)
        panel.bar_label(bars, [f"{row['ms']:.4g}" for row in shown], padding=2, fontsize=8)
        panel.set(title=f"one step at {size} pixels", xlabel="ms")
        panel.margins(x=0.2)
    for key, colour in (("peak_bytes", "lightgrey"), ("resident_bytes", "tab:green")):
        known = [row for row in rows if row["resolution"] == sizes[0] and row.get(key) is not None]
        if known:
            values = [row[key] / 2**30 for row in known]
            panels[-1].barh([row["rival"] for row in known], values, color=colour, label=key.removesuffix("_bytes"))
    panels[-1].set(title=f"memory at {sizes[0]} pixels", xlabel="GiB")
    panels[-1].legend(fontsize=8)
    panels[0].invert_yaxis()
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    with whole_file(file) as part:
        figure.savefig(part, format="png", dpi=120)
    pyplot.close(figure)


def command_name(words: list[str]) -> str:
    """A file's name for the figures of a command: its words but the output folder's, such as "tiny-flux_device_cpu"."""
    kept, previous = [], None
    for word in words:
        output = re.match("--output(_dir)?(=|$)", word) or previous in ("--output", "--output_dir")
        if not output and word not in ("--config", "--model"):
            kept.append(re.sub(r"[^\w.]+", "-", Path(word).name).strip("-"))
        previous = word
    name = "_".join(kept) or "bench"
    if len(name) <= 150:
        return name
    return f"{name[:130]}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def versions() -> dict[str, str | None]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("triton", "diffusers", "torchao", "gemlite"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


# -------------------------------------------------------------------------------------------------------------- main


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", "--config", dest="config", default="tiny-flux",
                        help=f"{', '.join(TEXT_TOKENS)}, tiny-flux or a model's folder")  # fmt: skip
    parser.add_argument("--resolution", type=int, nargs="+", metavar="PIXELS",
                        help="a side, multiples of 16; default: the autoencoder's size, else 1024 512")  # fmt: skip
    parser.add_argument("--text_tokens", type=int, help="default: what the pipeline pads its prompts to")
    parser.add_argument("--layers", action="store_true", help="also time each GEMM shape of the blocks on its own")
    parser.add_argument(
        "--load", action="store_true", help="also time loading a packed checkpoint from a warm disk, and decoding codes"
    )
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES, help="of ours; default: both")
    parser.add_argument("--rivals", nargs="+", metavar="WORD", help="beside full precision only those that have one of "
                        "these words in their names, such as fp8 or \"ours fast\"; default: all")  # fmt: skip
    parser.add_argument("--ways", nargs="+", choices=("eager", "compiled", "graph"), help="to run them; default: all")
    parser.add_argument("--batch_size", type=int, default=1, help="pictures of a step; default: 1")
    parser.add_argument("--attention", metavar="NAME", help="of ours: fp8, which is fast mode's alone and wants an "
                        "H100 and fa3-fwd, or one of diffusers'; default: torch's own, as all rivals have")  # fmt: skip
    parser.add_argument("--no_steps", action="store_true", help="leave the denoising steps out")
    parser.add_argument("--device", help="default: cuda if there, else mps, else cpu")
    parser.add_argument("--dtype", dest="dtype_name", choices=DTYPES,
                        help="of full precision and activations; default: bfloat16 on CUDA, else float32")  # fmt: skip
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on CUDA")
    parser.add_argument("--same_options", action="store_true", help="compile every rival with the options of ours")
    parser.add_argument("--cpp_wrapper", action="store_true", help="compile the calls of the kernels as well, to C++: "
                        "the CPU needs about half as long for a step")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=10, help=f"turns of each rival, {RUNS} timed runs in each")
    parser.add_argument("--seed", type=int, default=42, help="of weights and inputs")
    parser.add_argument("--output_dir", "--output", dest="output", type=Path, default=Path("output/bench"),
                        help="where figures and chart go")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        args.device = pick_device(args.device)
        if args.attention:
            set_attention(args.attention, modes=args.mode)
        args.architecture, text_tokens, sizes, args.kind = read_config(args.config)
        args.text_tokens = text_tokens if args.text_tokens is None else args.text_tokens
        args.resolution = args.resolution or sizes
        for size in args.resolution:
            check_resolution(size)
        check_counts(args, "rounds", "text_tokens", "batch_size")
        check_seed(args.seed)
        if args.no_steps and not (args.layers or args.load):
            raise ValueError("--no_steps leaves nothing to measure: add --layers or --load")
        gpu = args.device.type == "cuda"
        args.compile = gpu if args.compile is None else args.compile
        if args.cpp_wrapper and not args.compile:
            raise ValueError("--cpp_wrapper is a way to compile: add --compile")
        for way in set(args.ways or ()).difference(possible_ways(args)):
            raise ValueError(f"--ways {way} needs {'a GPU and ' * (way == 'graph')}--compile")
    except ValueError as error:
        parser.error(str(error))
    args.dtype_name = args.dtype_name or ("bfloat16" if gpu else "float32")
    args.dtype = getattr(torch, args.dtype_name)
    return args


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    args = parse_args(words)
    args.doing = "the random transformer is made"
    with memory_named(lambda: args.doing, LESS_MEMORY, args.device):
        measure(words, args)


def measure(words: list[str], args: argparse.Namespace) -> None:
    """Make the transformer, measure what is asked for and write it down, part after part."""
    file = args.output / f"{command_name(words)}.json"
    torch._dynamo.config.recompile_limit = 64  # of a block's code, which all rivals share
    check_disk(args.output, 0, "the figures")
    tidy(args.output)
    whole = skeleton(args.architecture, args.dtype, args.kind)
    weights = sum(n * k * len(names) for (_, n, k), names in layer_shapes(whole).items())
    config, note = args.architecture, None
    if args.device.type != "cuda" and weights > CPU_WEIGHTS:
        config = config | {"num_layers": 1, "num_single_layers": 1}
        note = f"one block of each kind: all of the {weights / 1e9:.1f} B block weights are too many for {args.device}"
        log.info(note)
    packed = random_packed(config, args.dtype, args.device, args.seed, args.kind)
    if args.attention:
        set_attention(args.attention, packed)
    own = compile_settings(args, ours=True)["options"]
    figures = {
        "command": shlex.join(["python", "bench.py", *words]),
        "config": args.config, "architecture": config, "note": note, "block_weights": weights,
        "resolution": args.resolution, "text_tokens": args.text_tokens, "dtype": args.dtype_name,
        "batch_size": args.batch_size,
        "attention": args.attention, "compile": args.compile,
        "compile_options": {"ours": own, "others": compile_settings(args, ours=False)["options"]},
        "rounds": args.rounds, "runs_a_round": RUNS,
        "seed": args.seed, "device": device_name(args.device),
        "host": f"{os.cpu_count()} CPU cores, {platform.platform()}", "threads": torch.get_num_threads(),
        "versions": versions(),
    }  # fmt: skip
    if not args.no_steps:
        args.doing = "steps are measured"
        figures["steps"] = bench_steps(args, packed)
        print("\n" + table(figures["steps"], STEP_COLUMNS) + "\n")
        title = f"{args.config}, {figures['device']}, torch {torch.__version__}" + (f"\n{note}" if note else "")
        chart(figures["steps"], title, file.with_name(f"{command_name(words)}.png"))
        write_json(file, figures, indent=1)  # after each part, so that a part that is cut off costs no other
    if args.layers:
        args.doing = "layers are measured"
        figures["layers"] = bench_layers(args, whole, packed)
        print("\n" + table(figures["layers"], LAYER_COLUMNS) + "\n")
        write_json(file, figures, indent=1)
    if args.load:
        args.doing = "a packed checkpoint is loaded"
        figures["load"] = bench_load(args, packed) | {"decoded_gb_per_second": bench_decoding(args, packed)}
        size, loaded, stepped = (figures["load"][name] for name in ("bytes", "seconds", "seconds_to_first_step"))
        print(f"packed checkpoint: {size:,} bytes on disk; loaded in {loaded:.2f} s, first step after {stepped:.2f} s")
        rates = figures["load"]["decoded_gb_per_second"]
        print("codes decoded: " + ", ".join(f"{rate:.2f} GB/s on {device}" for device, rate in rates.items()) + "\n")
        write_json(file, figures, indent=1)
    log.info("figures: %s", file)
    for row in figures.get("steps", []) + figures.get("layers", []):
        if row["rival"].startswith(("ours", args.dtype_name)) and "problem" in row:
            more = f" ({peak_words(args.device)}): {LESS_MEMORY}" if row["problem"] == NO_MEMORY else ""
            raise ValueError(f"{row['rival']}: {row['problem']}{more}")


if __name__ == "__main__":
    run_script(main, "parts that were finished are written; the same command starts again")
