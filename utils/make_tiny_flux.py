"""Train assets/tiny-flux: a complete FluxPipeline in miniature, from scratch, on drawn scenes.

    python -m utils.make_tiny_flux --output assets/tiny-flux        # one GPU, well under an hour
    python -m utils.make_tiny_flux --width 512 --examples 800000 --batch_size 256 --widened_steps 8000  # from it, wider

Five stages, each resumed where an earlier call left off:

1. text         tokenizers from the words of the prompts; CLIP and T5 learn to read: from CLIP's pooled vector, and
                from every single T5 token, a linear probe must tell the whole scene.
2. autoencoder  AutoencoderKL, 8x, 16 channels: L1 + MSE + a little KL.
3. transformer  rectified flow (arXiv 2209.03003): z_t = (1 - t) z + t noise, target noise - z, with t = 2u / (1 + u),
                u = sigmoid(normal), and one prompt in ten left empty.
4. guidance     guidance distillation (arXiv 2210.03142, as FLUX.1-dev): the student sees a guidance scale g and
                learns v_empty + g (v_prompt - v_empty) of the model of stage 3 in one forward pass.
5. score        the scene score on the evaluation prompts, written into the model card.

A wider one keeps text encoders and autoencoder. Its transformer starts as the narrow one's function (utils/widen.py),
and one stage replaces 3 and 4: trained on noise - z + v(g) - v(1), it learns the data at guidance g at once, v being
the narrow model, which stays as it is. What guidance adds is not v_prompt - v_empty: the narrow model has not seen the
empty prompt since stage 4, and its answer to it is far off.

The architecture is FLUX.1-dev's with small numbers; every part is diffusers' or transformers' own class.
"""

import utils.interrupt  # noqa: F401 (Ctrl-C is a line from here on)

import argparse
import copy
import json
import math
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from utils import scenes
from utils.folders import whole_folder, write_json
from utils.metrics import psnr, scene_score
from utils.sampling import generate_images
from utils.tokenizers import TEXT_LENGTH, make_tokenizers
from utils.utils import ArgumentParser, device_name, from_root, pick_device, run_script
from utils.widen import check_width, copies_differ, widen, width_of

# Counting, binding and above all relations are learned last: they are drawn more often.
CATEGORY_SHARE = {"single_object": 1, "two_object": 1, "counting": 2, "colors": 1, "position": 3, "color_attr": 2}
# What a reader must tell of a scene, with the number of answers. A thing is a pair of shape and colour, so that the
# two are bound already in the text. Of two related things the left or the upper one counts as the first, and each
# side is asked for: the transformer need not work out that "A left of B" is "B right of A". (With word order and
# relation told separately, it got the axis right and drew half of the related pairs the wrong way round.)
THINGS = len(scenes.SHAPES) * (len(scenes.COLORS) + 1)
PROBES = {
    "first": THINGS,
    "second": THINGS + 1,
    "count": scenes.MAX_THINGS,
    "tone": len(scenes.TONES) + 1,
    **{side: len(scenes.SHAPES) + 1 for side in scenes.RELATIONS},
}
EMPTY_PROMPT_SHARE = 0.1
GUIDANCE_RANGE = (1.0, 5.0)
KL_WEIGHT = 4e-3
UNSEEN = 8192  # scenes by whose loss a wider one is judged, too
WIDENED_BY = ("width", "examples", "batch_size", "widened_steps", "widened_rate")  # flags that its card names
EMA_DECAY = 0.999


# ------------------------------------------------------------------------------------------------------- data


def scene_answers(scene: scenes.Scene) -> list[int]:
    """The right answer to each of PROBES; in all but the first, 0 stands for "none" or "not said"."""
    colors, tones = list(scenes.COLORS), list(scenes.TONES)

    def number(thing: scenes.Thing) -> int:
        shape, color = thing
        return scenes.SHAPES.index(shape) * (len(colors) + 1) + (1 + colors.index(color) if color else 0)

    things = list(scene.things) if scene.category != "counting" else [scene.things[0]]
    sides = dict.fromkeys(scenes.RELATIONS, 0)
    if scene.relation:
        if scene.relation in ("right", "below"):
            things.reverse()
        ends = ("left", "right") if scene.relation in ("left", "right") else ("above", "below")
        sides |= {end: 1 + scenes.SHAPES.index(shape) for end, (shape, _) in zip(ends, things, strict=True)}
    return [
        number(things[0]),
        1 + number(things[1]) if len(things) == 2 else 0,
        len(scene.things) - 1,
        1 + tones.index(scene.tone) if scene.tone else 0,
        *sides.values(),
    ]


def draw_examples(seeds: range) -> tuple[list[str], list[list[int]], list[list[float]]]:
    """For each seed a training prompt, its answers and its layout."""
    categories = [name for name, share in CATEGORY_SHARE.items() for _ in range(share)]
    prompts, answers, layouts = [], [], []
    for seed in seeds:
        rng = random.Random(seed)
        prompt = scenes.sample_prompt(scenes.pick(rng, categories), rng)
        scene = scenes.parse(prompt)
        prompts.append(prompt)
        answers.append(scene_answers(scene))
        layouts.append(scenes.layout(scene, rng))
    return prompts, answers, layouts


def make_examples(count: int, seed: int) -> tuple[list[str], Tensor, Tensor]:
    """`count` prompts, their answers [count, len(PROBES)] and layouts [count, 30], on all cores; the same on any."""
    chunks = [range(start, min(start + 4096, count)) for start in range(0, count, 4096)]
    base = seed * 1_000_000_007  # seeds of different runs do not overlap
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(draw_examples, [range(base + c.start, base + c.stop) for c in chunks]))
    prompts, answers, layouts = (list(chain.from_iterable(part[i] for part in parts)) for i in range(3))
    return prompts, torch.tensor(answers), torch.tensor(layouts)


def note(args: argparse.Namespace, **figures: float | str) -> dict[str, float | str]:
    """Add `figures` to work_dir/figures.json and return all that stand there."""
    file = args.work_dir / "figures.json"
    figures = (json.loads(file.read_text()) if file.exists() else {}) | figures
    file.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


# ------------------------------------------------------------------------------------------------- the trainer


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, flat to 60 % of the steps, linear decay to 2 % of the peak."""
    warmup = min(500, steps // 10 + 1)
    decay = 1 - 0.98 * max(0.0, step / steps - 0.6) / 0.4
    return peak * min((step + 1) / warmup, decay)


def fit(
    name: str,
    model: nn.Module,
    loss_fn: Callable[[], Tensor],
    steps: int,
    lr: float,
    args: argparse.Namespace,
    *,
    cuda_graph: bool = True,
    report: Callable[[int], None] | None = None,
) -> None:
    """Train `model` on `loss_fn()`, a function that draws its own batch, and leave its averaged weights in it.

    AdamW(0.9, 0.95), gradients clipped to norm 1, exponential moving average of the weights. The whole state is
    written to work_dir/name.safetensors every few thousand steps and taken up from there. On CUDA the step is
    replayed as one CUDA graph. `report(step)` is called, with the averaged weights in the model, now and then.
    """
    device = torch.device(args.device)
    params = [p for p in model.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in params]
    # Tensors, because a CUDA graph replays numbers as they were when it was captured.
    rate, fresh = torch.tensor(lr, device=device), torch.tensor(1.0, device=device)
    optimizer = torch.optim.AdamW(
        params, lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True, capturable=device.type == "cuda"
    )
    for p in params:  # create the moments now: a resumed run copies into them
        optimizer.state[p] = {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }

    state_file, first, spent = args.work_dir / f"{name}.safetensors", 0, 0.0
    moments = [[optimizer.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq")]
    groups = {"weight": params, "average": average, "exp_avg": moments[0], "exp_avg_sq": moments[1]}

    def save_state(step: int) -> None:
        tensors = {
            f"{kind}.{i}": t.detach().contiguous() for kind, group in groups.items() for i, t in enumerate(group)
        }
        partial = state_file.with_name(state_file.name + ".tmp")
        seconds = torch.tensor(spent + time.time() - started)
        save_file(tensors | {"step": torch.tensor(step), "seconds": seconds}, partial)
        partial.rename(state_file)

    if state_file.exists():
        state = load_file(state_file, device=str(device))
        first, spent = int(state["step"]), float(state["seconds"])
        with torch.no_grad():
            for kind, group in groups.items():
                for i, tensor in enumerate(group):
                    tensor.copy_(state[f"{kind}.{i}"])
        for p in params:
            optimizer.state[p]["step"].fill_(first)
        print(f"{name}: going on from step {first}")
    torch.manual_seed(args.seed + first)
    started = time.time()

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimizer.step()
        with torch.no_grad():
            change = torch._foreach_sub(params, average)
            torch._foreach_mul_(change, fresh)
            torch._foreach_add_(average, change)
        return loss.detach()

    def swap_weights() -> None:
        with torch.no_grad():
            for p, a in zip(params, average, strict=True):
                kept = p.detach().clone()
                p.copy_(a)
                a.copy_(kept)

    graph, bar = None, tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=1.0)
    side = torch.cuda.Stream() if device.type == "cuda" else None
    for i in bar:
        rate.fill_(learning_rate(i, steps, lr))
        fresh.fill_(max(1 - EMA_DECAY, 9 / (10 + i)))  # share of the new weights; the first steps are soon forgotten
        if side is None or not cuda_graph:
            loss = step()
        elif i < first + 5:  # compile and warm up on a side stream before the capture
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                loss = step()
            torch.cuda.current_stream().wait_stream(side)
        else:
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    loss = step()
            graph.replay()
        if i % 100 == 0 or i == steps - 1:
            value = loss.item()
            bar.set_postfix(loss=f"{value:.4f}")
            if not math.isfinite(value):
                raise ValueError(f"{name}: the loss is {value} at step {i}; the last good state is {state_file}")
        if (i + 1) % args.save_every == 0 and i + 1 < steps:
            save_state(i + 1)
            if report is not None:
                swap_weights()
                report(i + 1)
                swap_weights()
    swap_weights()
    note(args, **{f"{name}_on": device_name(device), f"{name}_seconds": round(spent + time.time() - started, 1)})


# ------------------------------------------------------------------------------------------------------ stages


def stage(name: str, args: argparse.Namespace, make: Callable[[Path], None]) -> Path:
    """The folder of a finished stage; unless an earlier call finished it, make(folder) fills it now."""
    folder = args.work_dir / name
    if not folder.exists():
        started = time.time()
        with whole_folder(folder) as partial:
            make(partial)
        print(f"{name}: done in {time.time() - started:.0f} s")
    return folder


def tokenize(tokenizer, prompts: list[str]) -> Tensor:
    """Token ids [len(prompts), TEXT_LENGTH], as FluxPipeline makes them."""
    return tokenizer(
        prompts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


class Text:
    """The text side of the pipeline: both tokenizers and encoders."""

    def __init__(self, folder: Path, device: torch.device):
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.tokenizer_2 = transformers.T5Tokenizer.from_pretrained(folder / "tokenizer_2")
        self.text_encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").to(device)
        self.text_encoder_2 = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder_2").to(device)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """T5 embeddings [N, TEXT_LENGTH, D] and CLIP's pooled vectors [N, D], in bfloat16 on the encoders' device."""
        device, embeds, pooled = self.text_encoder.device, [], []
        for start in range(0, len(prompts), 8192):
            batch = prompts[start : start + 8192]
            embeds.append(self.text_encoder_2(tokenize(self.tokenizer_2, batch).to(device))[0].bfloat16())
            pooled.append(self.text_encoder(tokenize(self.tokenizer, batch).to(device)).pooler_output.bfloat16())
        return torch.cat(embeds), torch.cat(pooled)


def make_text(folder: Path, args: argparse.Namespace, prompts: list[str], answers: Tensor) -> None:
    """Stage 1: train the tokenizers, CLIP and T5 and save them in the pipeline's layout."""
    clip_tokenizer, t5_tokenizer = make_tokenizers(prompts[:20000])
    clip = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(clip_tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=TEXT_LENGTH, projection_dim=128,
            bos_token_id=clip_tokenizer.bos_token_id, eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )  # fmt: skip
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(t5_tokenizer), d_model=128, d_kv=32, d_ff=512, num_layers=3, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False, tie_word_embeddings=False,
        )
    )  # fmt: skip
    count = sum(PROBES.values())
    model = nn.ModuleDict(
        {"clip": clip, "t5": t5, "clip_probe": nn.Linear(128, count), "t5_probe": nn.Linear(128, count)}
    )
    model.to(args.device)
    clip_ids, t5_ids = (tokenize(t, prompts).to(args.device) for t in (clip_tokenizer, t5_tokenizer))
    answers = answers.to(args.device)

    def probe_loss(logits: Tensor, answer: Tensor) -> Tensor:
        return sum(
            F.cross_entropy(part, answer[:, i]) for i, part in enumerate(logits.split(list(PROBES.values()), dim=-1))
        )

    def loss_fn() -> Tensor:
        rows = torch.randint(len(prompts), (args.batch_size,), device=args.device)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            pooled = model["clip_probe"](clip(clip_ids[rows]).pooler_output).float()
            tokens = model["t5_probe"](t5(t5_ids[rows])[0]).float()
        every_token = answers[rows].repeat_interleave(TEXT_LENGTH, dim=0)
        return probe_loss(pooled, answers[rows]) + probe_loss(tokens.flatten(0, 1), every_token)

    fit("text", model, loss_fn, args.text_steps, 1e-3, args, cuda_graph=False)
    with torch.no_grad():
        unseen = scenes.eval_prompts()
        truth = torch.tensor([scene_answers(scenes.parse(prompt)) for prompt in unseen]).to(args.device)
        ids, ids_2 = (tokenize(t, unseen).to(args.device) for t in (clip_tokenizer, t5_tokenizer))
        readings = {
            "clip_reads": model["clip_probe"](clip(ids).pooler_output),
            "t5_reads": model["t5_probe"](t5(ids_2)[0][:, 0]),
        }
        for name, logits in readings.items():
            answer = torch.stack([part.argmax(-1) for part in logits.split(list(PROBES.values()), dim=-1)], dim=1)
            note(args, **{name: (answer == truth).all(1).float().mean().item()})
    for name, part in {
        "tokenizer": clip_tokenizer, "tokenizer_2": t5_tokenizer, "text_encoder": clip, "text_encoder_2": t5
    }.items():  # fmt: skip
        part.save_pretrained(folder / name)


def make_autoencoder(folder: Path, args: argparse.Namespace, layouts: Tensor) -> None:
    """Stage 2: train AutoencoderKL on drawn pictures and set its scaling to unit variance."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 96, 128),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=scenes.SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).to(args.device, memory_format=torch.channels_last)
    pictures = draw_pictures(layouts[: args.autoencoder_pictures], args.device)

    def loss_fn() -> Tensor:
        rows = torch.randint(len(pictures), (args.autoencoder_batch_size,), device=args.device)
        target = (pictures[rows].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            decoded = vae.decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean)).sample.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return F.l1_loss(decoded, target) + F.mse_loss(decoded, target) + KL_WEIGHT * kl

    fit("autoencoder", vae, loss_fn, args.autoencoder_steps, 1e-3, args)
    latents = encode_pictures(vae, layouts[:8192], args.device)
    with torch.no_grad():
        unseen = scenes.eval_prompts(min(256, args.autoencoder_pictures))
        fresh = scenes.render(unseen, range(len(unseen)), args.device)
        decoded = vae.decode(vae.encode(fresh * 2 - 1).latent_dist.mean).sample / 2 + 0.5
        note(args, autoencoder_psnr=psnr(decoded.clamp(0, 1), fresh))
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    vae.to(memory_format=torch.contiguous_format).save_pretrained(folder)


def draw_pictures(layouts: Tensor, device: str) -> Tensor:
    """Pictures [N, 3, SIZE, SIZE] as uint8 on `device`."""
    return torch.cat([(scenes.rasterize(part.to(device)) * 255).round().byte() for part in layouts.split(512)])


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, layouts: Tensor, device: str) -> Tensor:
    """Latents [N, 16, 16, 16] (posterior means, not normalized) of the pictures drawn from `layouts`."""
    latents = []
    for part in tqdm(layouts.split(1024), desc="encode", mininterval=1.0, leave=False):
        pictures = (scenes.rasterize(part.to(device)) * 2 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            latents.append(vae.encode(pictures).latent_dist.mean.float())
    return torch.cat(latents)


class Latents:
    """The training set of stages 3 and 4 on the device: packed latents and text embeddings."""

    def __init__(self, vae: AutoencoderKL, text: Text, prompts: list[str], layouts: Tensor, args: argparse.Namespace):
        raw = encode_pictures(vae.to(memory_format=torch.channels_last), layouts, args.device)
        raw = (raw - vae.config.shift_factor) * vae.config.scaling_factor
        count, channels, height, width = raw.shape
        self.latents = FluxPipeline._pack_latents(raw, count, channels, height, width).bfloat16()
        self.embeds, self.pooled = text.encode(prompts)
        self.no_embeds, self.no_pooled = text.encode([""])
        self.ids = {
            "img_ids": FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, args.device, torch.float32),
            "txt_ids": torch.zeros(TEXT_LENGTH, 3, device=args.device),
        }
        self.batch_size, self.device = args.batch_size, args.device

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Noised latents z_t [B, L, C], velocity [B, L, C], timestep [B], T5 embeddings and pooled vectors."""
        rows = torch.randint(len(self.latents), (self.batch_size,), device=self.device)
        clean = self.latents[rows].float()
        u = torch.sigmoid(torch.randn(self.batch_size, device=self.device))
        timestep = 2 * u / (1 + u)
        noise, t = torch.randn_like(clean), timestep.view(-1, 1, 1)
        return (1 - t) * clean + t * noise, noise - clean, timestep, self.embeds[rows], self.pooled[rows]


def velocity(transformer: FluxTransformer2DModel, data: Latents, noised, timestep, embeds, pooled, guidance) -> Tensor:
    """The transformer's velocity [B, L, C] in float32, computed under bfloat16 autocast."""
    with torch.autocast(noised.device.type, torch.bfloat16):
        return transformer(
            hidden_states=noised, timestep=timestep, encoder_hidden_states=embeds, pooled_projections=pooled,
            guidance=guidance, return_dict=False, **data.ids,
        )[0].float()  # fmt: skip


def make_transformer(folder: Path, args: argparse.Namespace, data: Latents, report: Callable) -> None:
    """Stage 3: rectified flow from scratch. It sees guidance 1, the scale at which guidance changes nothing."""
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    ).to(args.device)
    zero_modulation(transformer)
    compile_blocks(transformer)
    guidance = torch.ones(args.batch_size, device=args.device)

    def loss_fn() -> Tensor:
        noised, target, timestep, embeds, pooled = data.batch()
        empty = torch.rand(args.batch_size, device=args.device) < EMPTY_PROMPT_SHARE
        embeds = torch.where(empty.view(-1, 1, 1), data.no_embeds, embeds)
        pooled = torch.where(empty.view(-1, 1), data.no_pooled, pooled)
        return F.mse_loss(velocity(transformer, data, noised, timestep, embeds, pooled, guidance), target)

    fit("flow", transformer, loss_fn, args.flow_steps, 1.2e-3, args, report=lambda i: report(transformer, i, 1.0))
    transformer.save_pretrained(folder)


def make_guided(folder: Path, args: argparse.Namespace, data: Latents, teacher_folder: Path, report: Callable) -> None:
    """Stage 4: distil classifier-free guidance of stage 3's model into the guidance embedding."""
    teacher = FluxTransformer2DModel.from_pretrained(teacher_folder).to(args.device).requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    compile_blocks(teacher)
    compile_blocks(student)

    def loss_fn() -> Tensor:
        noised, _, timestep, embeds, pooled = data.batch()
        scale = draw_guidance(args)
        told, free = told_and_free(teacher, data, noised, timestep, embeds, pooled)
        target = free + scale.view(-1, 1, 1) * (told - free)
        return F.mse_loss(velocity(student, data, noised, timestep, embeds, pooled, scale), target)

    fit("guidance", student, loss_fn, args.guidance_steps, 6e-4, args, report=lambda i: report(student, i, 3.5))
    student.save_pretrained(folder)


def draw_guidance(args: argparse.Namespace) -> Tensor:
    """Guidance scales [B]."""
    low, high = GUIDANCE_RANGE
    return low + (high - low) * torch.rand(args.batch_size, device=args.device)


@torch.no_grad()
def told_and_free(teacher: FluxTransformer2DModel, data: Latents, noised, timestep, embeds, pooled):
    """The teacher's velocities [B, L, C] at guidance 1 with the prompts and with the empty prompt."""
    both = velocity(
        teacher, data, noised.repeat(2, 1, 1), timestep.repeat(2),
        torch.cat([embeds, data.no_embeds.expand_as(embeds)]), torch.cat([pooled, data.no_pooled.expand_as(pooled)]),
        torch.ones(2 * len(noised), device=noised.device),
    )  # fmt: skip
    return both.chunk(2)


@torch.no_grad()
def guidance_adds(narrow: FluxTransformer2DModel, data: Latents, noised, timestep, embeds, pooled, scale) -> Tensor:
    """What guidance `scale` [B] changes in the velocity [B, L, C] of a guidance-distilled model."""
    both = velocity(
        narrow, data, noised.repeat(2, 1, 1), timestep.repeat(2), embeds.repeat(2, 1, 1), pooled.repeat(2, 1),
        torch.cat([scale, torch.ones_like(scale)]),
    )  # fmt: skip
    guided, plain = both.chunk(2)
    return guided - plain


def make_widened(
    folder: Path,
    args: argparse.Namespace,
    data: Latents,
    unseen: Latents,
    narrow: FluxTransformer2DModel,
    report: Callable,
) -> None:
    """Stages 3 and 4 of a wider model: it starts as the function of `narrow` and is trained on the data, guided.

    Its loss on `unseen` scenes tells what it has learnt from what it has learnt by heart.
    """
    old = width_of(narrow.config)
    wide = widen(narrow, args.width, args.seed).to(args.device)
    narrow = narrow.to(args.device).requires_grad_(False)
    compile_blocks(narrow)
    compile_blocks(wide)

    def loss_fn(data: Latents = data) -> Tensor:
        noised, target, timestep, embeds, pooled = data.batch()
        scale = draw_guidance(args)
        target = target + guidance_adds(narrow, data, noised, timestep, embeds, pooled, scale)
        return F.mse_loss(velocity(wide, data, noised, timestep, embeds, pooled, scale), target)

    def note_losses(when: str) -> None:
        seen, other = (held_loss(lambda part=part: loss_fn(part), args) for part in (data, unseen))
        note(args, **{f"loss_{when}": seen, f"unseen_loss_{when}": other})

    note_losses("as_widened")
    rate = args.widened_rate * old / args.width
    fit("widened", wide, loss_fn, args.widened_steps, rate, args, report=lambda i: report(wide, i, 3.5))
    note_losses("as_trained")
    note(args, copies_differ=drift(wide, data, args.width // old, old))
    wide.save_pretrained(folder)


@torch.no_grad()
def held_loss(loss_fn: Callable[[], Tensor], args: argparse.Namespace) -> float:
    """The mean of `loss_fn()` over a few batches, the same ones at every call."""
    device = torch.device(args.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(args.seed)
        return sum(loss_fn().item() for _ in range(8)) / 8


@torch.no_grad()
def drift(wide: FluxTransformer2DModel, data: Latents, copies: int, old: int) -> float:
    """copies_differ of the image tokens after the last block."""
    kept: list[Tensor] = []
    hook = wide.single_transformer_blocks[-1].register_forward_hook(lambda _, __, output: kept.append(output[1]))
    noised, _, timestep, embeds, pooled = data.batch()
    with torch.compiler.set_stance("force_eager"):
        velocity(wide, data, noised, timestep, embeds, pooled, torch.full_like(timestep, 3.5))
    hook.remove()
    return copies_differ(kept[0], copies, old)


def zero_modulation(transformer: FluxTransformer2DModel) -> None:
    """Start every block as the identity and the output at zero (adaLN-Zero, arXiv 2212.09748)."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and ("norm" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def compile_blocks(transformer: FluxTransformer2DModel) -> None:
    """Compile the two kinds of block on CUDA, where the saved time pays for it."""
    if transformer.device.type == "cuda":
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)  # two models: each its own sizes


# --------------------------------------------------------------------------------------------------- assembly


def make_pipeline(transformer: FluxTransformer2DModel, vae: AutoencoderKL, text: Text) -> FluxPipeline:
    """A FluxPipeline of the parts, with FLUX.1-dev's scheduler settings."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **vars(text))


def measure(pipe: FluxPipeline, prompts: list[str], guidance_scale: float) -> dict[str, float]:
    """Scene score of `prompts` at 28 steps."""
    on_cuda = pipe.device.type == "cuda"
    images = generate_images(
        pipe,
        prompts,
        guidance_scale=guidance_scale,
        batch_size=240 if on_cuda else 8,
        desc=None if on_cuda else f"guidance {guidance_scale}",
    )
    return scene_score(images, prompts)


def write_card(folder: Path, figures: dict) -> None:
    """README.md of the trained pipeline: what it is, how to use it, what was measured."""
    scores = figures["scene_score"]
    rows = [
        f"| {name} | " + " | ".join(f"{score[name]:.3f}" for score in scores.values()) + " |"
        for name in scores["3.5"]
        if name != "stderr"
    ]
    text = CARD.format(
        header=" | ".join(f"guidance {scale}" for scale in scores),
        rule=" | ".join("---" for _ in scores),
        rows="\n".join(rows),
        parts="\n".join(f"| {name} | {count:,} |" for name, count in figures["parameters"].items()),
        made=(WIDENED if "widened_seconds" in figures["training"] else MADE).format(**figures["training"]),
        **figures,
    )
    (folder / "README.md").write_text(text)


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# tiny-flux

A complete FLUX text-to-image pipeline in miniature, trained from scratch on drawn scenes: FLUX.1-dev's classes and
settings (double and single blocks, RoPE axes, guidance embedding, 16 latent channels, 8x autoencoder, dynamic
shifting) with small numbers. It draws 128x128 pictures of up to four shapes and follows its prompts, so that the
damage of quantization can be counted.

```python
from diffusers import FluxPipeline

pipe = FluxPipeline.from_pretrained("{path}")
pipe("a red star and a blue ring", height=128, width=128, max_sequence_length=24, num_inference_steps=28).images[0]
```

| part | parameters |
| --- | --- |
{parts}

## Measured

Scene score (share of pictures that fit their prompt) on {prompts} evaluation prompts, none of them seen in training,
28 steps, seeds {seed} to {last_seed}, float32, {device}, torch {torch}, diffusers {diffusers}; standard error of a
mean {stderr:.3f}.

| category | {header} |
| --- | {rule} |
{rows}

## Made by

```
{command}
```

{made} Figures as JSON: metrics.json.
"""
MADE = """Text encoders {text_seconds:.0f} s on {text_on}, autoencoder {autoencoder_seconds:.0f} s on \
{autoencoder_on}, rectified
flow {flow_seconds:.0f} s on {flow_on}, guidance distillation {guidance_seconds:.0f} s on {guidance_on}.
On unseen prompts a linear probe reads the whole scene from CLIP's vector {clip_reads:.1%} of the time, from T5's first
token {t5_reads:.1%}; the autoencoder's PSNR on unseen pictures is {autoencoder_psnr:.1f} dB."""
WIDENED = """Widened from {narrow} to {width} channels without changing what it computes, then trained for \
{widened_steps} steps of
batch {batch_size}: {widened_seconds:.0f} s on {widened_on}; loss on training scenes {loss_as_widened:.4f} before and
{loss_as_trained:.4f} after, on unseen ones {unseen_loss_as_widened:.4f} and {unseen_loss_as_trained:.4f}. \
{copies_differ:.1%} of the way from copied channels to independent ones."""


def make_output(folder: Path, args: argparse.Namespace, guided: Path, vae: AutoencoderKL, text: Text) -> float:
    """Stage 5: save the pipeline, measure it as it will be loaded, write metrics.json and the model card."""
    transformer = FluxTransformer2DModel.from_pretrained(guided, dtype=torch.bfloat16)
    for model in (transformer, vae):  # their configs would name the work folder
        model.register_to_config(_name_or_path=args.output.name)
    make_pipeline(transformer, vae.half(), text).save_pretrained(folder)
    pipe = FluxPipeline.from_pretrained(folder).to(args.device)
    prompts = scenes.eval_prompts(args.eval_prompts)
    scores = {str(scale): measure(pipe, prompts, scale) for scale in (1.0, 3.5)}
    figures = {
        "scene_score": scores,
        "stderr": scores["3.5"].get("stderr", math.nan),  # unknown with a picture a category
        "prompts": len(prompts),
        "seed": 42,
        "last_seed": 41 + len(prompts),
        "device": device_name(pipe.device),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "path": str(args.output),
        "command": "python -m utils.make_tiny_flux"
        + "".join(f" --{name} {getattr(args, name)}" for name in WIDENED_BY if args.width),
        "parameters": {
            name: sum(p.numel() for p in getattr(pipe, name).parameters())
            for name in ("transformer", "vae", "text_encoder", "text_encoder_2")
        },
        "training": note(args),
    }
    write_json(folder / "metrics.json", figures)
    write_card(folder, figures)
    return scores["3.5"]["mean"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of the finished pipeline; default: assets/tiny-flux, with "
                        "--width output/tiny-flux-WIDTH")  # fmt: skip
    parser.add_argument("--work_dir", type=Path, help="finished stages and states; default: output/make_tiny_flux, "
                        "with --width output/make_tiny_flux-WIDTH")  # fmt: skip
    parser.add_argument("--width", type=int, help="channels of a wider transformer, a multiple of the narrow one's")
    parser.add_argument("--narrow", default="assets/tiny-flux", help="with --width: the pipeline to start from")
    parser.add_argument("--device", help="default: cuda if there, else mps, else cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=400_000, help="drawn scenes to train on")
    parser.add_argument("--autoencoder_pictures", type=int, default=40_000, help="of these, for the autoencoder")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--autoencoder_batch_size", type=int, default=64)
    parser.add_argument("--text_steps", type=int, default=1500)
    parser.add_argument("--autoencoder_steps", type=int, default=2400)
    parser.add_argument("--flow_steps", type=int, default=26_000)
    parser.add_argument("--guidance_steps", type=int, default=6_000)
    parser.add_argument("--widened_steps", type=int, default=3000)
    parser.add_argument("--widened_rate", type=float, default=2e-4, help="learning rate, times the narrow model's "
                        "width over --width")  # fmt: skip
    parser.add_argument("--save_every", type=int, default=3000, help="steps between saved states and interim scores")
    parser.add_argument("--eval_prompts", type=int, default=1200, help="evaluation prompts for the final score")
    parser.add_argument("--until", choices=["text", "autoencoder", "flow", "guidance"], help="stop after this stage")
    args = parser.parse_args(argv)
    suffix = f"-{args.width}" if args.width else ""
    args.output = args.output or Path(f"output/tiny-flux{suffix}" if args.width else "assets/tiny-flux")
    args.work_dir = args.work_dir or Path(f"output/make_tiny_flux{suffix}")
    if args.width and args.until:
        parser.error("--until: with --width there is one stage, which cannot be stopped after")
    try:
        args.device = str(pick_device(args.device))
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails for these small shapes (torch 2.11, H100)
    torch.manual_seed(args.seed)
    if args.width:
        source = Path(from_root(args.narrow))
        narrow = FluxTransformer2DModel.from_pretrained(source / "transformer").float()
        check_width(args.width, narrow.config)
    started = time.time()
    prompts, answers, layouts = make_examples(args.examples, args.seed)
    print(f"{len(prompts)} scenes in {time.time() - started:.0f} s, e.g. {prompts[:3]}")

    device = torch.device(args.device)
    if args.width:
        text_folder, vae_folder = source, source / "vae"
    else:
        text_folder = stage("text", args, lambda folder: make_text(folder, args, prompts, answers))
        if args.until == "text":
            return
        vae_folder = stage("autoencoder", args, lambda folder: make_autoencoder(folder, args, layouts))
        if args.until == "autoencoder":
            return
    text = Text(text_folder, device)
    vae = AutoencoderKL.from_pretrained(vae_folder).float().to(device)
    data = Latents(vae, text, prompts, layouts, args)
    if args.width:
        prompts, _, layouts = make_examples(min(UNSEEN, args.examples), args.seed + 1)
        unseen = Latents(vae, text, prompts, layouts, args)
    vae.to(memory_format=torch.contiguous_format)

    def report(transformer: FluxTransformer2DModel, step: int, guidance_scale: float) -> None:
        plain = FluxTransformer2DModel.from_config(transformer.config)  # not compiled: other batch sizes, no gradient
        plain.load_state_dict(transformer.state_dict())
        prompts = scenes.eval_prompts(min(240, args.eval_prompts))
        score = measure(make_pipeline(plain.to(device), vae, text), prompts, guidance_scale)
        tqdm.write(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in score.items()))

    if args.width:
        note(args, narrow=args.narrow, width=args.width, widened_steps=args.widened_steps, batch_size=args.batch_size)
        guided = stage("widened", args, lambda folder: make_widened(folder, args, data, unseen, narrow, report))
    else:
        flow = stage("flow", args, lambda folder: make_transformer(folder, args, data, report))
        if args.until == "flow":
            return
        guided = stage("guidance", args, lambda folder: make_guided(folder, args, data, flow, report))
        if args.until == "guidance":
            return
    with whole_folder(args.output) as folder:
        score = make_output(folder, args, guided, vae, text)
    print(f"{args.output}: scene score at guidance 3.5: {score:.3f}")


if __name__ == "__main__":
    run_script(main)
