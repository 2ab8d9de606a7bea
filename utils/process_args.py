"""Flags of sanity.py and train.py: three dataclasses, parsed by Hugging Face's HfArgumentParser.

The flags of the published shell scripts are accepted as they stand. Those that newer transformers renamed or dropped
(--evaluation_strategy, --warmup_ratio, --logging_dir, --overwrite_output_dir) are fields here and mapped to their
successors.
"""

import argparse
import math
import os
import sys
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers.integrations import get_available_reporting_integrations

from models.utils_quant import FULL_PRECISION_BITS, check_bits, check_clip_init, check_lora_r
from utils.folders import check_name
from utils.pipelines import DEFAULTS, EARLY_SHARE, FEW_STEPS
from utils.rates import default_rate, told
from utils.sampling import check_offload
from utils.utils import (
    DTYPES,
    ArgumentParser,
    check_counts,
    check_guidance,
    check_resolution,
    check_seed,
    from_root,
    pick_device,
)

NOT_HERE = {  # flags of Trainer that would change nothing here or fail in the middle, and what to do instead
    "activation_checkpointing_kwargs": "every block is checkpointed; leave it out",
    "auto_find_batch_size": "choose a --per_device_train_batch_size that fits, and --gradient_accumulation_steps",
    "bf16_full_eval": "evaluations compute in what training computes in, see --dtype",
    "deepspeed": "use --fsdp full_shard",
    "enable_jit_checkpoint": "checkpoints come every --save_steps",
    "fp16_full_eval": "evaluations compute in what training computes in, see --dtype",
    "gradient_checkpointing_kwargs": "every block is checkpointed; leave it out",
    "label_smoothing_factor": "velocities are no classes; leave it out",
    "load_best_model_at_end": "the last step is what is saved; --save_strategy best keeps the best one's checkpoint",
    "neftune_noise_alpha": "no token embeddings are trained; leave it out",
    "push_to_hub": "upload the trained model's folder when it is there",
    "save_on_each_node": "all nodes see one disk, and the first rank writes to it",
    "save_only_model": "checkpoints are there to go on from; --save_strategy no leaves them out",
    "torch_compile_backend": "blocks are compiled as --torch_compile True does it",
    "torch_compile_mode": "blocks are compiled as --torch_compile True does it",
    "train_sampling_strategy": "the order of samples follows from --data_seed and --early_share",
    "use_liger_kernel": "its kernels are for language models; leave it out",
}
LARGE = 10**9  # parameters from which on blocks are compiled on a GPU and the trained model is kept packed


@dataclass
class ModelArguments:
    local_dir: str = field(default="output", metadata={"help": "where trained models go: LOCAL_DIR/models/…"})
    input_model_filename: str = field(
        default="assets/tiny-flux",
        metadata={"aliases": ["--model"], "help": "the FLUX pipeline to start from: a folder or a hub id"},
    )
    output_model_filename: str | None = field(
        default=None, metadata={"help": "name of the trained model; default: of the model, bits and OUTPUT_DIR"}
    )
    w_bits: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "bits a weight: 0 (1.58 bit, ternary), 1 to 8, 16 (full precision); sanity.py takes several"},
    )
    contain_weight_clip_val: bool = field(
        default=False, metadata={"help": "accepted as published; whether a checkpoint has step sizes is seen from it"}
    )
    device: str | None = field(default=None, metadata={"help": "default: cuda if there, else mps, else cpu"})
    offload: str | None = field(
        default=None,
        metadata={
            "help": "sanity.py, on a GPU: model: only the component that computes is there; sequential: what does not "
            "fit streams layer by layer"
        },
    )
    clip_init: str = field(default="mse", metadata={"help": "how step sizes start: mse (least error) or max"})
    quantize_modulation: bool = field(default=True, metadata={"help": "quantize the AdaLN modulation too"})
    lora_r: int = field(default=0, metadata={"help": "rank of a LoRA inside the quantizer; 0: none"})
    lora_alpha: float = field(default=1.0, metadata={"help": "numerator of the LoRA's scaling lora_alpha/lora_r"})
    train_weights: bool | None = field(
        default=None, metadata={"help": "train the quantized weights themselves; default: unless there is a LoRA"}
    )
    train_unquantized: bool = field(
        default=True, metadata={"help": "train what is not quantized: biases, norms, embedders"}
    )
    start_from: str | None = field(
        default=None, metadata={"help": "train.py: what run.py made of the same model; training starts from its codes"}
    )
    trained: str | None = field(
        default=None, metadata={"help": "sanity.py: a trained student's folder, drawn as the last row"}
    )
    pack: bool | None = field(
        default=None,
        metadata={
            "help": "save codes instead of weights: a tenth of the size, for inference only; default: for "
            "models of a billion parameters and more"
        },
    )

    @property
    def output_model_local_path(self) -> str:
        return os.path.join(self.local_dir, "models", self.output_model_filename)


@dataclass
class DataArguments:
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "a text file, one prompt a line, or a JSON list of prompts; default: the evaluation set for the "
            "model"
        },
    )
    train_prompts: str | None = field(
        default=None, metadata={"help": "likewise, of training prompts; default: the training set for the model"}
    )
    num_train_prompts: int = field(default=3000, metadata={"help": "training prompts, one teacher trajectory each"})
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "where teacher trajectories lie; default: LOCAL_DIR/teacher_cache; off: no files, the teacher "
            "stays in memory"
        },
    )
    num_images: int = field(
        default=6, metadata={"help": "held-out prompts to draw (a bit width, or an evaluation) and to measure on"}
    )
    num_final_images: int | None = field(
        default=None, metadata={"help": "the same for the last evaluation; default: num_images"}
    )
    num_inference_steps: int | None = field(
        default=None, metadata={"help": f"denoising steps a picture; {DEFAULTS[0]}"}
    )
    guidance_scale: float | None = field(
        default=None, metadata={"help": f"guidance, for models that take any; {DEFAULTS[1]}"}
    )
    resolution: int | None = field(
        default=None, metadata={"help": "pixels a side; default: what the autoencoder was made for"}
    )

    train_data_local_path: str | None = field(
        default=None, metadata={"help": "accepted as published, without effect; training prompts are --train_prompts"}
    )
    eval_data_local_path: str | None = field(
        default=None, metadata={"help": "accepted as published, without effect; held-out prompts are --prompts"}
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    output_dir: str = field(default="output", metadata={"help": "samples, checkpoints and caches go here"})
    torch_compile: bool | None = field(
        default=None,
        metadata={"help": "compile the blocks; default: on CUDA for models of a billion parameters and more"},
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "compute in bfloat16, or with False in float32; default: on CUDA, unless --fp16 True"},
    )
    dtype: str | None = field(
        default=None,
        metadata={"choices": DTYPES, "help": "to compute in, instead of --bf16 and --fp16; default: bfloat16 on CUDA"},
    )
    optim: str = field(default="adamw_torch_fused", metadata={"help": "the optimizer"})
    learning_rate: float | None = field(
        default=None, metadata={"help": f"peak learning rate; default: {told()}".replace("%", "%%")}
    )
    clip_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "of the step sizes; 0 freezes them; default: the --learning_rate that is given, else "
            f"{default_rate(256, 'step sizes'):g} at 256 channels, less by the root of the width"
        },
    )
    rate_share: float | None = field(
        default=None,
        metadata={
            "help": "learning rate of quantized weights and of their step sizes, as a share of the layer's mean step "
            "size, instead of the rates above"
        },
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "the schedule of the learning rate"})
    warmup_steps: float = field(
        default=0.03,
        metadata={
            "help": "steps of linear warm-up; below 1: share of all steps; where the codes are frozen, the same share "
            "of what is left"
        },
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "decay of AdamW's second moment"})
    ema_decay: float = field(
        default=0.0, metadata={"help": "average the trained parameters, e.g. 0.999, and evaluate and save the average"}
    )
    early_share: float | None = field(
        default=None,
        metadata={
            "help": "share of the samples that is of the first quarter of the steps; 0.25: all alike; default: "
            f"{EARLY_SHARE}, of fewer than {FEW_STEPS} steps 0.25"
        },
    )
    step_shares: str | None = field(
        default=None,
        metadata={
            "help": "in place of --early_share: a steps.json of python -m utils.compare_steps, which says of each "
            "denoising step what share of the samples is of it"
        },
    )
    loss_power: float = field(
        default=0.1,
        metadata={"help": "exponent of each sample's mean squared error; below 1 hard samples count for less"},
    )
    freeze_codes: float | None = field(
        default=None,
        metadata={
            "help": "share of the steps, at the end, in which the codes stay and step sizes, biases and what is not "
            "quantized are trained; default: 0.1, with --ema_decay 0"
        },
    )
    vote_codes: float = field(
        default=0.0,
        metadata={
            "help": "share of the steps, before the codes are frozen, over which each code is averaged, to be frozen "
            "where it was most of the time; 0: where it is last"
        },
    )
    visit_share: float = field(
        default=0.0,
        metadata={
            "help": "share of the steps, at the end, in which the student learns at states of pictures that it draws "
            "itself, a batch of training prompts every so many steps as a picture has; keeps the teacher in memory"
        },
    )
    feature_loss: float = field(
        default=0.0,
        metadata={
            "help": "weight of the error of the blocks' outputs at the first step, falling linearly to 0; keeps the "
            "teacher in memory"
        },
    )
    eval_strategy: str = field(default="steps", metadata={"help": "when to evaluate: no, steps or epoch"})
    eval_steps: float = field(default=500, metadata={"help": "steps between evaluations; below 1: share of all"})
    eval_on_start: bool = field(default=True, metadata={"help": "evaluate before training too"})
    logging_steps: float = field(default=10, metadata={"help": "steps between log lines; below 1: share of all"})
    dataloader_num_workers: int | None = field(
        default=None, metadata={"help": "processes that read samples; default: on CUDA up to 8 a rank, else none"}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})
    report_to: str | None = field(default="tensorboard", metadata={"help": "where curves go, besides metrics.jsonl"})
    seed: int = field(default=42, metadata={"help": "of noise and data order"})
    disable_tqdm: bool = field(default=False, metadata={"help": "no progress bars"})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "every trained parameter gets a gradient, so DDP need not look for others"}
    )
    do_train: bool = field(default=True, metadata={"help": "False: train.py only fills the teacher cache"})
    qat: bool = field(default=False, metadata={"help": "accepted as published; whether to quantize is up to --w_bits"})
    model_max_length: int | None = field(
        default=None, metadata={"help": "accepted as published, without effect; the pipeline's tokenizers have theirs"}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "accepted as published, without effect; HF_HOME says where downloads go"}
    )
    evaluation_strategy: str | None = field(default=None, metadata={"help": "older name of --eval_strategy"})
    warmup_ratio: float | None = field(default=None, metadata={"help": "older name of a --warmup_steps below 1"})
    logging_dir: str | None = field(default=None, metadata={"help": "where tensorboard files go"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "accepted; has no effect any more"})

    def __post_init__(self):
        for name, instead in NOT_HERE.items():
            known = self.__dataclass_fields__.get(name)  # not in every version
            if known is not None and getattr(self, name) not in (known.default, False):
                raise ValueError(f"--{name} has no use here: {instead}")
        if self.dtype is not None:
            if (self.bf16 and self.dtype != "bfloat16") or (self.fp16 and self.dtype != "float16"):
                raise ValueError(f"--dtype {self.dtype} contradicts --{'bf16' if self.bf16 else 'fp16'} True")
        elif self.bf16 and self.fp16:
            raise ValueError("--fp16 True contradicts --bf16 True")
        elif self.bf16 is not None or self.fp16:
            self.dtype = "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"
        if self.dtype is not None:
            self.bf16, self.fp16 = self.dtype == "bfloat16", self.dtype == "float16"
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        if self.warmup_ratio is not None:
            self.warmup_steps = self.warmup_ratio
        if self.logging_dir is not None:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir
        # Trainer would compile the transformer whole; train.py compiles its two kinds of block once each.
        self.compile_blocks, self.torch_compile = self.torch_compile, False
        if self.greater_is_better is None and "nmse" in (self.metric_for_best_model or ""):
            self.greater_is_better = False
        self.logging_nan_inf_filter = False  # our trainer stops at the first such loss
        self.remove_unused_columns = False  # or the teacher's velocity would not reach the loss
        # Trainer wants to be told that bf16 is meant for the CPU.
        self.use_cpu = self.use_cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and not (self.use_cpu or self.fp16)
        if self.dataloader_num_workers is None:
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            cpu = self.use_cpu or not torch.cuda.is_available()
            self.dataloader_num_workers = 0 if cpu else min(8, (os.cpu_count() or 1) // ranks)
        self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        with warnings.catch_warnings():  # gradient_checkpointing has another name by now, and goes by both
            warnings.simplefilter("ignore", FutureWarning)
            super().__post_init__()
        if self.fsdp:
            self.fsdp_config.setdefault("version", 2)
        if self.n_gpu > 1:  # started without torchrun on a machine of several GPUs: one of them, not DataParallel
            self._n_gpu = 1


def trained_name(model_args: ModelArguments, training_args: TrainingArguments) -> str:
    """What a trained model is called by default: model, bits and, unless it says just that, the run's OUTPUT_DIR."""
    bits = model_args.w_bits[0]
    name = f"{Path(model_args.input_model_filename).resolve().name}-{'1.58' if bits == 0 else bits}bit"
    run = Path(training_args.output_dir).resolve().name
    return name if run in (name, "") else f"{name}-{run}"


class _Parser(ArgumentParser, transformers.HfArgumentParser):
    """HfArgumentParser with errors of one line."""


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it stands, and default values where there are some."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def make_parser(description: str | None, used: Collection[str] | None) -> _Parser:
    """The parser of all flags. --help shows this repository's own before Trainer's; only those `used`, if given."""
    parser = _Parser(
        (ModelArguments, DataArguments, TrainingArguments),
        description=description,
        formatter_class=_Formatter,
        usage="%(prog)s [flags]",
    )
    own = {name for part in (ModelArguments, DataArguments, TrainingArguments) for name in part.__annotations__}
    parser._optionals._group_actions.sort(key=lambda action: action.dest not in own | {"help"})
    for action in parser._actions:
        if action.dest in NOT_HERE or (used is not None and action.dest not in {*used, "help"}):
            action.help = argparse.SUPPRESS
    if used is not None:
        parser.epilog = "Accepted as well, without effect here: train.py's flags, Hugging Face's Trainer's among them."
    return parser


def process_args(
    argv: list[str] | None = None, description: str | None = None, used: Collection[str] | None = None
) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse `argv` (default: the command line). A flag or value that does not exist ends in one line and status 2.

    For --help: a `description`, and the names of the flags that the script has a use for (default: all).
    """
    parser = make_parser(description, used)
    try:
        model_args, data_args, training_args, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True
        )
        if unknown:
            raise ValueError(f"unknown arguments: {' '.join(unknown)}")
        device = pick_device(model_args.device)
        if used is None and device.index is not None and (device.index or int(os.environ.get("WORLD_SIZE", 1)) > 1):
            raise ValueError(
                f"--device {device}: training takes the first GPU, or one a rank: leave it out; CUDA_VISIBLE_DEVICES "
                "says which there are"
            )
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if device.type == "cuda" and here > max(1, gpus):
            raise ValueError(f"{here} processes want a GPU each, and there are {gpus}: start fewer")
        if device.type == "cpu" and not training_args.use_cpu:
            argv = sys.argv[1:] if argv is None else argv
            return process_args([*argv, "--use_cpu", "True"], description, used)  # Trainer's --device
        for bits in model_args.w_bits:
            check_bits(bits)
        check_clip_init(model_args.clip_init)
        check_offload(model_args.offload, device)
        check_lora_r(model_args.lora_r)
        if model_args.output_model_filename is None:
            model_args.output_model_filename = trained_name(model_args, training_args)
        check_name("--output_model_filename", model_args.output_model_filename)
        check_counts(data_args, "num_images", "num_final_images", "num_train_prompts", "num_inference_steps")
        check_counts(training_args, "per_device_train_batch_size", "per_device_eval_batch_size")
        check_counts(training_args, "gradient_accumulation_steps")
        check_resolution(data_args.resolution)
        check_guidance(data_args.guidance_scale)
        check_seed(training_args.seed)
        check_seed(training_args.data_seed, "--data_seed")
        missing = set(training_args.report_to) - set(get_available_reporting_integrations())
        if missing and used is None:
            name = min(missing)
            raise ValueError(f"--report_to {name}: no such package here; install {name}, or use --report_to none")
        if training_args.max_steps == 0:
            raise ValueError("--max_steps must be at least 1; leave it out to train for --num_train_epochs")
        if training_args.max_steps < 0 and not training_args.num_train_epochs > 0:
            raise ValueError(f"--num_train_epochs must be above 0, got {training_args.num_train_epochs}")
        for kind in ("save", "eval"):
            steps, strategy = (getattr(training_args, f"{kind}_{name}") for name in ("steps", "strategy"))
            if strategy == "steps" and not steps > 0:
                raise ValueError(f"--{kind}_steps must be above 0, got {steps}; --{kind}_strategy no does without")
        if training_args.save_strategy == "best" and training_args.metric_for_best_model is None:
            raise ValueError("--save_strategy best needs --metric_for_best_model, such as nmse or psnr")
        for name in ("learning_rate", "clip_learning_rate", "weight_decay", "feature_loss"):
            value = getattr(training_args, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"--{name} must be a finite number of at least 0, got {value}")
        if not 0 <= training_args.ema_decay < 1:
            raise ValueError(f"--ema_decay must be at least 0 and below 1, got {training_args.ema_decay}")
        if training_args.early_share is not None and not 0 < training_args.early_share < 1:
            raise ValueError(f"--early_share must be above 0 and below 1, got {training_args.early_share}")
        if training_args.step_shares is not None and training_args.early_share is not None:
            raise ValueError("--step_shares stands in place of --early_share: give one of them")
        if training_args.freeze_codes is None:
            training_args.freeze_codes = 0.0 if training_args.ema_decay else 0.1
        if not 0 <= training_args.freeze_codes < 1:
            raise ValueError(f"--freeze_codes must be at least 0 and below 1, got {training_args.freeze_codes}")
        if training_args.freeze_codes and training_args.ema_decay:
            raise ValueError("--freeze_codes cannot be combined with --ema_decay: averaged step sizes want other codes")
        if training_args.rate_share is not None and not training_args.rate_share > 0:
            raise ValueError(f"--rate_share must be above 0, got {training_args.rate_share}")
        if training_args.rate_share is not None and model_args.lora_r:
            raise ValueError("--rate_share is of a layer's own weights, and with --lora_r it is not these that move")
        for name in ("visit_share", "vote_codes"):
            if not 0 <= getattr(training_args, name) <= 1:
                raise ValueError(f"--{name} must be 0 to 1, got {getattr(training_args, name)}")
        for name, value in (("pack True", model_args.pack), ("vote_codes", training_args.vote_codes)):
            if value and used is None and model_args.w_bits[0] >= FULL_PRECISION_BITS:
                raise ValueError(f"--{name} is of codes, and --w_bits {model_args.w_bits[0]} has none: leave it out")
        if training_args.vote_codes and (model_args.lora_r or not training_args.freeze_codes):
            raise ValueError(
                "--vote_codes decides which codes of the weights are frozen: it needs --freeze_codes above "
                "0 and --lora_r 0"
            )
        if training_args.vote_codes + training_args.freeze_codes > 1:
            raise ValueError("--vote_codes and --freeze_codes are shares of all steps: together at most 1")
        if training_args.visit_share and data_args.teacher_cache == "off":
            raise ValueError("--visit_share draws any training prompt again and again: it needs a teacher cache")
        if not 0 < training_args.loss_power <= 1:
            raise ValueError(f"--loss_power must be above 0 and at most 1, got {training_args.loss_power}")
    except ValueError as error:
        parser.error(str(error))
    model_args.input_model_filename = from_root(model_args.input_model_filename)
    return model_args, data_args, training_args
