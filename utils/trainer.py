"""FluxQATTrainer: Hugging Face's Trainer with the velocity as the target.

loss = mean over the samples of (mean (v_student(z_t, prompt, t, guidance) − v_teacher)²)^loss_power, z_t and v_teacher
from the teacher's own trajectories (utils/datautils.py), most of them of the first steps, which decide the layout.
Trainer keeps the loop, DDP, gradient accumulation, schedules and logging; here stand the loss, what is trained,
the codes that stay for the last `freeze_codes` of the steps, evaluation against the teacher, and checkpoints that hold
safetensors and JSON only:

    checkpoint-N/config.json, *.safetensors    the transformer, or of a frozen one what was trained (models/trained.py),
                                               for QuantizedTransformer.from_pretrained
    checkpoint-N/training_state*.safetensors   the optimizer's moments; with --ema_decay also the weights not averaged
    checkpoint-N/trainer_state.json            Trainer's log and counters
    checkpoint-N/settings.json                 what a resumed run must agree with

No random number is drawn while training (data order follows from seed and epoch), so there is no generator to save.
"""

import importlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
import transformers
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from tqdm import tqdm
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint

from models.quantized_model import QuantizedTransformer
from models.trained import Shards, full, save_packed, save_shards, save_trained, save_whole
from models.utils_quant import QuantizeLinear
from utils import interrupt, scenes
from utils.datautils import ShuffledSamples, Trajectories, collate, split_batch
from utils.folders import read_json, remove_folder, whole_folder, write_json
from utils.last_steps import VisitedStates, Votes
from utils.metrics import psnr, scene_score
from utils.pictures import save_images, save_strip
from utils.sampling import decode_latents, sample_latents
from utils.utils import get_logger

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 (the backend is to be chosen first)

log = get_logger("train")
THIRDS = ("early", "middle", "late")  # of the denoising steps: noise first, details last
ERROR_FLOOR = 1e-12  # of a sample; the gradient of a power below 1 has a pole at zero
STATE = "training_state"
NOT_SPREAD = ("cpu", "mps")  # devices on which accelerate would take DDP instead, without a word
FSDP_OPTIMIZERS = ("adamw_torch_8bit", "adamw_torch_fused", "adamw_torch", "sgd")
ONLINE_WINDOW = 16  # trajectories kept at a time when there is no teacher cache


def choose_parameters(
    model: QuantizedTransformer, model_args, clip_learning_rate: float | None, frozen_dtype: torch.dtype
) -> None:
    """Set requires_grad as the flags say; what is trained becomes fp32, the rest but α and LoRA `frozen_dtype`.

    (In bf16 a step below half an ulp of the weight rounds away: at learning rate 2e-5 nothing would move.)
    Raises ValueError if nothing is left to train.
    """
    train_weights = model_args.train_weights
    if train_weights is None:
        train_weights = model_args.lora_r == 0
    for module in model.modules():
        quantized = isinstance(module, QuantizeLinear)
        for name, parameter in module.named_parameters(recurse=False):
            if quantized and name == "weight":
                wanted = train_weights
            elif name == "weight_clip_val":
                wanted = clip_learning_rate != 0
            elif name in ("lora_A", "lora_B"):
                wanted = True
            else:
                wanted = model_args.train_unquantized
            parameter.requires_grad_(wanted)
            kept = quantized and name in module._fp32_parameters
            parameter.data = parameter.data.to(torch.float32 if wanted or kept else frozen_dtype)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "nothing to train: allow --train_weights, --lora_r, --train_unquantized or --clip_learning_rate"
        )


def compile_blocks(transformer: QuantizedTransformer, spread: bool = False) -> None:
    """Compile the blocks, equal ones once; of those that FSDP2 will spread the forward alone, without its hooks."""
    if not spread:
        return transformer.compile_repeated_blocks()
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.forward = torch.compile(block.forward)


def parameter_groups(
    model: nn.Module, weight_decay: float, clip_learning_rate: float | None, rate_share: float | None = None
) -> list[dict]:
    """The trained parameters for an optimizer: matrices with weight decay, the rest without, step sizes at their own
    learning rate; with `rate_share` the weight and the step sizes of every quantized layer at this share of its mean
    step size."""
    shared = [] if rate_share is None else shares(model, weight_decay, rate_share)
    taken = {id(p) for group in shared for p in group["params"]}
    trained = [
        (name.rpartition(".")[2], p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in taken
    ]
    clip = {} if clip_learning_rate is None else {"lr": clip_learning_rate}
    groups = [
        {"params": [p for name, p in trained if name == "weight_clip_val"], "weight_decay": 0.0} | clip,
        {
            "params": [p for name, p in trained if name != "weight_clip_val" and p.ndim > 1],
            "weight_decay": weight_decay,
        },
        {"params": [p for name, p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]] + shared


def shares(model: nn.Module, weight_decay: float, rate_share: float) -> list[dict]:
    """A group for the weight and one for the step sizes of every quantized layer, as far as they are trained."""
    groups = []
    for layer in quantized_layers(model):
        if layer.weight_clip_val is not None:
            rate = rate_share * full(layer.weight_clip_val.detach()).mean().item()
            for parameter, decay in ((layer.weight, weight_decay), (layer.weight_clip_val, 0.0)):
                if parameter.requires_grad:
                    groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    return groups


class FluxQATTrainer(transformers.Trainer):
    """Trains `model` on the samples of `train_data` and judges it on the trajectories of `eval_data`.

    model       the student, its parameters chosen (see choose_parameters)
    eval_pipe   a pipeline whose transformer is the student; its autoencoder and scheduler draw the pictures
    eval_data   held-out prompts; the first num_images are used, in the last evaluation the first num_final_images
    settings    what a resumed run must agree with, JSON-able
    teacher     the full-precision transformer, for feature_loss and visit_share
    base        where frozen parameters come from (see trained.describe_base); checkpoints leave them out then
    """

    def __init__(
        self,
        model: QuantizedTransformer,
        args,
        train_data: Trajectories,
        eval_data: Trajectories,
        eval_pipe: DiffusionPipeline,
        settings: dict,
        num_images: int,
        num_final_images: int,
        window: int | None = None,
        teacher: nn.Module | None = None,
        base: dict | None = None,
    ):
        for name in ("feature_loss", "visit_share"):
            if getattr(args, name) and teacher is None:
                raise ValueError(f"{name} needs the teacher")
        self.eval_pipe, self.settings, self.teacher, self.base = eval_pipe, settings, teacher, base
        self.num_images, self.num_final_images = num_images, num_final_images
        order = args.seed if args.data_seed is None else args.data_seed
        shares = args.step_shares and [share for share in args.step_shares for _ in range(train_data.calls)]
        sizes = len(train_data.prompts), train_data.steps
        self.sampler = ShuffledSamples(*sizes, order, window, args.early_share, shares)
        self.folder = Path(args.output_dir)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_data,
            eval_dataset=eval_data,
            data_collator=collate,
            optimizers=(None, None),
            callbacks=[_Average(self), _Freeze(self), _Clock(self)],
        )
        if stock := self.pop_callback(TensorBoardCallback):
            self.add_callback(_TensorBoard(stock.tb_writer))
        self.loss_is_scaled_for_ga = False  # a mean over the batch
        if self.accelerator.ddp_handler is not None:  # no copies of the gradients into DDP's buckets and back
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        self.doing = "training starts"
        self.aside = 0.0  # seconds spent on evaluation and checkpoints
        self.first_step: dict[str, float] = {}  # when it began, from the script's start on, and how long it took
        self.compiling: list[float] = []  # seconds of the steps in which torch compiles
        self.averages: list[Tensor] | None = None
        if self.is_fsdp_enabled:
            prepare_fsdp(self.accelerator, model)
        self.votes = Votes()
        if teacher is not None:
            teacher.to(args.device).requires_grad_(False)
        if args.feature_loss:
            self.features, self.teacher_features = record_features(model), record_features(teacher)
        if args.visit_share:
            size = args.per_device_train_batch_size
            self.visited = VisitedStates(train_data, self.sampler, order, args.process_index, size)

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def average(self) -> list[Tensor] | None:
        """The averages of the trained parameters, made when they are first asked for: FSDP2 has spread them by then."""
        if self.averages is None and self.args.ema_decay:
            self.averages = [p.detach().clone() for p in self.trained()]
        return self.averages

    # ----------------------------------------------------------------------------------------------------- training

    def _get_train_sampler(self, train_dataset=None) -> ShuffledSamples:
        return self.sampler

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            rates = self.args.clip_learning_rate, self.args.rate_share
            groups = parameter_groups(self.model, self.args.weight_decay, *rates)
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The schedule that the flags name; with freeze_codes once for the steps before and once for those after."""
        if self.lr_scheduler is not None or not self.args.freeze_codes:
            return super().create_scheduler(num_training_steps, optimizer)
        before, kind = self.freeze_at(num_training_steps), self.args.lr_scheduler_type
        after, warmup = num_training_steps - before, self.args.get_warmup_steps
        again = min(warmup(after), math.ceil(after * warmup(num_training_steps) / num_training_steps))  # the same share
        parts = []
        for steps, rising in ((before, warmup(before)), (after, again)):
            parts.append(make_schedule(self.args, kind, steps, rising).lr_lambdas[0])
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: parts[0](step) if step < before else parts[1](step - before)
        )
        return self.lr_scheduler

    def freeze_at(self, steps: int) -> int:
        """After how many of `steps` steps the codes are frozen."""
        return steps - round(self.args.freeze_codes * steps)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over the samples of (mean squared error of the velocity [L, C])^loss_power, in float32, plus
        feature_weight() times that of the blocks.

        A few samples, in which the student decides for another layout than the teacher, hold most of the squared error.
        Below 1 the power keeps them from outweighing all others in the gradient.
        """
        inputs, target = split_batch(inputs)
        with self.accelerator.autocast():  # which accelerate leaves to FSDP2's policy, where weights stay in fp32
            velocity = model(**inputs, return_dict=False)[0]
        errors = (velocity.float() - target.float()).square().flatten(1).mean(1)
        loss = errors.clamp(min=ERROR_FLOOR).pow(self.args.loss_power).mean()
        if self.args.feature_loss:
            with torch.no_grad(), self.teacher_autocast():
                self.teacher(**inputs)
            loss = loss + self.feature_weight() * feature_error(self.features, self.teacher_features)
        return (loss, velocity) if return_outputs else loss

    def teacher_autocast(self) -> torch.autocast:
        """What the teacher computes in: its own dtype."""
        dtype = self.teacher.dtype
        return torch.autocast(self.args.device.type, dtype, enabled=dtype != torch.float32)

    def feature_weight(self) -> float:
        """feature_loss at the first step, falling linearly to nothing: what the blocks put out on the way shows the
        student the direction, but in the end the velocity alone counts."""
        last = self.state.max_steps
        return self.args.feature_loss * (1 - self.state.global_step / last if last > 0 else 1)

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """On the device and in float32, as the trained parameters are; autocast takes it from there."""
        return {name: tensor.float() for name, tensor in super()._prepare_inputs(inputs).items()}

    def what_is_done(self) -> str:
        return self.doing

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        self.doing = f"step {self.state.global_step + 1} is trained, {self.args.per_device_train_batch_size} a batch"
        step, last = self.state.global_step, self.state.max_steps
        if self.args.visit_share and step >= last - round(self.args.visit_share * last):
            contexts = self.accelerator.autocast, self.teacher_autocast
            inputs = self.visited.batch(step, self.model, self.teacher, self.args.device, contexts)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite():
            alone = None if self.is_fsdp_enabled else self.model  # a rank cannot run what is spread
            where = first_non_finite(alone, self._prepare_inputs(inputs))
            self._stop(f"the loss is {loss.item()}", where)
        return loss

    def _clip_grad_norm(self, model) -> Tensor:
        self.accelerator.unscale_gradients()
        gradients = {n: local(p.grad) for n, p in self.model.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.get_total_norm(gradients.values())
        if self.is_fsdp_enabled:  # each rank has its share of every gradient
            norm = self.accelerator.reduce(norm.square(), "sum").sqrt()
        scaler = self.accelerator.scaler  # of --fp16, which looks for its scale: it leaves such a step out
        if not norm.isfinite() and scaler is not None and scaler.get_scale() >= 1:
            return norm
        if not norm.isfinite():  # before clipping, which would spread it to all of them
            bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            self._stop(f"the gradient's norm is {norm.item()}", bad[0] if bad else "another rank's share")
        torch._foreach_mul_(list(gradients.values()), (self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1))
        return norm

    def _run_epoch(self, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:  # a finished run started again: Trainer would take a step
            self.control.should_training_stop = True
            return
        self.sampler.set_epoch(kwargs["epoch"])  # which accelerate forgets where ranks skip what is trained already
        super()._run_epoch(**kwargs)

    def _stop(self, what: str, where: str | None) -> None:
        last = get_last_checkpoint(self.folder) if self.folder.is_dir() else None
        raise ValueError(
            f"step {self.state.global_step + 1}: {what}; first non-finite value in {where or 'the loss itself'}; try a "
            f"lower --learning_rate; the last good checkpoint is {last or 'none yet'}"
        )

    @torch.no_grad()
    def update_average(self) -> None:
        """Exponential moving average of the trained parameters that forgets its first steps soon."""
        if self.average is not None:
            step = self.state.global_step
            fresh = max(1 - self.args.ema_decay, 9 / (10 + step))
            torch._foreach_lerp_([local(a) for a in self.average], [local(p.detach()) for p in self.trained()], fresh)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within the block the model holds the averaged parameters, if they are averaged."""
        if self.average is None:
            yield
            return
        self._swap_average()
        try:
            yield
        finally:
            self._swap_average()

    @torch.no_grad()
    def _swap_average(self) -> None:
        reshard(self.model)  # an evaluation leaves the root's parameters whole
        for parameter, average in zip(map(local, self.trained()), map(local, self.average), strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    # ---------------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Velocity and pictures of held-out prompts against the teacher's, logged under eval_….

        loss: mean squared error; nmse: normalized, over all steps and by thirds of them; psnr: of the pictures drawn
        from the same noise, in dB; scene_score: share of pictures that fit their prompt, where these are scenes.
        """
        last = self.state.global_step >= self.state.max_steps > 0
        count = self.num_final_images if last else self.num_images
        started = time.time()
        self.doing = f"step {self.state.global_step} is evaluated, {self.args.per_device_eval_batch_size} a batch"
        training = self.model.training
        self.model.eval()
        with self.averaged_weights(), torch.compiler.set_stance("force_eager"):
            metrics = self._velocity_error(count)
            images = self._draw(count)
        self.model.train(training)
        if self.is_world_process_zero():
            metrics |= self._judge(*images)
        metrics = broadcast_object_list([metrics])[0]
        wanted = self.args.metric_for_best_model
        if wanted is not None and wanted.removeprefix("eval_") not in metrics:
            raise ValueError(f"--metric_for_best_model {wanted}: not measured here; choose one of {', '.join(metrics)}")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.time() - started, 1)
        self.aside += time.time() - started
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _rounds(self, count: int) -> Iterator[tuple[list[int], int]]:
        """`count` numbers in batches shared by all ranks: this rank's batch and how much of it counts.

        Every rank gets as many batches, of the same size, since FSDP2 and gathering wait for all of them: what is
        missing is filled with the last number.
        """
        size = self.args.per_device_eval_batch_size
        for start in range(0, count, size * self.args.world_size):
            first = start + size * self.args.process_index
            numbers = [min(number, count - 1) for number in range(first, first + size)]
            yield numbers, max(0, min(size, count - first))

    def _velocity_error(self, count: int) -> dict[str, float]:
        """Over every step of `count` trajectories, shared by all ranks."""
        data = self.eval_dataset
        sums = torch.zeros(3, data.steps, dtype=torch.float64)  # squared error, squared target, elements
        rounds = list(self._rounds(count * data.steps))
        for numbers, own in tqdm(rounds, desc="velocity", leave=False, disable=self._silent()):
            inputs, target = split_batch(self._prepare_inputs(collate([data[number] for number in numbers])))
            with self.accelerator.autocast():
                velocity = self.model(**inputs, return_dict=False)[0].float()
            rows = [(velocity - target).square().flatten(1).sum(1), target.square().flatten(1).sum(1)]
            rows.append(torch.full_like(rows[0], target[0].numel()))
            steps = torch.tensor([number % data.steps for number in numbers[:own]], dtype=torch.long)
            sums.index_add_(1, steps, torch.stack(rows)[:, :own].double().cpu())
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.float().to(self.args.device), "sum").double().cpu()
        error, energy, elements = sums
        metrics = {"loss": error.sum() / elements.sum(), "nmse": error.sum() / energy.sum()}
        for third, part, whole in zip(THIRDS, error.tensor_split(3), energy.tensor_split(3), strict=True):
            if len(part):  # a third of two steps may be none
                metrics[f"nmse_{third}"] = part.sum() / whole.sum()
        return {name: value.item() for name, value in metrics.items()}

    def _silent(self) -> bool:
        return self.args.disable_tqdm or not self.is_world_process_zero()

    def _draw(self, count: int) -> tuple[Tensor, Tensor] | None:
        """`count` held-out prompts as the student and as the teacher draws them, drawn by all ranks, on the first."""
        asked = self.eval_dataset.description
        size = asked["resolution"]
        images, teacher_images = [], []
        rounds = list(self._rounds(count))
        for numbers, _ in tqdm(rounds, desc="pictures", leave=False, disable=self._silent()):
            kept = [self.eval_dataset.trajectory(number) for number in numbers]
            given = {
                name: torch.stack([t[name] for t in kept]).to(self.args.device).float()
                for name in kept[0]
                if name == "noise" or name.endswith("prompt_embeds")
            }
            with self.accelerator.autocast():
                latents = sample_latents(
                    self.eval_pipe,
                    size=size,
                    num_inference_steps=asked["num_inference_steps"],
                    guidance_scale=self.eval_dataset.guidance_scale,
                    **given,
                )
            final = torch.stack([self.eval_dataset.last_latents(trajectory) for trajectory in kept])
            for drawn, pictures in ((latents, images), (final, teacher_images)):
                pictures.append(self._gather(decode_latents(self.eval_pipe, drawn, size)))
        if self.is_world_process_zero():  # what filled up the last round is at its end
            return torch.cat(images)[:count], torch.cat(teacher_images)[:count]

    def _gather(self, images: Tensor) -> Tensor:
        """The images of all ranks in the order of ranks, on the CPU."""
        if self.args.world_size == 1:
            return images.cpu()
        return self.accelerator.gather(images.to(self.args.device).contiguous()).cpu()

    def _judge(self, images: Tensor, teacher_images: Tensor) -> dict[str, float]:
        """Keep the first num_images pictures as OUTPUT_DIR/eval/step_N/sample_….png; how all of them compare."""
        size, prompts = self.eval_dataset.description["resolution"], self.eval_dataset.prompts[: len(images)]
        save_images(teacher_images[: self.num_images], self.folder / "eval" / "teacher")
        save_images(images[: self.num_images], self.folder / "eval" / f"step_{self.state.global_step}")
        save_strip(self.folder / "eval", prompts[: min(self.num_images, 8)])
        metrics = {"psnr": psnr(images, teacher_images)}
        if size == scenes.SIZE and all(scenes.parse(prompt) for prompt in prompts):
            score, teacher = scene_score(images, prompts), scene_score(teacher_images, prompts)
            metrics |= {"scene_score": score.pop("mean"), "scene_score_teacher": teacher["mean"]}
            metrics |= {f"scene_{name}": value for name, value in score.items()}
            shares = [score[name] / teacher[name] for name in scenes.CATEGORIES if teacher.get(name)]
            if shares:  # of the category that lost most
                metrics["scene_worst_of_teacher"] = min(shares)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self.is_world_process_zero():
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": self.state.global_step} | logs) + "\n")

    # --------------------------------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        folder, started = self.folder / f"checkpoint-{self.state.global_step}", time.time()
        self.doing = f"checkpoint-{self.state.global_step} is written"
        reshard(self.model)
        tensors, others = optimizer_state(getattr(self.optimizer, "optimizer", self.optimizer))
        schedule = {k: v for k, v in self.lr_scheduler.state_dict().items() if k != "lr_lambdas"}
        metadata = {"optimizer": json.dumps(others), "scheduler": json.dumps(schedule, default=Tensor.item)}
        if self.accelerator.scaler is not None:
            metadata["scaler"] = json.dumps(self.accelerator.scaler.state_dict())
        # All ranks gather what is spread, one of them writes.
        with whole_folder(folder) if self.args.should_save else nullcontext() as partial:
            save_shards(self._training_state(tensors), partial, STATE, metadata)
            with self.averaged_weights():
                self.save_transformer(partial)
            if partial is not None:
                (partial / "settings.json").write_text(json.dumps(self.settings, indent=2) + "\n")
                self.state.save_to_json(str(partial / "trainer_state.json"))
        if self.args.visit_share:
            self.visited.forget()
        if self.args.should_save:
            rotate(self.folder, self.args.save_total_limit, self.state.global_step)
        self.accelerator.wait_for_everyone()
        self.aside += time.time() - started

    def _training_state(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            yield name, full(tensor)
        if self.average is not None:
            for i, parameter in enumerate(self.trained()):
                yield f"weights.{i}", full(parameter.detach())
        if self.votes.steps:
            yield from self.votes.state().items()

    def save_transformer(self, folder: Path | None) -> None:
        """The transformer as it stands, for from_pretrained."""
        if self.base is None:
            save_whole(self.model, folder)
        else:
            save_trained(self.model, folder, self.base)

    def save_result(self, folder: Path | None, packed: bool, dtype: torch.dtype) -> None:
        """The trained model, whole and to go on with, or packed with the rest of it in `dtype`.

        All ranks call it; `folder` is None on those that do not write.
        """
        self.doing = "the trained model is written"
        reshard(self.model)
        if packed:
            save_packed(self.model, folder, dtype)
        else:
            save_whole(self.model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """The transformer was made from the checkpoint already; here come parameters before averaging and votes."""
        state = Shards(Path(resume_from_checkpoint), STATE)
        if "votes_steps" in state:
            self.votes.load(state, self.args.device)
        if self.average is not None:
            with torch.no_grad():
                for i, (parameter, average) in enumerate(zip(self.trained(), self.average, strict=True)):
                    local(average).copy_(local(parameter))
                    local(parameter).copy_(local(share(state[f"weights.{i}"], parameter)))

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        state = Shards(Path(checkpoint), STATE)
        load_optimizer(optimizer, state, json.loads(state.metadata["optimizer"]))
        schedule = json.loads(state.metadata["scheduler"])
        if "lr_lambdas" in self.lr_scheduler.state_dict():
            schedule["lr_lambdas"] = [None] * len(optimizer.param_groups)
        self.lr_scheduler.load_state_dict(schedule)

    def _load_scaler(self, checkpoint) -> None:
        state = Shards(Path(checkpoint), STATE).metadata
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(json.loads(state["scaler"]))

    def _load_rng_state(self, checkpoint) -> None:
        """Nothing to load: no random number is drawn while training."""


class _Average(transformers.TrainerCallback):
    """Tells the trainer that training begins and that a step is through."""

    def __init__(self, trainer: FluxQATTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # of a resumed run too, whose state says what the flags were before
        self.trainer.average  # noqa: B018 (starts from the first parameters)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.update_average()


class _Clock(transformers.TrainerCallback):
    """Notes how long it takes to the first step, without what is evaluated before it, and how long the steps take in
    which torch compiles: the first one, and the first one with frozen codes."""

    def __init__(self, trainer: FluxQATTrainer):
        self.trainer, self.began = trainer, None

    def on_step_begin(self, args, state, control, **kwargs):
        first, self.began = self.began is None, time.time()
        freezes = args.freeze_codes and state.global_step == self.trainer.freeze_at(state.max_steps)
        self.compiles = first or freezes
        if first:
            seconds = self.began - interrupt.STARTED - self.trainer.aside
            self.trainer.first_step["seconds_to_first_step"] = round(seconds, 1)

    def on_step_end(self, args, state, control, **kwargs):
        if self.compiles:
            took = time.time() - self.began
            self.trainer.compiling.append(took)
            self.trainer.first_step.setdefault("seconds_of_first_step", round(took, 1))


class _Freeze(transformers.TrainerCallback):
    """Has the codes voted on and freezes them when it is time, in a resumed run too."""

    def __init__(self, trainer: FluxQATTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if args.freeze_codes and state.global_step >= self.trainer.freeze_at(state.max_steps):
            if self.trainer.votes.steps:
                changed = self.trainer.votes.decide(named_layers(self.trainer.model))
                log.info("step %d: %.2f %% of the codes are frozen by majority", state.global_step, 100 * changed)
            for layer in quantized_layers(self.trainer.model):
                if layer.frozen is None:
                    layer.freeze_codes(full(layer.weight_clip_val.detach()).clone())

    def on_step_end(self, args, state, control, **kwargs):
        end = self.trainer.freeze_at(state.max_steps)
        if args.vote_codes and end - round(args.vote_codes * state.max_steps) < state.global_step <= end:
            self.trainer.votes.count(named_layers(self.trainer.model))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """What the frozen codes are found from has to stay where it is: momentum and decay would move it on."""
        for layer in quantized_layers(self.trainer.model):
            if layer.frozen is not None:
                for name in ("weight", "lora_A", "lora_B"):
                    if getattr(layer, name, None) is not None:
                        getattr(layer, name).grad = None


class _TensorBoard(TensorBoardCallback):
    """transformers' own would write down the model's config, which in diffusers is of another kind."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs | {"model": None})


# ------------------------------------------------------------------------------------------------ parts of the trainer


def quantized_layers(model: nn.Module) -> list[QuantizeLinear]:
    """The layers that hold weights and step sizes, with a LoRA inside the quantizer or without."""
    return list(named_layers(model).values())


def named_layers(model: nn.Module) -> dict[str, QuantizeLinear]:
    """The quantized layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizeLinear)}


def record_features(transformer: QuantizedTransformer) -> dict[int, Tensor]:
    """A dict that, after every forward pass, holds the image tokens [B, L, D] that each block put out."""
    features: dict[int, Tensor] = {}
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def keep(i: int, output: Tensor | tuple[Tensor, Tensor]) -> None:
        """Text and image apart or, in FLUX.2's single blocks, as one."""
        features[i] = output[1] if isinstance(output, tuple) else output[:, -features[0].shape[1] :]

    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda _, __, output, i=i: keep(i, output))
    return features


def feature_error(student: dict[int, Tensor], teacher: dict[int, Tensor]) -> Tensor:
    """Normalized mean squared error of the blocks' outputs, averaged over the blocks."""
    errors = [
        F.mse_loss(student[i].float(), target.float()) / target.float().square().mean() for i, target in teacher.items()
    ]
    return torch.stack(errors).mean()


@torch.no_grad()
def first_non_finite(model: nn.Module | None, inputs: dict[str, Tensor]) -> str | None:
    """The first input, parameter or module output, in the order of computation, that holds NaN or inf."""
    for name, tensor in inputs.items():
        if not tensor.isfinite().all():
            return f"the input {name}"
    if model is None:
        return None
    found: list[str] = []

    def look(name: str) -> Callable:
        def hook(module, args, output):
            tensors = [*module.parameters(recurse=False)]
            tensors += [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor)]
            if not found and not all(t.isfinite().all() for t in tensors):
                found.append(name)

        return hook

    leaves = [(name, m) for name, m in model.named_modules() if not any(True for _ in m.children())]
    hooks = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        model(**split_batch(inputs)[0])
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def make_schedule(
    args, kind: transformers.SchedulerType, steps: int, warmup: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule of that many steps, of no parameters; ValueError if it is to run twice and cannot."""
    nothing = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)  # least rates are taken as shares of this one
    schedule = transformers.get_scheduler(kind, nothing, warmup, max(1, steps), args.lr_scheduler_kwargs)
    if args.freeze_codes and not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        raise ValueError(f"--lr_scheduler_type {kind.value} cannot run twice: choose another, or --freeze_codes 0")
    return schedule


def check_schedule(args) -> None:
    """ValueError unless the flags make a schedule."""
    try:
        make_schedule(args, args.lr_scheduler_type, 1000, 0)
    except (TypeError, ZeroDivisionError) as error:
        kind = args.lr_scheduler_type.value
        raise ValueError(f"--lr_scheduler_type {kind} with these --lr_scheduler_kwargs: {error}") from None


def check_fsdp(args, lora_r: int) -> None:
    """ValueError on what cannot be spread by FSDP2."""
    if args.fsdp_config.get("version", 2) != 2:
        raise ValueError("--fsdp: version 1 keeps flat copies of the weights; use version 2, the default")
    if args.fsdp_config.get("cpu_offload"):
        raise ValueError("--fsdp: weights stay on the GPUs here; leave out offload and cpu_offload")
    if args.fsdp_config.get("activation_checkpointing"):
        raise ValueError("--fsdp_config: blocks are checkpointed by --gradient_checkpointing True, not by FSDP")
    if args.device.type in NOT_SPREAD:
        raise ValueError(f"--fsdp: accelerate spreads weights over GPUs, not over a {args.device.type}: leave it out")
    if args.world_size == 1:
        raise ValueError("--fsdp spreads the weights over several processes, and this is one: leave it out")
    if args.optim.value not in FSDP_OPTIMIZERS:
        raise ValueError(f"--optim {args.optim.value} cannot be spread by --fsdp: use {' or '.join(FSDP_OPTIMIZERS)}")
    for name in ("visit_share", "vote_codes"):
        if getattr(args, name):
            raise ValueError(f"--{name} is for weights that are whole on every GPU: leave out --fsdp or --{name}")
    if lora_r:
        raise ValueError("--fsdp spreads what is trained, and of a LoRA that is little: leave out --fsdp or --lora_r")


def prepare_fsdp(accelerator, model: nn.Module) -> None:
    """Set what FSDP2 needs here, and spread the blocks; what lies between them accelerate spreads when training starts.

    accelerate would hold all whole weights until the last block is spread: 67 GiB of a GPU instead of 45 for FLUX.1-dev
    on two, and holes in its memory.
    """
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = None  # nothing is left to it, and the classes that it looks for have other names then
    # Weights travel in fp32, and autocast computes in bf16: rounded before, they would get other codes than the saved.
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    # Else every GPU would hold whole gradients until the last micro-batch.
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        fully_shard(block, mp_policy=plugin.mixed_precision_policy, reshard_after_forward=plugin.reshard_after_forward)
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()


def reshard(model: nn.Module) -> None:
    """Let every rank hold its share alone, as it does between steps, after an evaluation too."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor that FSDP2 has spread, else the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, or whole moments in 8 bits, spread over the ranks as `like` is, if that is.

    Of a tensor on the CPU only this rank's share comes to the device: freed whole tensors would leave holes in its
    memory that fit nothing later.
    """
    if not isinstance(like, DTensor):
        return value
    if not is_traceable_wrapper_subclass(value):
        return _spread(_own(value, like), like)
    parts, context = value.__tensor_flatten__()
    codes, scale, *rest = (getattr(value, name) for name in parts)
    if codes.ndim != 2 or scale.numel() % len(codes):  # blocks go on from row to row
        return share(value.dequantize(), like)
    codes, scale = _own(codes, like), _own(scale.view(len(codes), -1), like)
    if codes.numel():
        rest = [part.to(like.device) for part in rest]
        own = type(value).__tensor_unflatten__(dict(zip(parts, (codes, scale.flatten(), *rest), strict=True)), context)
    else:
        own = torch.zeros_like(local(like))
    return _spread(own, like)


def _own(value: Tensor, like: DTensor) -> Tensor:
    """This rank's share of a whole tensor, on its device and with memory of its own."""
    shape, offset = compute_local_shape_and_global_offset(value.shape, like.device_mesh, like.placements)
    part = value[tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))]
    return torch.empty(part.shape, dtype=part.dtype, device=like.device).copy_(part)


def _spread(own: Tensor, like: DTensor, shape: Sequence[int] | None = None) -> DTensor:
    """The shares of all ranks as one tensor, spread as `like` is."""
    shape = like.shape if shape is None else shape
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )  # fmt: skip


def spread_moments(value: DTensor) -> DTensor | dict[str, Tensor]:
    """Moments that FSDP2 has spread, gathered when they are written: torchao's in 8 bits as codes and scales [rows,
    blocks a row] where all blocks lie within rows, else in full precision."""
    own = value.to_local()
    in_bits = is_traceable_wrapper_subclass(own)
    fits = not own.numel() or (in_bits and value.ndim == 2 and value.shape[1] % own.block_size == 0)
    facts = torch.tensor([int(fits), -int(in_bits), -own.block_size if in_bits else 0], device=value.device)
    torch.distributed.all_reduce(facts, torch.distributed.ReduceOp.MIN, value.device_mesh.get_group())
    all_fit, nobody, block = bool(facts[0]), not facts[1], -int(facts[2])
    if nobody:
        return value
    if not all_fit:
        return _spread(own.dequantize() if in_bits else own, value)
    blocks = value.shape[1] // block
    codes, scale = (own.codes, own.scale.view(-1, blocks)) if in_bits else (own.byte(), own.new_empty(0, blocks))
    parts = {"codes": _spread(codes, value), "scale": _spread(scale, value, (len(value), blocks))}
    return parts | {"qmap": own.qmap} if in_bits else parts


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    """Its state as tensors "optimizer.INDEX.NAME" and the rest, JSON-able.

    Quantized moments are tensors made of tensors (torchao) or dicts of tensors (bitsandbytes): their parts are kept,
    and of the former what puts them together.
    """
    tensors, others = {}, {"numbers": {}, "wrapped": {}}

    def keep(key: str, value) -> None:
        own = local(value) if isinstance(value, Tensor) else value
        if isinstance(own, Tensor) and is_traceable_wrapper_subclass(own):
            parts, context = own.__tensor_flatten__()
            others["wrapped"][key] = [type(own).__name__, *map(_plain, context)]
            value = {name: getattr(own, name) for name in parts} if own is value else spread_moments(value)
            if isinstance(value, Tensor):
                del others["wrapped"][key]
        elif isinstance(value, DTensor):
            value = spread_moments(value)
        if isinstance(value, dict):
            for name, part in value.items():
                keep(f"{key}.{name}", part)
        elif isinstance(value, Tensor):
            tensors[f"optimizer.{key}"] = value
        else:
            others["numbers"][key] = value

    state = optimizer.state_dict()
    for index, entries in state["state"].items():
        keep(str(index), entries)
    others["groups"] = [
        {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        for group in state["param_groups"]
    ]
    return tensors, others


def _plain(value):
    """A dtype by its name, a size as a list, anything else as it is."""
    if isinstance(value, torch.dtype):
        return str(value)
    return list(value) if isinstance(value, torch.Size | tuple) else value


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Shards, others: dict) -> None:
    """Put back what optimizer_state took out, a parameter at a time: whole moments of all would fill the host."""
    names = [name.removeprefix("optimizer.") for name in tensors if name.startswith("optimizer.")]
    keys: dict[str, list[str]] = {}
    for key in (*names, *others["numbers"]):
        keys.setdefault(key.split(".")[0], []).append(key)
    parameters, state = [p for group in optimizer.param_groups for p in group["params"]], {}
    for index, owned in keys.items():
        entries: dict = {}
        for key in owned:
            _, *path, last = key.split(".")
            place = entries
            for name in path:
                place = place.setdefault(name, {})
            place[last] = others["numbers"][key] if key in others["numbers"] else tensors[f"optimizer.{key}"]
        for name, value in entries.items():
            if f"{index}.{name}" in others["wrapped"]:
                kind, *context = others["wrapped"][f"{index}.{name}"]
                context = [getattr(torch, c[6:]) if str(c).startswith("torch.") else c for c in context]
                value["scale"] = value["scale"].flatten()
                value = _quantized_state(kind).__tensor_unflatten__(value, context)
            if isinstance(value, Tensor) and value.shape == parameters[int(index)].shape:
                value = share(value, parameters[int(index)])
            entries[name] = value
        state[int(index)] = entries
    fresh = optimizer.state_dict()["param_groups"]
    groups = [new | old for new, old in zip(fresh, others["groups"], strict=True)]
    for group, new in zip(groups, fresh, strict=True):
        for name, value in new.items():
            if isinstance(value, Tensor):  # torchao keeps the learning rate as one
                group[name] = torch.full_like(value, group[name])
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _quantized_state(kind: str) -> type:
    """torchao's class of quantized moments of that name; ValueError if there is none."""
    try:
        for module in ("subclass_8bit", "subclass_4bit", "subclass_fp8"):
            found = getattr(importlib.import_module(f"torchao.optim.{module}"), kind, None)
            if found is not None:
                return found
    except ImportError as error:
        raise ValueError(f"the checkpoint's optimizer is torchao's, which cannot be imported ({error})") from None
    raise ValueError(f"the checkpoint's optimizer keeps {kind}, which this torchao does not have; install another")


def moment_bytes(optim: str) -> float:
    """Bytes of moments a trained parameter, of the optimizer that Trainer calls `optim`; Adam's, if it is another."""
    for name, size in (("adafactor", 0.1), ("sgd", 4), ("4bit", 1.2), ("8bit", 2.1), ("lion", 4)):
        if name in optim:
            return size
    return 8


def rotate(folder: Path, limit: int | None, newest: int) -> None:
    """Remove all but `limit` checkpoints, those of steps beyond `newest` first: a run that went on from an earlier one
    has left them behind. Then those of the lowest steps; what this program did not write stays."""
    steps = {p: int(p.name[11:]) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()}
    for checkpoint in sorted(steps, key=lambda p: (steps[p] <= newest, steps[p]))[: -limit if (limit or 0) > 0 else 0]:
        try:
            remove_folder(checkpoint)
        except ValueError as error:
            log.info("not removed: %s", error)


# -------------------------------------------------------------------------------------------------------- pictures


def read_metrics(folder: Path) -> list[dict]:
    """The lines of folder/metrics.jsonl."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def restore_pictures(folder: Path, step: int, prompts: list[str]) -> None:
    """Remove what an earlier run left in OUTPUT_DIR/eval: pictures of steps after `step`, all of them if they are of
    other prompts."""
    file = folder / "prompts.json"
    with suppress(ValueError):
        if read_json(file) != {"prompts": prompts}:
            step = -1
    for path in folder.glob("step[_-]*"):
        number = path.stem[5:]
        if number.isdigit() and int(number) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(file, {"prompts": prompts})


def restore_metrics(folder: Path, checkpoint: Path | None) -> None:
    """metrics.jsonl as it was when `checkpoint` was written; without one, as a new run finds it."""
    state = {"log_history": []} if checkpoint is None else json.loads((checkpoint / "trainer_state.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in state["log_history"]))


def save_curves(folder: Path) -> None:
    """folder/curves.png: training loss, held-out NMSE, PSNR and scene score over the steps."""
    lines = read_metrics(folder)
    panels = [("loss", "loss", True), ("eval_nmse", "held-out velocity NMSE", True), ("eval_psnr", "PSNR, dB", False)]
    if any("eval_scene_score" in line for line in lines):
        panels.append(("eval_scene_score", "scene score", False))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for axis, (name, title, logarithmic) in zip(axes, panels, strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True) if points else ([], []), marker="" if name == "loss" else "o")
        if name == "eval_nmse":
            for third in THIRDS:
                points = [(line["step"], line[f"eval_nmse_{third}"]) for line in lines if f"eval_nmse_{third}" in line]
                if points:
                    axis.plot(*zip(*points, strict=True), label=third, linewidth=0.8)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(title="third of the steps", fontsize="small")
        if name == "eval_scene_score" and points:
            teacher = next(line["eval_scene_score_teacher"] for line in lines if "eval_scene_score" in line)
            axis.axhline(teacher, color="gray", linestyle=":")
        axis.set(title=title, xlabel="step", yscale="log" if logarithmic else "linear")
        axis.grid(alpha=0.3)
    figure.savefig(folder / "curves.png", dpi=110)
    pyplot.close(figure)
