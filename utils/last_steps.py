"""What may change in the last steps of a training: the states that are trained on, and how codes come to rest.

Visited states. At a picture's steps the student sees what its own velocities led to, not the teacher's trajectory, and
small errors add up. So the student draws pictures of training prompts from their noise, and learns, at the states on
its own way, what the teacher's velocity is there (arXiv 1011.0686, DAgger).

Votes. Codes beside a threshold flip from step to step until the learning rate is zero. The mean of a code over many
steps, rounded, is where it was most of the time; that is the code to freeze.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from models.packing import PackedLinear, adopt_codes
from models.utils_quant import QuantizeLinear, quantize_codes
from utils.datautils import ShuffledSamples, Trajectories, collate
from utils.pipelines import steps_taken

SEED_STEP = 1_000_003  # between the seeds of one training's draws


class VisitedStates:
    """Samples on the student's own ways, drawn anew every `data.steps` training steps, after which as many samples
    have been taken as were drawn.

    Of the same shape and of the same steps as those of `sampler` over `data`. What is drawn depends on seed, step and
    rank alone: a resumed run draws the same if the interrupted one forgot() when its checkpoint was written.
    """

    def __init__(self, data: Trajectories, sampler: ShuffledSamples, seed: int, rank: int, size: int):
        """size: pictures drawn at a time, samples of a batch"""
        self.data, self.sampler, self.seed, self.rank, self.size = data, sampler, seed, rank, size
        self.drawn: dict[str, Tensor] | None = None
        self.begun = 0

    def forget(self) -> None:
        self.drawn = None

    def batch(
        self, step: int, student: nn.Module, teacher: nn.Module, device: torch.device,
        contexts: tuple[Callable[[], AbstractContextManager], Callable[[], AbstractContextManager]],
    ) -> dict[str, Tensor]:  # fmt: skip
        """A batch for training step `step`, as Trajectories' samples stacked, in fp32 on `device`; `contexts` make what
        student and teacher compute in."""
        if self.drawn is None or step - self.begun >= self.data.steps:
            self.generator = torch.Generator().manual_seed(self.seed + SEED_STEP * (step + 1) + self.rank)
            self.drawn, self.begun = self.draw(student, teacher, device, contexts), step
        rows = torch.randint(self.size, (self.size,), generator=self.generator).to(device)
        places = torch.rand(self.size, generator=self.generator, dtype=torch.float64) * self.data.steps
        steps = torch.bucketize(places, self.sampler.bounds, right=True).to(device)
        along = {name: self.drawn[name][steps, rows] for name in ("hidden_states", "velocity")}
        along["timestep"] = self.drawn["timestep"][steps]
        calls = steps % self.data.calls
        return {
            name: along[name] if name in along else tensor if name.endswith("_ids") else tensor[calls, rows]
            for name, tensor in self.drawn.items()
        }

    @torch.no_grad()
    def draw(self, student: nn.Module, teacher: nn.Module, device: torch.device, contexts) -> dict[str, Tensor]:
        """Pictures of random training prompts: conditions of each of a step's calls [calls, B, …]; states and the
        teacher's velocities there in every call [S, B, L, C]; timesteps [S]."""
        numbers = torch.randint(len(self.data.prompts), (self.size,), generator=self.generator).tolist()
        kept = self.data.until(numbers[0], 0)
        timesteps = (kept["timesteps"].to(kept["noise"].dtype) / 1000).float().to(device)  # rounded as in the samples
        given = []
        for call in range(self.data.calls):
            samples = collate([self.data[number * self.data.steps + call] for number in numbers])
            given.append({n: tensor.float().to(device) for n, tensor in samples.items() if n != "velocity"})
        latents, states, velocities = given[0]["hidden_states"], [], []
        for timestep, change in zip(timesteps, kept["sigmas"].diff().tolist(), strict=True):
            taken = []
            for inputs in given:
                inputs |= {"hidden_states": latents, "timestep": timestep.expand(self.size)}
                with contexts[1]():
                    velocities.append(teacher(**inputs, return_dict=False)[0].float())
                states.append(latents)
                with contexts[0]():
                    taken.append(student(**inputs, return_dict=False)[0].float())
            latents = latents + change * steps_taken(torch.stack(taken), self.data.guidance)[0]
        conditions = {
            name: tensor if name.endswith("_ids") else torch.stack([inputs[name] for inputs in given])
            for name, tensor in given[0].items()
        }
        timesteps = timesteps.repeat_interleave(self.data.calls)
        return conditions | {
            "hidden_states": torch.stack(states), "velocity": torch.stack(velocities), "timestep": timesteps
        }  # fmt: skip


class Votes:
    """The sum of each code over the steps that were counted: int32 [out, in] for every quantized layer."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    @torch.no_grad()
    def count(self, layers: dict[str, QuantizeLinear]) -> None:
        """Add the codes as they are now."""
        for name, layer in layers.items():
            codes = quantize_codes(layer.weight, layer.weight_clip_val, layer.w_bits)
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(codes, dtype=torch.int32)
            self.sums[name] += codes
        self.steps += 1

    @torch.no_grad()
    def decide(self, layers: dict[str, QuantizeLinear]) -> float:
        """Move the weights to the codes that were voted for, and forget the votes; the share of codes that changed."""
        changed = total = 0
        for name, layer in layers.items():
            codes = (self.sums.pop(name) / self.steps).round().to(torch.int8)
            changed += (codes != quantize_codes(layer.weight, layer.weight_clip_val, layer.w_bits)).sum().item()
            total += codes.numel()
            packed = PackedLinear.from_codes(codes, layer.weight_clip_val.detach(), layer.bias, layer.w_bits)
            adopt_codes(layer, packed, name)
        self.steps = 0
        return changed / total

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: the sums, and the number of steps."""
        return {f"votes.{name}": sums for name, sums in self.sums.items()} | {"votes_steps": torch.tensor(self.steps)}

    def load(self, state, device: torch.device) -> None:
        """Take up what state() returned, among the tensors of a checkpoint."""
        self.steps = int(state["votes_steps"])
        self.sums = {name.removeprefix("votes."): state[name].to(device) for name in state if name.startswith("votes.")}
