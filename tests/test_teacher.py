"""utils/teacher.py: what is known of a teacher without loading it, and what it loads.

References: state dicts of the loaded models, the files of stock diffusers, counting in plain Python.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from utils.pipelines import Flux1
from utils.teacher import (
    Teacher,
    TeacherSettings,
    fingerprint,
    full_batches,
    large_parts,
    prompt_seeds,
    transformer_config,
)

SETTINGS = TeacherSettings(resolution=64, num_inference_steps=2, guidance_scale=3.5)


@pytest.fixture
def copied(pipeline_folder, tmp_path) -> Path:
    return shutil.copytree(pipeline_folder, tmp_path / "copied")


def weights(folder: Path, part: str) -> Path:
    [file] = (folder / part).glob("*.safetensors")
    return file


# --------------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_is_that_of_the_weights(copied):
    """A change of any tensor of any of the three models is seen; one that is taken back is not."""
    expected = fingerprint(copied, torch.float32)
    seen = {expected}
    for part in large_parts(Flux1):
        file = weights(copied, part)
        tensors = load_file(file)
        for name, tensor in tensors.items():
            save_file(tensors | {name: tensor + 0.01}, file)
            found = fingerprint(copied, torch.float32)
            assert found not in seen, f"{part}.{name}"
            seen.add(found)
        save_file(tensors, file)
    assert fingerprint(copied, torch.float32) == expected


def test_the_fingerprint_looks_at_values_all_over_a_tensor(copied):
    """Not at its beginning alone: of the sixteen parts of a large one, at least seven."""
    file = weights(copied, "transformer")
    tensors, name = load_file(file), "transformer_blocks.0.ff.net.0.proj.weight"
    expected, seen = fingerprint(copied, torch.float32), 0
    for part in tensors[name].flatten().view(16, -1):
        kept = part.clone()
        part += 0.01
        save_file(tensors, file)
        seen += fingerprint(copied, torch.float32) != expected
        part.copy_(kept)
    assert seen >= 7


def test_shards_and_storage_dtype_make_no_difference_where_the_numbers_are_the_same(copied, tmp_path):
    """As on the hub: the transformer in several files, stored in bfloat16 or in float32."""
    expected = fingerprint(copied, torch.bfloat16)
    model = FluxTransformer2DModel.from_pretrained(copied, subfolder="transformer")
    for dtype in (torch.float32, torch.bfloat16):
        shutil.rmtree(copied / "transformer")
        model.to(dtype).save_pretrained(copied / "transformer", max_shard_size="20KB")
        assert len(list((copied / "transformer").glob("*.safetensors"))) > 2
        assert fingerprint(copied, torch.bfloat16) == expected
    assert fingerprint(copied, torch.float32) != expected


def test_values_that_are_no_weights_do_not_count(copied):
    """Such as the position ids that older transformers stored with CLIP."""
    expected, file = fingerprint(copied, torch.float32), weights(copied, "text_encoder")
    save_file(load_file(file) | {"position_ids": torch.arange(24)[None], "scalar": torch.tensor(3)}, file)
    assert fingerprint(copied, torch.float32) == expected
    save_file(load_file(file) | {"scale": torch.tensor(0.5)}, file)
    assert fingerprint(copied, torch.float32) != expected


@pytest.mark.parametrize("damage", ["cut", "gone", "no shard", "no index"])
def test_files_that_are_not_whole_are_named(damage, copied):
    file = weights(copied, "text_encoder_2")
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}} if damage == "no shard" else [7]
    if damage.startswith("no"):
        (file.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="save or download the pipeline again$") as error:
        fingerprint(copied, torch.float32)
    assert "\n" not in str(error.value) and "text_encoder_2" in str(error.value)


# ------------------------------------------------------------------------------------------------------- describing


def test_a_description_is_that_of_the_loaded_pipeline(pipeline_folder):
    teacher, pipe = Teacher(str(pipeline_folder), torch.float32), FluxPipeline.from_pretrained(pipeline_folder)
    assert teacher.config == {n: v for n, v in pipe.transformer.config.items() if n in teacher.config} | {
        name: value for name, value in teacher.config.items() if name.startswith("_")
    }
    embeds, pooled, _ = pipe.encode_prompt("a red star", None, max_sequence_length=24)
    found = teacher.describe(SETTINGS)
    assert found["text_shape"] == list(embeds[0].shape) and found["pooled_shape"] == list(pooled[0].shape)
    assert found["latents_shape"] == [(64 // 16) ** 2, pipe.transformer.config.in_channels]
    assert found["scheduler"]["shift"] == 3.0 and found["dtype"] == "float32" and found["guidance_embeds"]
    assert json.loads(json.dumps(found)) == found


def test_what_a_configuration_leaves_out_has_diffusers_defaults(copied):
    """FLUX.1-dev's own has neither out_channels nor axes_dims_rope."""
    file = copied / "transformer/config.json"
    config = json.loads(file.read_text())
    for name in ("out_channels", "axes_dims_rope"):
        config.pop(name)
    file.write_text(json.dumps(config))
    found = transformer_config(copied)
    assert found["out_channels"] is None and tuple(found["axes_dims_rope"]) == (16, 56, 56)


def test_the_hubs_snapshot_serves_as_a_folder_does(run, pipeline_folder, tmp_path):
    """A hub cache as huggingface_hub lays it out; nothing can be downloaded."""
    repository = tmp_path / "models--owner--flux"
    shutil.copytree(pipeline_folder, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    script = "import torch; from utils.teacher import Teacher; print(Teacher('owner/flux', torch.float32).weights)"
    result = run("-c", script, HF_HUB_CACHE=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == fingerprint(pipeline_folder, torch.float32)


# --------------------------------------------------------------------------------------------------------- loading


def test_parts_are_loaded_when_asked_for_and_forgotten_again(pipeline_folder):
    teacher, cpu = Teacher(str(pipeline_folder), torch.bfloat16), torch.device("cpu")
    assert [getattr(teacher.pipe, part) for part in teacher.parts] == [None] * 3 and teacher.pipe.vae is not None
    vae = teacher.pipe.vae
    teacher.load("transformer", device=cpu)
    assert teacher.pipe.transformer.dtype == torch.bfloat16 and teacher.pipe.text_encoder_2 is None
    transformer = teacher.pipe.transformer
    teacher.load("transformer", "text_encoder", device=cpu)
    assert teacher.pipe.transformer is transformer and teacher.pipe.text_encoder is not None
    teacher.drop(*teacher.parts)
    assert [getattr(teacher.pipe, part) for part in teacher.parts] == [None] * 3 and teacher.pipe.vae is vae


# ------------------------------------------------------------------------------------------------ seeds and batches


def test_seeds_follow_from_the_prompt_and_how_often_it_came():
    prompts = ["a", "b", "a", "🎨", "a\udcff"]
    seeds = prompt_seeds(prompts, 42)
    assert len(set(seeds)) == 5 and all(2**31 <= seed < 2**32 for seed in seeds)
    assert prompt_seeds(prompts[:2], 42) == seeds[:2]
    assert prompt_seeds(["b", "a", "a"], 42) == [seeds[1], seeds[0], seeds[2]]
    assert not set(prompt_seeds(prompts, 43)) & set(seeds)
    many = prompt_seeds([str(i) for i in range(3000)], 42)
    assert len(set(many)) > 2990  # 3000² / 2 / 2³¹ pairs are expected to meet


@pytest.mark.parametrize(("count", "size"), [(0, 2), (1, 1), (1, 3), (4, 2), (5, 2)])
def test_batches_are_full_and_hold_everything_in_order(count, size):
    batches = list(full_batches(list(range(count)), size))
    assert all(len(batch) == size for batch in batches) and len(batches) == -(-count // size)
    assert [i for batch in batches for i in batch][:count] == list(range(count))
