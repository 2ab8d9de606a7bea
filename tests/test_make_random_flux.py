"""utils/make_random_flux.py: folders that diffusers loads, whole or not at all."""

import json
import sys
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from utils import make_random_flux, random_flux
from utils.utils import run_script


@pytest.fixture
def make(monkeypatch, capsys, tmp_path):
    """make("--seed", 1) runs the script in this process; the result has returncode, stderr and the folder."""

    def make(*flags, folder=tmp_path / "flux"):
        argv = ["make_random_flux", "--output", folder, "--config", "small", *flags]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        try:
            run_script(make_random_flux.main)
            code = 0
        except SystemExit as exit:
            code = exit.code
        return SimpleNamespace(returncode=code, stderr=capsys.readouterr().err, folder=folder)

    return make


def tensors(folder):
    return {n: t for f in (folder / "transformer").glob("*.safetensors") for n, t in load_file(f).items()}


def test_diffusers_loads_it(make):
    result = make("--blocks", 1, 2, "--shard_gb", 1e-3)
    assert result.returncode == 0, result.stderr
    model = diffusers.FluxTransformer2DModel.from_pretrained(result.folder / "transformer", dtype=torch.bfloat16)
    assert (len(model.transformer_blocks), len(model.single_transformer_blocks)) == (1, 2)
    stored = tensors(result.folder)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: t.shape for n, t in stored.items()}
    assert all(torch.equal(parameter, stored[name]) for name, parameter in model.named_parameters())
    assert len(list((result.folder / "transformer").glob("*.safetensors"))) > 5
    index = json.loads((result.folder / "model_index.json").read_text())
    assert (index["_class_name"], index["transformer"]) == ("FluxPipeline", ["diffusers", "FluxTransformer2DModel"])
    names = sorted(path.name for path in result.folder.iterdir())
    assert names == [".flux158.json", "model_index.json", "transformer"]


def test_a_whole_pipeline_comes_with_everything_that_draws(make):
    result = make("--whole")
    assert result.returncode == 0, result.stderr
    pipe = diffusers.FluxPipeline.from_pretrained(result.folder, dtype=torch.float32)
    [image] = pipe(
        "a dog", height=32, width=32, num_inference_steps=1, max_sequence_length=32, output_type="pt"
    ).images  # fmt: skip
    assert image.shape == (3, 32, 32) and image.isfinite().all()


def test_the_seed_decides_whatever_the_shards(make, tmp_path):
    one = tensors(make().folder)
    same = tensors(make("--shard_gb", 2e-3, folder=tmp_path / "same").folder)
    other = tensors(make("--seed", 1000, folder=tmp_path / "other").folder)
    assert one.keys() == same.keys() and all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one )


def test_an_interruption_leaves_nothing(make, monkeypatch, tmp_path):
    calls = []

    def save(tensors, file, metadata):
        calls.append(file)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(random_flux, "save_file", save)
    assert make("--shard_gb", 2e-3).returncode == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (("--blocks", 0, 1), 2, "--blocks: at least one of each kind, got 0 1"),
        (("--shard_gb", 0), 2, "--shard_gb must be above 0"),
        (("--device", "toaster"), 2, "--device toaster is not available here"),
        (("--config", "flux-devil"), 2, "invalid choice: 'flux-devil'"),
        ((), 1, "exists and is not empty; choose another"),
    ],
)
def test_errors_are_one_line(make, flags, status, message, tmp_path):
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "mine").touch()
    result = make(*flags)
    assert result.returncode == status and message in result.stderr.strip().splitlines()[-1]


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(make, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    result = make()
    assert result.returncode == 1 and "make room or choose another folder" in result.stderr
    assert list(tmp_path.iterdir()) == []
