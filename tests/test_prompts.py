"""Prompts of a file or of the set that suits the model."""

from types import SimpleNamespace

import pytest

from utils import prompt_list, scenes
from utils.prompts import pick_prompts


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
