"""Teach a quantized FLUX back what it lost: teacher cache, then quantization-aware training.

    python train.py --w_bits 0 --max_steps 500                                   # the embedded tiny-flux
    torchrun --nproc_per_node=2 train.py --w_bits 0 --max_steps 500              # two processes, CPU or GPU
    torchrun --nproc_per_node=8 train.py --input_model_filename black-forest-labs/FLUX.1-dev --bf16 True \\
        --gradient_checkpointing True --lora_r 32 --lora_alpha 32 --learning_rate 2e-4

The full-precision pipeline draws every training prompt once; what its transformer did at each step is cached. The
student, the same transformer with quantized linears, learns to predict the same velocities. What is trained:

    --train_weights True         the quantized weights (the default, unless there is a LoRA)
    --lora_r 32 --lora_alpha 1   a LoRA inside the quantizer
    --clip_learning_rate 1e-4    the step sizes α (0: frozen)
    --train_unquantized True     biases, norms, embedders

`--lora_r 32 --lora_alpha 1 --clip_init max --learning_rate 2e-5 --early_share 0.25 --loss_power 1 --freeze_codes 0` is
the recipe of the published port. `--early_share` is how much of the training goes to the first quarter of the denoising
steps, which decide the layout, `--loss_power` below 1 makes hard samples count for less; for the last `--freeze_codes`
of the steps the codes stay, and what is left is trained for them; `--start_from FOLDER` starts from the codes that
run.py found. It writes

    LOCAL_DIR/teacher_cache/MODEL-DIGEST/            trajectories, shared by all runs that ask the same of a teacher
    OUTPUT_DIR/eval/step_N/, step-N.png, steps.png   held-out prompts as the student draws them
    OUTPUT_DIR/metrics.jsonl, curves.png             what was measured on the way; tensorboard reads runs/
    OUTPUT_DIR/checkpoint-N/                         to go on from
    OUTPUT_DIR/summary.json                          settings, hardware, time and what was reached
    LOCAL_DIR/models/OUTPUT_MODEL_FILENAME           the student, for FluxTransformer2DModel.from_pretrained
                                                     (--pack True: a tenth of the size, for inference only)

Started again, it goes on from the last checkpoint in OUTPUT_DIR; another OUTPUT_DIR starts anew.
"""

import hashlib
import importlib.util
import json
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import FluxPipeline
from transformers.trainer_utils import get_last_checkpoint

from models.modeling_flux_quant import is_quantized
from utils.checkpoints import bits_name, check_shapes, load_quantized_model, load_student, transformer_folder
from utils.datautils import OnlineTeacher, TeacherCache, Trajectories, default_folder, fill_cache
from utils.folders import check_disk, whole_folder
from utils.process_args import process_args
from utils.prompts import pick_prompts
from utils.sampling import native_size
from utils.teacher import Teacher, TeacherSettings, prompt_seeds
from utils.trainer import ONLINE_WINDOW, FluxQATTrainer, choose_parameters, restore_metrics, save_curves
from utils.utils import device_name, get_logger, pick_dtype, run_script

log = get_logger("train")


def find_checkpoint(training_args) -> Path | None:
    """The checkpoint to go on from: the one named, else the last in OUTPUT_DIR, else none."""
    asked, folder = training_args.resume_from_checkpoint, Path(training_args.output_dir)
    if str(asked).lower() == "false":
        if folder.is_dir() and get_last_checkpoint(folder):
            raise ValueError(
                f"{folder} holds checkpoints of an earlier run: delete them or choose another --output_dir"
            )
        return None
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    checkpoint = last if asked is None or str(asked).lower() == "true" else asked
    if checkpoint is None and asked is not None:
        raise ValueError(
            f"--resume_from_checkpoint {asked}: no checkpoint in {folder}; leave the flag out to start anew"
        )
    if checkpoint is not None and not (Path(checkpoint) / "training_state.safetensors").is_file():
        raise ValueError(f"--resume_from_checkpoint {checkpoint}: no training checkpoint there; check the path")
    return None if checkpoint is None else Path(checkpoint)


def check_settings(checkpoint: Path, settings: dict) -> None:
    """ValueError, naming the setting, unless the checkpoint was trained with the same ones."""
    found = json.loads((checkpoint / "settings.json").read_text())
    for name, wanted in settings.items():
        if found.get(name) != wanted:
            raise ValueError(
                f"{checkpoint}: trained with {name}={found.get(name)}, asked for {name}={wanted}; "
                "give the same settings, or another --output_dir to start anew"
            )


def run_settings(model_args, training_args, teacher: dict) -> dict:
    """What a resumed run must share with the interrupted one; `teacher` is the training trajectories' description."""
    names = ("lora_r", "lora_alpha", "clip_init", "quantize_modulation", "train_weights", "train_unquantized")
    settings = {"w_bits": model_args.w_bits[0]}
    settings |= {name: getattr(model_args, name) for name in (*names, "start_from")}
    names = ("learning_rate", "clip_learning_rate", "weight_decay", "ema_decay", "feature_loss", "bf16", "fp16")
    names += ("early_share", "loss_power", "freeze_codes", "seed", "warmup_steps", "max_grad_norm")
    names += ("adam_beta1", "adam_beta2", "adam_epsilon")
    settings |= {name: getattr(training_args, name) for name in names}
    settings |= {
        "optim": training_args.optim.value,
        "lr_scheduler_type": training_args.lr_scheduler_type.value,
        "global_batch_size": training_args.per_device_train_batch_size
        * training_args.gradient_accumulation_steps
        * training_args.world_size,
    }
    settings |= {f"teacher_{name}": value for name, value in teacher.items() if name not in ("prompts", "model")}
    settings["train_prompts"] = hashlib.sha256("\n".join(teacher["prompts"]).encode()).hexdigest()
    return settings


def get_teacher(
    teacher: Teacher, model_args, data_args, training_args, device: torch.device
) -> tuple[Trajectories, Trajectories, int | None]:
    """Training and held-out trajectories, of a cache that is still to be filled or made while training, and the window
    to shuffle within.

    A held-out prompt's noise goes by its number, as in sanity.py and test.py; a training prompt's by the prompt, so
    that a list may be changed without all that follows being drawn again.
    """
    count = max(data_args.num_images, data_args.num_final_images or 0)
    held_out, source = pick_prompts(teacher.pipe, count, data_args.prompts)
    number = data_args.num_train_prompts
    prompts, train_source = pick_prompts(teacher.pipe, number, data_args.train_prompts, split="train")
    both = set(prompts) & set(held_out)
    if both:
        if training_args.should_log:
            log.info("%d training prompts are held-out prompts too and left out", len(both))
        prompts = [prompt for prompt in prompts if prompt not in both]
    if len(prompts) < training_args.world_size:
        raise ValueError(
            f"{len(prompts)} training prompts for {training_args.world_size} ranks: give at least one prompt for each"
        )
    if training_args.should_log:
        log.info("%d training prompts: %s; %d held out: %s", len(prompts), train_source, len(held_out), source)

    size = data_args.resolution or native_size(teacher.pipe)
    settings = TeacherSettings(size, data_args.num_inference_steps, data_args.guidance_scale)
    eval_asked = held_out, range(training_args.seed, training_args.seed + len(held_out))
    train_asked = prompts, prompt_seeds(prompts, training_args.seed)
    if data_args.teacher_cache == "off":
        train_data = OnlineTeacher(teacher, settings, *train_asked, ONLINE_WINDOW, device)
        return train_data, OnlineTeacher(teacher, settings, *eval_asked, len(held_out), device), ONLINE_WINDOW
    manifest = teacher.describe(settings)
    folder = data_args.teacher_cache or default_folder(Path(model_args.local_dir) / "teacher_cache", manifest)
    return *(TeacherCache(folder, manifest, *asked) for asked in (train_asked, eval_asked)), None


def summarize(trainer: FluxQATTrainer, seconds: float, steps: int) -> dict:
    """Settings, machine, time and the last evaluation."""
    device = trainer.args.device
    final = [line for line in trainer.state.log_history if "eval_nmse" in line][-1]
    start = [line for line in trainer.state.log_history if "eval_nmse" in line][0]
    return {
        "settings": trainer.settings,
        "steps": trainer.state.global_step,
        "seconds_per_step": round(seconds / steps, 4) if steps else None,
        "trained_parameters": sum(p.numel() for p in trainer.trained()),
        "start": start,
        "final": final,
        "device": device_name(device),
        "world_size": trainer.args.world_size,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def settings_line(settings: dict) -> str:
    """What is trained and how, in a few words."""
    name = bits_name(settings["w_bits"])
    lora = f", LoRA r {settings['lora_r']} alpha {settings['lora_alpha']:g}" if settings["lora_r"] else ""
    return f"{name}{lora}, clip_init {settings['clip_init']}, learning rate {settings['learning_rate']:g}"


def print_summary(summary: dict) -> None:
    """What was reached, beside where it started."""
    names = {
        "nmse": "velocity NMSE", "nmse_early": "  early steps", "nmse_middle": "  middle steps",
        "nmse_late": "  late steps", "psnr": "PSNR dB", "scene_score": "scene score",
    }  # fmt: skip
    print(f"\n{'held-out prompts':<18}{'start':>10}{'trained':>10}")
    for name, title in names.items():
        if f"eval_{name}" in summary["final"]:
            first, last = (f"{summary[when].get(f'eval_{name}', float('nan')):.5g}" for when in ("start", "final"))
            print(f"{title:<18}{first:>10}{last:>10}")
    if "eval_scene_score_teacher" in summary["final"]:
        print(f"{'  teacher':<18}{'':>10}{summary['final']['eval_scene_score_teacher']:>10.5g}")
    print(f"{summary['steps']} steps, {summary['seconds_per_step']} s each, without evaluations and checkpoints\n")


def main() -> None:
    model_args, data_args, training_args = process_args()
    if len(model_args.w_bits) > 1:
        raise ValueError(f"--w_bits {' '.join(map(str, model_args.w_bits))}: train.py trains one bit width at a time")
    if "bnb" in training_args.optim.value and importlib.util.find_spec("bitsandbytes") is None:
        log.info("--optim %s needs bitsandbytes, which is not here: using adamw_torch_fused", training_args.optim.value)
        training_args.optim = transformers.training_args.OptimizerNames.ADAMW_TORCH_FUSED
    checkpoint = find_checkpoint(training_args)
    device = training_args.device
    main_process = training_args.should_log

    # 1. The teacher: its trajectories, cached or to be made on the way.
    source = Teacher(model_args.input_model_filename, pick_dtype(training_args, device))
    if is_quantized(source.config):
        raise ValueError(f"{model_args.input_model_filename}: already quantized; the teacher must be full precision")
    start = None
    if model_args.start_from is not None and checkpoint is None:
        folder = transformer_folder(Path(model_args.start_from))
        start = load_student(folder, torch.float32, w_bits=model_args.w_bits[0])
        check_shapes(folder, start.config, model_args.input_model_filename, source, "--input_model_filename")
    train_data, eval_data, window = get_teacher(source, model_args, data_args, training_args, device)
    settings = run_settings(model_args, training_args, train_data.description) | {"shuffle_window": window}
    if checkpoint is not None and training_args.do_train:
        check_settings(checkpoint, settings)
    if window is None:
        fill_cache(eval_data.joined(train_data), source, training_args.per_device_eval_batch_size, device)
    else:  # the teacher lives in this process and draws for it alone
        training_args.dataloader_num_workers, training_args.dataloader_persistent_workers = 0, False
    if not training_args.do_train:
        return

    # 2. The student. Unless the teacher is needed on the way, nothing of its pipeline is there but the autoencoder.
    if training_args.feature_loss:
        source.load("transformer", device=device)
    pipe, teacher = source.pipe, source.pipe.transformer if training_args.feature_loss else None
    torch.manual_seed(training_args.seed)  # of the LoRA's start
    # A checkpoint holds what was trained in fp32; the pipeline's own weights are no finer than its dtype.
    dtype = pick_dtype(training_args, device)
    load_dtype = dtype if checkpoint is None else torch.float32
    student = load_quantized_model(model_args, training_args, checkpoint, model_args.w_bits[0], load_dtype)
    choose_parameters(student, model_args, training_args.clip_learning_rate, frozen_dtype=dtype)
    if start is not None:  # now that what is trained is in fp32
        student.start_from(start)
    del start
    if training_args.gradient_checkpointing or getattr(training_args, "activation_checkpointing", False):
        student.enable_gradient_checkpointing()  # diffusers' own; Trainer would look for transformers'
        training_args.gradient_checkpointing = training_args.activation_checkpointing = False
    if training_args.compile_blocks:
        student.compile_repeated_blocks()
        if teacher is not None:
            teacher.compile_repeated_blocks()
    eval_pipe = FluxPipeline(**{**pipe.components, "transformer": student.to(device)})
    eval_pipe.vae.to(device)

    # 3. Training.
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails for tiny-flux's shapes (torch 2.11, H100)
    trainer = FluxQATTrainer(
        student, training_args, train_data, eval_data, eval_pipe, settings,
        num_images=min(data_args.num_images, len(eval_data.prompts)),
        num_final_images=min(data_args.num_final_images or data_args.num_images, len(eval_data.prompts)),
        window=window, teacher=teacher,
    )  # fmt: skip
    if main_process:
        trained = sum(p.numel() for p in trainer.trained())
        log.info(
            "%s: training %s of %s parameters", settings_line(settings), f"{trained:,}", f"{student.num_parameters():,}"
        )
    first_step = 0
    if checkpoint is not None:
        first_step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        training_args.eval_on_start = False
        if main_process:
            log.info("going on from %s (another --output_dir starts anew)", checkpoint)
    if main_process:
        restore_metrics(Path(training_args.output_dir), checkpoint)
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = result.metrics["train_runtime"] - trainer.aside
    if not any(line.get("step") == result.global_step and "eval_nmse" in line for line in trainer.state.log_history):
        trainer.evaluate()

    # 4. The result.
    if main_process:
        output = Path(model_args.output_model_local_path)
        with trainer.averaged_weights():
            check_disk(output, sum(p.numel() * p.element_size() for p in student.parameters()), "the trained model")
            with whole_folder(output) as partial:
                trainer.save_transformer(partial)
        if model_args.pack:
            packed = load_student(output, dtype)
            with whole_folder(output) as partial:
                packed.save_pretrained(partial)
        summary = summarize(trainer, seconds, result.global_step - first_step)
        (Path(training_args.output_dir) / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        save_curves(Path(training_args.output_dir))
        print_summary(summary)
        log.info(
            "pictures: %s; curves: %s", *(Path(training_args.output_dir) / f for f in ("eval/steps.png", "curves.png"))
        )
        log.info("student: %s", output)


if __name__ == "__main__":
    run_script(main)
