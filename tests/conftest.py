"""What several test files share: a FLUX pipeline of random weights that draws in a second, and a way to run scripts."""

import gc
import os
import shutil

# Before torch is imported, and inherited by the scripts: for tensors this small a second thread gains nothing, and on
# a busy machine the threads wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches out to the hub fails
# Some processors get other last digits from MKL in one process than in another; files are compared byte for byte here.
os.environ.setdefault("MKL_CBWR", "AUTO")

import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import forked  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="write commit, machine and result into FILE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish() -> None:
    """What the libraries hold stays: each gc.collect(), of which loading a model has several, searched it for 0.4 s."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """With --record: one line of what was tested where and how it went, then the names of what failed."""
    if not (file := config.getoption("--record")):
        return
    import diffusers
    import torch
    import transformers

    git = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = os.environ.get("COMMIT") or subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, diffusers, transformers))
    stats = {name: terminalreporter.stats.get(name, []) for name in ("passed", "failed", "error", "skipped")}
    counts = ", ".join(f"{len(reports)} {name}" for name, reports in stats.items())
    failed = [f"{report.outcome} {report.nodeid}" for report in stats["failed"] + stats["error"]]
    line = f"commit {commit or 'unknown'}, {', '.join(gpus) or 'no GPU'}, {versions}: {counts}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([line, *failed]) + "\n")
    terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess]:
    """run("sanity.py", "--w_bits", 0, NAME="value") starts a script in the repository root, without the hub.

    Keywords are environment variables. The result has returncode, stdout and stderr. ranks=2: two processes of gloo.
    A process is forked (forked.py) unless it gets code (-c), whose subject is what is imported, or variables.
    """

    def call(*command, ranks: int = 1, **environment) -> subprocess.CompletedProcess:
        words = [str(word) for word in command]
        if not (forked.switched_off() or environment or words[0] == "-c"):
            return forked.run(words, dict(os.environ), ranks)
        if ranks > 1:
            words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *words]
        variables = os.environ | environment
        words = [sys.executable, *words]
        return subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)

    return call


@pytest.fixture
def begin() -> Iterator[Callable]:
    """begin("train.py", …) starts a script as run does, for a test to kill: it has pid, poll(), wait() and kill()."""
    begun = []

    def call(*command):
        words = [str(word) for word in command]
        if forked.switched_off():
            null = subprocess.DEVNULL
            begun.append(subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=null, stderr=null))
        else:
            begun.append(forked.Script(words, dict(os.environ), Path(os.devnull), Path(os.devnull)))
        return begun[-1]

    yield call
    for process in begun:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def start() -> Callable[..., int]:
    """start(main, "run.py", "--w_bits", 0) calls a script's main() in this process and returns its exit status."""
    from utils.utils import run_script

    def call(main, *argv) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(word) for word in argv])
            try:
                run_script(main)
                return 0
            except SystemExit as exit:
                return exit.code

    return call


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory) -> Path:
    """A FluxPipeline of stock classes in the layout of FLUX.1-dev, made for 128 pixels, its weights random."""
    import torch
    import transformers
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    from utils import scenes
    from utils.tokenizers import TEXT_LENGTH, make_tokenizers

    torch.manual_seed(0)
    tokenizer, tokenizer_2 = make_tokenizers(scenes.train_prompts(200))
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=TEXT_LENGTH, projection_dim=32,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    text_encoder_2 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(tokenizer_2), d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False, tie_word_embeddings=False,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=scenes.SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
    )
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    for parameter in transformer.parameters():
        parameter.data *= 2  # blocks that matter, so that quantizing them is seen
    folder = tmp_path_factory.mktemp("models") / "random-flux"
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        transformer=transformer,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def klein_folder(tmp_path_factory) -> Path:
    """A Flux2KleinPipeline of random weights in small, distilled, made for 96 pixels."""
    import torch

    from utils import random_flux

    folder = tmp_path_factory.mktemp("models") / "small-klein"
    folder.mkdir()
    shard_bytes = random_flux.SHARD_BYTES[True]
    random_flux.write_transformer(folder, random_flux.skeleton("small-klein"), 0, shard_bytes, torch.device("cpu"))
    random_flux.write_rest(folder, "small-klein", 0, torch.device("cpu"))
    return folder


@pytest.fixture(scope="session")
def klein_base_folder(klein_folder, tmp_path_factory) -> Path:
    """The same, but not distilled: guided by two calls of the transformer a step."""
    folder = tmp_path_factory.mktemp("models") / "small-klein-base"
    shutil.copytree(klein_folder, folder)
    file = folder / "model_index.json"
    file.write_text(file.read_text().replace('"is_distilled": true', '"is_distilled": false'))
    return folder
