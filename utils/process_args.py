"""Flags of sanity.py and train.py: three dataclasses, parsed by Hugging Face's HfArgumentParser.

The flags of the published shell scripts are accepted as they stand. Those that newer transformers renamed or dropped
(--evaluation_strategy, --warmup_ratio, --logging_dir, --overwrite_output_dir) are fields here and mapped to their
successors.
"""

import os
from dataclasses import dataclass, field

import torch
import transformers

from models.utils_quant import check_bits
from utils.utils import pick_device


@dataclass
class ModelArguments:
    local_dir: str = field(default="output", metadata={"help": "where trained models go: LOCAL_DIR/models/…"})
    input_model_filename: str = field(
        default="assets/tiny-flux", metadata={"help": "the FLUX pipeline to start from: a folder or a hub id"}
    )
    output_model_filename: str = field(default="model", metadata={"help": "name of the trained model"})
    w_bits: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "bits a weight: 0 (1.58 bit, ternary), 1 to 8, 16 (full precision); sanity.py takes several"},
    )
    contain_weight_clip_val: bool = field(
        default=False, metadata={"help": "accepted as published; whether a checkpoint has step sizes is seen from it"}
    )
    device: str | None = field(default=None, metadata={"help": "default: cuda if there, else mps, else cpu"})

    @property
    def output_model_local_path(self) -> str:
        return os.path.join(self.local_dir, "models", self.output_model_filename)


@dataclass
class DataArguments:
    prompts: str | None = field(
        default=None, metadata={"help": "a text file, one prompt a line; default: the evaluation set for the model"}
    )
    num_images: int = field(default=6, metadata={"help": "pictures a bit width"})
    num_inference_steps: int = field(default=28, metadata={"help": "denoising steps a picture"})
    guidance_scale: float = field(default=3.5, metadata={"help": "guidance, for models that embed it"})
    resolution: int | None = field(
        default=None, metadata={"help": "pixels a side; default: what the autoencoder was made for"}
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    output_dir: str = field(default="output", metadata={"help": "samples, checkpoints and caches go here"})
    optim: str = field(default="adamw_torch", metadata={"help": "the optimizer"})
    qat: bool = field(default=False, metadata={"help": "accepted as published; whether to quantize is up to --w_bits"})
    evaluation_strategy: str | None = field(default=None, metadata={"help": "older name of --eval_strategy"})
    warmup_ratio: float | None = field(default=None, metadata={"help": "older name of a --warmup_steps below 1"})
    logging_dir: str | None = field(default=None, metadata={"help": "where tensorboard files go"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "accepted; has no effect any more"})

    def __post_init__(self):
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        if self.warmup_ratio is not None:
            self.warmup_steps = self.warmup_ratio
        if self.logging_dir is not None:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir
        # Trainer wants to be told that bf16 is meant for the CPU.
        self.use_cpu = self.use_cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())
        super().__post_init__()


def process_args(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse `argv` (default: the command line). A flag or value that does not exist ends in one line and status 2."""
    parser = transformers.HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    # argparse's own would print all flags first, 120 lines of them.
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {' '.join(message.split())} (see --help)\n")
    try:
        model_args, data_args, training_args, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True
        )
        if unknown:
            raise ValueError(f"unknown arguments: {' '.join(unknown)}")
        for bits in model_args.w_bits:
            check_bits(bits)
        pick_device(model_args.device)
        for name in ("num_images", "num_inference_steps", "resolution"):
            value = getattr(data_args, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if data_args.resolution and data_args.resolution % 16:
            raise ValueError(f"--resolution must be a multiple of 16, got {data_args.resolution}")
    except ValueError as error:
        parser.error(str(error))
    return model_args, data_args, training_args
