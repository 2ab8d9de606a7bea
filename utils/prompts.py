"""Which prompts a script draws: those of a file, or the set that suits the model."""

import json
from pathlib import Path

from diffusers import DiffusionPipeline

from utils import prompt_list, scenes
from utils.sampling import native_size


def pick_prompts(
    pipe: DiffusionPipeline, count: int, file: str | None = None, split: str = "eval", flag: str | None = None
) -> tuple[list[str], str]:
    """`count` prompts for `pipe`, and where they come from in words.

    Those in `file`, which was given with `flag`, if any (all of them if there are fewer), else the set of this split,
    "eval" or "train", that suits the model: drawn scenes for a model made for 128 pixels such as tiny-flux, the prompts
    of prompt_list.py for FLUX. Raises ValueError if there are too few or the file is empty or unreadable.
    """
    if file is not None:
        return read_prompts(file, flag or ("--train_prompts" if split == "train" else "--prompts"))[:count], file
    world = scenes if native_size(pipe) == scenes.SIZE else prompt_list
    kind = "scenes" if world is scenes else "prompts"
    if split == "train":
        return world.train_prompts(count), f"training {kind} of {world.__name__.replace('.', '/')}.py"
    source = f"evaluation {kind} of {world.__name__.replace('.', '/')}.py"
    there = len(world.eval_prompts())
    if count > there:
        raise ValueError(f"--num_images {count}: there are {there} {source}; ask for fewer, or give --prompts")
    return world.eval_prompts(count), source


def read_prompts(file: str, flag: str = "--prompts") -> list[str]:
    """The prompts in a file: a JSON list of strings, or text with one a line.

    JSON is what is named .json, given with --prompts_json, or reads as a JSON list. Raises ValueError that names `flag`
    and `file` if it holds neither.
    """
    text = read_text(file, flag)
    is_json = flag == "--prompts_json" or Path(file).suffix.lower() == ".json"
    try:
        found = json.loads(text) if is_json or text.lstrip().startswith("[") else None
    except (ValueError, RecursionError) as error:
        if is_json:
            raise ValueError(f"{flag} {file}: cannot be read as a JSON list ({error})") from None
        found = None
    if is_json or isinstance(found, list):
        if not isinstance(found, list) or not all(isinstance(prompt, str) and prompt.strip() for prompt in found):
            raise ValueError(f"{flag} {file}: expected a JSON list of strings, one for each prompt")
        prompts = found
    else:
        # Not splitlines: a line separator within a prompt (U+2028, U+0085, a form feed) does not end it.
        prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{flag} {file}: no prompts in it; write one a line")
    return prompts


def read_text(file: str, flag: str) -> str:
    """The text of a file in UTF-8; ValueError that names `flag` and `file` if it is none."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {file}: cannot be read as UTF-8 text ({error})") from None
    if "\0" in text:
        raise ValueError(f"{flag} {file}: cannot be read as UTF-8 text (it holds zero bytes)")
    return text
