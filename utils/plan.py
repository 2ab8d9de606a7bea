"""Which way of training fits a model on this machine: from its size and the GPUs' memory, before anything is loaded.

    python -m utils.plan MODEL NPROC BATCH [FLAGS of train.py]

prints the flags that 1_run_train.sh puts before yours, and on stderr what they are for. Bytes a parameter: LoRA 2 of
the frozen bf16 base and, for each of its own, 16 of weight, gradient and moments in fp32; all weights 10, of which
weight and gradient in fp32 are 8 and moments in 8 bits 2, shared by the GPUs under FSDP2. On top a picture's
checkpointed activations and what one block needs; figures in GiB at 1024 pixels, measured on an H100.
"""

import utils.interrupt  # noqa: F401 (Ctrl-C is a line from here on)

import importlib.util
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import diffusers
import torch

from models.families import transformer_class
from utils.process_args import LARGE
from utils.trainer import moment_bytes
from utils.utils import run_script

GIB = 2**30
PICTURE, BLOCK, SPARE = 2.0, 4.0, 0.95  # GiB a picture, GiB for one block; what may be used of a GPU's memory
SPREAD = 5.0  # GiB under FSDP2: blocks that travel whole, NCCL; 66.0 in all on two GPUs
RANK = 32
WEIGHTS = ("--optim", "adamw_torch_8bit")
FSDP = ("--fsdp", "full_shard")
WATCHED = ("--feature_loss", "--visit_share")  # flags for which the teacher stays on the GPU, in bf16


@dataclass(frozen=True)
class Size:
    """Parameters of a transformer: all, and those of a LoRA with what else is trained beside it."""

    parameters: int
    lora: int


def size_of(model: str, rank: int = RANK) -> Size:
    """The size of the pipeline's transformer and of a LoRA of this rank, from its config.json alone."""
    config = diffusers.FluxTransformer2DModel.load_config(model, subfolder="transformer")
    kind = transformer_class(config, model)
    with torch.device("meta"):
        transformer = getattr(diffusers, kind.__name__).from_config(config)
    quantized = {f"{name}.weight" for name in kind.family.linears(transformer)}
    lora = 0
    for name, parameter in transformer.named_parameters():
        lora += rank * sum(parameter.shape) + parameter.shape[0] if name in quantized else parameter.numel()
    return Size(transformer.num_parameters(), lora)


def flag_values(flags: Sequence[str]) -> dict[str, str]:
    """What follows each of the user's flags."""
    words = [part for flag in flags for part in flag.split("=", 1)]
    names = [f"--{word[2:].replace('-', '_')}" if word.startswith("--") else word for word in words]  # --lora-r too
    return dict(zip(names, [*words[1:], ""], strict=False))


def needs(size: Size, gpus: int, batch: int, flags: Sequence[str] = ()) -> dict[str, float]:
    """GiB on each GPU by way of training: a LoRA on every GPU, or all weights shared by them.

    Of the user's flags count those of another optimizer, of averaged weights, and of a teacher that stays beside the
    student.
    """
    given = flag_values(flags)
    # Bytes a trained parameter: weight and gradient, the average of the weights; moments
    own = 8 + 4 * is_set(given, "--ema_decay")
    moments = {"lora": 8.0, "weights": 2.0}
    if "--optim" in given:
        moments = dict.fromkeys(moments, moment_bytes(given["--optim"]))
    teacher = 2 * size.parameters * any(is_set(given, name) for name in WATCHED)
    rest = teacher / GIB + PICTURE * batch
    return {
        "lora": (2 * size.parameters + (own + moments["lora"]) * size.lora) / GIB + rest,
        "weights": (own + moments["weights"]) * size.parameters / gpus / GIB + BLOCK + rest + SPREAD * (gpus > 1),
    }


def is_set(given: dict[str, str], name: str) -> bool:
    """Whether a flag has a number other than 0; train.py says what is wrong with others."""
    try:
        return float(given.get(name, 0)) != 0
    except ValueError:
        return False


def asked_rank(flags: Sequence[str]) -> int:
    """The rank of the LoRA that the user's flags ask for, else RANK."""
    rank = flag_values(flags).get("--lora_r", "0")
    return int(rank) if rank.isdigit() and int(rank) else RANK  # train.py says what is wrong with others


def asked(flags: Sequence[str]) -> str | None:
    """The way that the user's flags ask for, if they do."""
    given = flag_values(flags)
    if given.get("--lora_r", "0") != "0":
        return "lora"
    return "weights" if {"--lora_r", "--fsdp"} & given.keys() else None


def choose(size: Size, memory: Sequence[int], batch: int, flags: Sequence[str] = ()) -> tuple[list[str], str]:
    """Flags, and in a line what they are for; `memory`: bytes of each GPU, none on a machine without.

    ValueError if no way fits or the one asked for does not, naming what does.
    """
    if size.parameters < LARGE:
        return [], "all weights: the model is small"
    billions = f"{size.parameters / 1e9:.1f} B parameters"
    if not memory:
        raise ValueError(f"{billions} cannot be trained without a GPU; run.py --method blockwise needs one of 24 GB")
    gpus, smallest = len(memory), min(memory) / GIB
    need, where = needs(size, gpus, batch, flags), f"{gpus} × {smallest:.0f} GiB"
    way = asked(flags) or ("weights" if need["weights"] <= SPARE * smallest else "lora")
    if need[way] > SPARE * smallest:
        raise ValueError(
            f"{billions} on {where}: training {'a LoRA' if way == 'lora' else 'all weights'} takes {need[way]:.0f} GiB "
            f"a GPU at batch {batch}; {_instead(need, way, smallest, batch)}"
        )
    optim = flag_values(flags).get("--optim")
    moments = f"--optim {optim}" if optim else "moments in 8 bits"
    name = {"lora": "a LoRA inside the quantizers", "weights": f"all weights, {moments}"}[way]
    if gpus > 1:
        name += ", DDP" if way == "lora" else ", spread by FSDP2"
    reason = f"{billions} on {where}: {name}; takes {need[way]:.0f} GiB a GPU"
    if way == "lora":
        reason += f", all weights would take {need['weights']:.0f}"
        rank = str(asked_rank(flags))  # at the learning rates that train.py has for the width
        return ["--lora_r", rank, "--lora_alpha", rank], reason
    if optim is None and importlib.util.find_spec("torchao") is None:
        raise ValueError(f"{reason}, but moments in 8 bits need torchao, which is not installed: pip install torchao")
    return [*WEIGHTS, *(FSDP if gpus > 1 else ())], reason


def _instead(need: dict[str, float], way: str, smallest: float, batch: int) -> str:
    """What to do where the way does not fit."""
    if batch > 1 and need[way] - PICTURE * (batch - 1) <= SPARE * smallest:
        return "choose a smaller BATCH and a larger ACCUM"
    if way == "weights" and need["lora"] <= SPARE * smallest:
        return f"a LoRA takes {need['lora']:.0f}: --lora_r 32 --lora_alpha 32"
    return "run.py --method blockwise trains one block after the other, on a GPU of 24 GB"


def main() -> None:
    model, processes, batch, *flags = sys.argv[1:]
    size = size_of(model, asked_rank(flags))
    gpus = range(min(int(processes), torch.cuda.device_count()))
    memory = [torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus]
    chosen, reason = choose(size, memory, int(batch), flags)
    print(f"[plan] {reason}", file=sys.stderr)
    print(shlex.join(chosen))


if __name__ == "__main__":
    run_script(main)
