"""Which prompts a script draws: those of a file, or the set that suits the model."""

from pathlib import Path

from diffusers import FluxPipeline

from utils import prompt_list, scenes
from utils.sampling import native_size


def pick_prompts(pipe: FluxPipeline, count: int, file: str | None = None, split: str = "eval") -> tuple[list[str], str]:
    """`count` prompts for `pipe`, and where they come from in words.

    The lines of `file` if given (all of them if there are fewer), else the set of this split, "eval" or "train", that
    suits the model: drawn scenes for a model made for 128 pixels such as tiny-flux, the prompts of prompt_list.py for
    FLUX. Raises ValueError if there are too few or the file is empty or unreadable.
    """
    if file is not None:
        flag = "--train_prompts" if split == "train" else "--prompts"
        try:
            lines = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{flag} {file}: cannot be read as UTF-8 text ({error})") from error
        if not lines:
            raise ValueError(f"{flag} {file}: no prompts in it; write one a line")
        return lines[:count], file
    world = scenes if native_size(pipe) == scenes.SIZE else prompt_list
    kind = "scenes" if world is scenes else "prompts"
    if split == "train":
        return world.train_prompts(count), f"training {kind} of {world.__name__.replace('.', '/')}.py"
    return world.eval_prompts(count), f"evaluation {kind} of {world.__name__.replace('.', '/')}.py"
