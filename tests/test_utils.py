"""What the scripts share: devices and files, loading a pipeline and its errors, drawing, recording, labelled grids."""

import math
import os
import shutil
import sys
import threading
import time
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors import SafetensorError

from models.modeling_flux_quant import FluxTransformer2DModel
from utils import prompt_list, scenes, utils
from utils.utils import (
    check_disk,
    generate_images,
    load_pipeline,
    load_quantized_model,
    pick_device,
    pick_dtype,
    pick_prompts,
    record_velocities,
    run_script,
    save_grid,
    save_images,
    to_pil,
    whole_folder,
)

PROMPTS = ["a red star and a blue ring", "three hearts on grey paper", "a cross above a moon"]
SETTINGS = {"num_inference_steps": 3, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipe(pipeline_folder):
    return load_pipeline(str(pipeline_folder), torch.float32)


# ---------------------------------------------------------------------------------------------- scripts and files


@pytest.mark.parametrize("error", [ValueError("two\nlines: do this"), OSError("disk"), SafetensorError("I/O error")])
def test_run_script_ends_in_one_line(error, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/script.py"])
    monkeypatch.delenv("TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as exit:
        run_script(main)
    assert exit.value.code == 1
    assert capsys.readouterr().err == f"script.py: error: {' '.join(str(error).split())}\n"

    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(type(error)):
        run_script(main)


def test_run_script_leaves_bugs_alone():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


def test_run_script_leaves_the_process_group_unless_there_was_an_error(tmp_path):
    def join(name: str) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / name}", rank=0, world_size=1)

    run_script(lambda: join("done"))
    assert not torch.distributed.is_initialized()

    def fail():
        join("failed")
        raise ValueError("no disk")

    try:
        with pytest.raises(SystemExit):
            run_script(fail)
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("gpus", "mps", "default"), [(2, False, "cuda"), (0, True, "mps"), (2, True, "cuda"), (0, False, "cpu")]
)
def test_pick_device(gpus, mps, default, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    here = ["cpu"] + ["mps"] * mps + [f"cuda:{i}" for i in range(gpus)] + ["cuda"] * (gpus > 0)
    assert pick_device() == torch.device(default)
    for name in ("cpu", "mps", "cuda", "cuda:0", "cuda:1", "cuda:2", "meta", "toaster", ""):
        if name in here:
            assert pick_device(name) == torch.device(name)
        else:
            with pytest.raises(ValueError, match=f"^--device {name} is not available here: use one of .*cpu$"):
                pick_device(name)


@pytest.mark.parametrize(
    ("bf16", "fp16", "device", "expected"),
    [
        (True, False, "cpu", torch.bfloat16),
        (False, True, "cuda", torch.float16),
        (False, False, "cuda", torch.bfloat16),
        (False, False, "cpu", torch.float32),
        (False, False, "mps", torch.float32),
    ],
)
def test_pick_dtype(bf16, fp16, device, expected):
    assert pick_dtype(SimpleNamespace(bf16=bf16, fp16=fp16), torch.device(device)) == expected


def listing(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_whole_folder_replaces_all_or_nothing(tmp_path):
    folder = tmp_path / "deep" / "result"
    with whole_folder(folder) as partial:
        (partial / "a.txt").write_text("old")
        assert not folder.exists()
    assert listing(tmp_path) == {"deep/result/a.txt": "old"}

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), whole_folder(folder) as partial:
            (partial / "a.txt").write_text("half")
            raise error
        assert listing(tmp_path) == {"deep/result/a.txt": "old"}
        assert [path.name for path in folder.parent.iterdir()] == ["result"]

    (folder.parent / "result.tmp").mkdir()  # what a killed run leaves
    (folder.parent / "result.tmp" / "stale.txt").write_text("stale")
    with whole_folder(folder) as partial:
        (partial / "b.txt").write_text("new")
        assert listing(folder) == {"a.txt": "old"}
    assert listing(tmp_path) == {"deep/result/b.txt": "new"}


def test_check_disk(tmp_path, monkeypatch):
    asked = []

    def disk_usage(path):
        asked.append(path)
        return namedtuple("usage", "total used free")(10e9, 7e9, 3e9)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    folder = tmp_path / "not" / "yet"
    check_disk(folder, 3_000_000_000, "the model")
    assert asked == [tmp_path]  # the nearest folder that exists is on the same disk
    with pytest.raises(ValueError, match=r"yet: the model takes 3\.1 GB but only 3\.0 GB are free; make room"):
        check_disk(folder, 3_100_000_000, "the model")
    monkeypatch.chdir(tmp_path)
    check_disk(Path("relative/folder"), 1, "the model")


# ---------------------------------------------------------------------------------------------- loading a pipeline


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_pipeline(dtype, pipeline_folder):
    pipe = load_pipeline(str(pipeline_folder), dtype)
    reference = FluxPipeline.from_pretrained(pipeline_folder)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = getattr(pipe, part), getattr(reference, part)
        assert ours.dtype == dtype and ours.device.type == "cpu"
        for name, parameter in theirs.named_parameters():
            assert torch.equal(ours.get_parameter(name), parameter.to(dtype)), f"{part}.{name}"


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-64])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "no file named model_index.json"),
        (lambda f: truncate(f / "model_index.json"), "not a valid JSON"),
        (lambda f: shutil.rmtree(f / "vae"), "config.json"),
        (lambda f: shutil.rmtree(f / "tokenizer_2"), "no vocabulary in tokenizer_2"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), "no vocabulary in tokenizer"),
        (lambda f: truncate(f / "tokenizer" / "tokenizer.json"), ""),
        (lambda f: (f / "text_encoder" / "config.json").unlink(), ""),
        (lambda f: truncate(f / "text_encoder_2" / "model.safetensors"), "incomplete metadata"),
        (lambda f: truncate(f / "transformer" / "diffusion_pytorch_model.safetensors"), "diffusion_pytorch_model"),
        (lambda f: truncate(f / "vae" / "config.json"), "not a valid JSON"),
    ],
)
def test_damaged_folder(damage, message, pipeline_folder, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(pipeline_folder, folder)
    damage(folder)
    with pytest.raises(ValueError) as error:
        load_pipeline(str(folder), torch.float32)
    assert str(error.value).startswith(f"{folder}: cannot be loaded (")
    assert message in str(error.value)
    assert str(error.value).endswith("save or download it again")


def test_folder_of_another_pipeline(pipeline_folder, tmp_path):
    index = (pipeline_folder / "model_index.json").read_text()
    (tmp_path / "model_index.json").write_text(index.replace('"FluxPipeline"', '"StableDiffusionPipeline"'))
    with pytest.raises(ValueError, match=f"^{tmp_path}: expected a FluxPipeline, found a StableDiffusionPipeline; "):
        load_pipeline(str(tmp_path), torch.float32)


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "../nothing", "/no/where", "owner/na me", "README"])
def test_neither_a_folder_nor_a_hub_id(name):
    with pytest.raises(ValueError, match=rf"^{name}: neither a folder nor a hub id \(owner/model\); check the path$"):
        load_pipeline(name, torch.float32)


def test_a_file_is_not_a_hub_id(pipeline_folder, monkeypatch):
    monkeypatch.chdir(pipeline_folder)
    for name in ("model_index.json", "vae/config.json"):
        with pytest.raises(ValueError, match="neither a folder nor a hub id"):
            load_pipeline(name, torch.float32)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine that answers every request with hub["status"] and, as huggingface.co does, hub["code"]."""
    answer = {"status": 500, "code": None, "requests": []}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            answer["requests"].append(self.path)
            self.send_response(answer["status"])
            if answer["code"]:
                self.send_header("X-Error-Code", answer["code"])
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the hub client's attempts
    answer["server"] = server
    yield answer
    server.shutdown()
    server.server_close()


@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks")  # diffusers' business
@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "access is gated; .* https://huggingface.co/owner/model, then run `hf auth login`"),
        (401, "GatedRepo", "access is gated; .* https://huggingface.co/owner/model, then run `hf auth login`"),
        (401, "RepoNotFound", "no such model on the hub or it is private; check the name, or run `hf auth login`"),
        (404, "RepoNotFound", "no such model on the hub or it is private"),
        (404, "EntryNotFound", "not as a diffusers pipeline; give one, such as black-forest-labs/FLUX.1-dev"),
        (403, None, "the hub answers 403; renew your token with `hf auth login`, or try later"),
        (503, None, "the hub answers 503; .* try later"),
    ],
)
def test_what_the_hub_refuses(status, code, message, hub):
    """Through the real clients of diffusers and huggingface_hub, whose wrapping of errors differs between versions."""
    hub.update(status=status, code=code)
    with pytest.raises(ValueError, match=f"^owner/model: .*{message}") as error:
        load_pipeline("owner/model", torch.float32)
    assert "/owner/model/resolve/main/model_index.json" in hub["requests"]
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks")
@pytest.mark.parametrize("reason", ["no network", "offline"])
def test_no_hub(reason, hub, monkeypatch):
    if reason == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        hub["server"].shutdown()
        hub["server"].server_close()
    with pytest.raises(ValueError, match="^owner/model: .* the hub cannot be reached; check the network$"):
        load_pipeline("owner/model", torch.float32)
    assert not hub["requests"]


@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks")
def test_an_incomplete_download_is_not_blamed_on_the_network(hub, pipeline_folder, tmp_path, monkeypatch):
    """What an interrupted download leaves in the cache: the index and a part of the rest."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--owner--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(pipeline_folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert load_pipeline("owner/model", torch.float32).transformer is not None  # from the cache, without network

    truncate(snapshot / "text_encoder" / "model.safetensors")
    with pytest.raises(ValueError, match="^owner/model: cannot be loaded .* download it again$"):
        load_pipeline("owner/model", torch.float32)


def arguments(name, **settings):
    training = SimpleNamespace(bf16=False, fp16=False)
    quantizer = {"lora_r": 0, "lora_alpha": 1.0, "clip_init": "mse", "quantize_modulation": True}
    return SimpleNamespace(input_model_filename=str(name), device="cpu", **quantizer | settings), training


def test_load_quantized_model(pipeline_folder, tmp_path):
    import sanity

    assert sanity.load_quantized_model is load_quantized_model
    args = arguments(pipeline_folder)
    stock = diffusers.FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer")
    assert load_quantized_model(*args).config.w_bits == 16
    ternary = load_quantized_model(*args, w_bits=0)
    assert isinstance(ternary, FluxTransformer2DModel) and ternary.config.w_bits == 0
    for name, parameter in stock.named_parameters():
        assert torch.equal(ternary.get_parameter(name), parameter), name

    for parameter in ternary.parameters():
        parameter.data += 1
    ternary.save_pretrained(tmp_path)
    cached = load_quantized_model(*args, tmp_path, w_bits=0)
    assert torch.equal(cached.proj_out.weight, stock.proj_out.weight + 1)
    with pytest.raises(ValueError, match=f"^{tmp_path}: asked for w_bits=4 .* with w_bits=0"):
        load_quantized_model(*args, tmp_path, w_bits=4)
    fresh = load_quantized_model(*args, tmp_path / "nothing yet", w_bits=4)
    assert fresh.config.w_bits == 4 and torch.equal(fresh.proj_out.weight, stock.proj_out.weight)


# ---------------------------------------------------------------------------------------------------- prompts


def made_for(size):
    return SimpleNamespace(vae=SimpleNamespace(config=SimpleNamespace(sample_size=size)))


def test_prompts_suit_the_model():
    assert pick_prompts(made_for(128), 8) == (scenes.eval_prompts(8), "evaluation scenes of utils/scenes.py")
    assert pick_prompts(made_for(1024), 8) == (
        prompt_list.eval_prompts(8),
        "evaluation prompts of utils/prompt_list.py",
    )


@pytest.mark.parametrize("size", [128, 1024])
def test_more_prompts_than_there_are(size):
    with pytest.raises(ValueError, match="5000"):
        pick_prompts(made_for(size), 5000)


def test_prompts_from_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff  a cat\r\n\r\nein Mädchen \n\t\n三つの星".encode())
    lines = ["a cat", "ein Mädchen", "三つの星"]
    for count in (1, 2, 3, 99):
        assert pick_prompts(made_for(128), count, str(file)) == (lines[:count], str(file))


@pytest.mark.parametrize("content", [None, b"", b" \n\n", b"caf\xe9", "folder"])
def test_prompt_files_that_are_none(content, tmp_path):
    file = tmp_path / "prompts.txt"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^--prompts {file}: (cannot be read as UTF-8 text|no prompts in it)"):
        pick_prompts(made_for(128), 3, str(file))


# ---------------------------------------------------------------------------------------------------- pictures


def test_images_are_those_of_diffusers(pipe, pipeline_folder):
    images = generate_images(pipe, PROMPTS, seed=5, **SETTINGS)
    assert images.shape == (3, 3, 128, 128) and images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    stock = FluxPipeline.from_pretrained(pipeline_folder)
    stock.set_progress_bar_config(disable=True)
    for i, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(5 + i)
        picture = stock(
            prompt, height=128, width=128, max_sequence_length=24, generator=generator, output_type="np", **SETTINGS
        ).images[0]
        np.testing.assert_allclose(images[i].permute(1, 2, 0), picture, atol=1e-5)


def test_a_picture_depends_on_its_prompt_and_seed_only(pipe):
    images = generate_images(pipe, PROMPTS, seed=5, **SETTINGS)
    assert torch.equal(generate_images(pipe, PROMPTS[:1], seed=5, **SETTINGS), images[:1])
    assert torch.equal(generate_images(pipe, PROMPTS[1:], seed=6, **SETTINGS), images[1:])
    for batch_size in (2, 3, 8):
        batched = generate_images(pipe, PROMPTS, seed=5, batch_size=batch_size, **SETTINGS)
        torch.testing.assert_close(batched, images, atol=1e-4, rtol=0)
    torch.manual_seed(123)
    assert torch.equal(generate_images(pipe, PROMPTS, seed=5, **SETTINGS), images)
    assert not torch.allclose(generate_images(pipe, PROMPTS, seed=6, **SETTINGS), images, atol=1e-2)
    assert not torch.allclose(generate_images(pipe, PROMPTS[::-1], seed=5, **SETTINGS)[0], images[0], atol=1e-3)


def test_size(pipe):
    assert generate_images(pipe, PROMPTS[:1], size=64, **SETTINGS).shape == (1, 3, 64, 64)


def manual_sampling(pipe, prompt, seed, steps, guidance):
    """Rectified flow by hand: z ← z + (σ' − σ)·v with FLUX's shifted σ; the states z, σ, v [1, L, C] of every step."""
    embeds, pooled, txt_ids = pipe.encode_prompt(prompt, None, max_sequence_length=24)
    side, channels = 128 // 8, pipe.vae.config.latent_channels
    noise = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(seed))
    patches = noise.unfold(2, 2, 2).unfold(3, 2, 2)  # [1, C, rows, columns, 2, 2], packed into one token a patch
    z = patches.permute(0, 2, 3, 1, 4, 5).reshape(1, (side // 2) ** 2, channels * 4)
    rows, columns = torch.meshgrid(torch.arange(side // 2.0), torch.arange(side // 2.0), indexing="ij")
    img_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    mu = 0.5 + (1.15 - 0.5) * (z.shape[1] - 256) / (4096 - 256)
    uniform = [1 - i * (1 - 1 / steps) / (steps - 1) for i in range(steps)]
    sigmas = [math.exp(mu) / (math.exp(mu) + 1 / t - 1) for t in uniform] + [0.0]
    states = []
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        velocity = pipe.transformer(
            hidden_states=z, timestep=torch.tensor([sigma]), guidance=torch.tensor([guidance]),
            encoder_hidden_states=embeds, pooled_projections=pooled, txt_ids=txt_ids, img_ids=img_ids,
        ).sample  # fmt: skip
        states.append((z, sigma, velocity))
        z = z + (following - sigma) * velocity
    return states


@torch.no_grad()
def test_recorded_velocities_are_those_of_a_loop_by_hand(pipe):
    with record_velocities(pipe.transformer) as calls:
        generate_images(pipe, PROMPTS[:2], seed=9, num_inference_steps=4, guidance_scale=2.5)
    assert len(calls) == 2 * 4
    for i, prompt in enumerate(PROMPTS[:2]):
        states = manual_sampling(pipe, prompt, seed=9 + i, steps=4, guidance=2.5)
        for (inputs, velocity), (z, sigma, expected) in zip(calls[4 * i : 4 * i + 4], states, strict=True):
            torch.testing.assert_close(inputs["hidden_states"], z, atol=1e-4, rtol=0)
            assert inputs["timestep"].tolist() == pytest.approx([sigma], abs=1e-5)
            torch.testing.assert_close(velocity, expected, atol=1e-4, rtol=0)
            again = pipe.transformer(**inputs)[0]  # nothing that is kept was changed later
            torch.testing.assert_close(again, velocity, atol=1e-6, rtol=0)


def test_recording_ends_with_the_block(pipe):
    with pytest.raises(KeyError), record_velocities(pipe.transformer) as calls:
        raise KeyError
    generate_images(pipe, PROMPTS[:1], **SETTINGS)
    assert calls == []


def test_to_pil():
    image = torch.tensor([0.0, 0.5, 1.0, -1.0, 2.0, 100 / 255]).view(1, 2, 3).expand(3, 2, 3) * torch.ones(3, 1, 1)
    assert np.asarray(to_pil(image))[..., 1].tolist() == [[0, 128, 255], [0, 255, 100]]


def test_save_images_replaces_older_ones(tmp_path):
    images = torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 5, 7) / 4
    save_images(images, tmp_path / "new")
    (tmp_path / "new" / "notes.txt").write_text("mine")
    save_images(images[1:3], tmp_path / "new")
    assert sorted(os.listdir(tmp_path / "new")) == ["notes.txt", "sample_000.png", "sample_001.png"]
    first = Image.open(tmp_path / "new" / "sample_000.png")
    assert first.size == (7, 5) and first.getpixel((0, 0)) == (64, 64, 64)


@pytest.mark.parametrize(("height", "width", "shown"), [(128, 128, (128, 128)), (512, 1024, (128, 256))])
def test_grid_has_every_picture_at_its_place(height, width, shown, tmp_path):
    """Cells are found from the lower right corner, past labels whose size depends on the font."""
    tones = {"full": (0.1, 0.2, 0.3), "1.58 bit": (0.6, 0.7, 0.8)}
    rows = {name: torch.tensor(t).view(3, 1, 1, 1).expand(3, 3, height, width) for name, t in tones.items()}
    prompts = ["short", "a prompt with so many words " * 20, ""]
    save_grid(rows, prompts, tmp_path / "deep" / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "deep" / "grid.png").convert("L")).astype(int)
    step_y, step_x = shown[0] + 4, shown[1] + 4
    top, left = grid.shape[0] - 2 * step_y, grid.shape[1] - 3 * step_x
    assert top > 0 and left > 0
    for y, row in enumerate(tones.values()):
        for x, tone in enumerate(row):
            cell = grid[top + y * step_y :, left + x * step_x :][: shown[0], : shown[1]]
            assert cell.shape == shown and abs(cell - round(255 * tone)).max() <= 1
    titles, names = grid[:top, left:], grid[top:, :left]
    assert (titles[:, :step_x] < 128).any() and (titles[:, step_x : 2 * step_x] < 128).any()
    assert (titles[:, 2 * step_x :] == 255).all()  # the empty prompt
    assert (names[:step_y] < 128).any() and (names[step_y:] < 128).any()


def test_logger_prints_once(capsys):
    for _ in range(2):
        logger = utils.get_logger("test_logger_prints_once")
    logger.info("%d pictures", 3)
    assert capsys.readouterr().out == "[test_logger_prints_once] 3 pictures\n"
