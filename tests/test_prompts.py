"""Prompts of a file or of the set that suits the model."""

import json
from types import SimpleNamespace

import pytest

from utils import prompt_list, scenes
from utils.prompts import pick_prompts, read_prompts


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
    with pytest.raises(ValueError, match=r"^--num_images 5000: there are (1200|256) evaluation (scenes|prompts) of"):
        pick_prompts(made_for(size), 5000)


def test_prompts_from_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff  a cat\r\n\r\nein Mädchen \n\t\n三つの星".encode())
    lines = ["a cat", "ein Mädchen", "三つの星"]
    for count in (1, 2, 3, 99):
        assert pick_prompts(made_for(128), count, str(file)) == (lines[:count], str(file))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\f", "\v", "\x1c"])
def test_a_line_ends_with_a_newline_and_nothing_else(separator, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(f"a red{separator}star\na ring".encode())
    assert read_prompts(str(file)) == [f"a red{separator}star", "a ring"]


@pytest.mark.parametrize("name", ["prompts.json", "prompts.txt"])
def test_a_json_list_is_seen_from_the_file(name, tmp_path):
    file = tmp_path / name
    file.write_text(json.dumps(["a cat", "ein Mädchen\nim Garten"], indent=1))
    assert pick_prompts(made_for(128), 9, str(file))[0] == ["a cat", "ein Mädchen\nim Garten"]


def test_text_that_only_looks_like_json(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text('[photo] a cat\n"a dog"\n7 stars')
    assert read_prompts(str(file)) == ["[photo] a cat", '"a dog"', "7 stars"]


@pytest.mark.parametrize(
    "content", ['"a star"', "[1, 2]", '[["a"], ["b"]]', '{"a": "b"}', "7", "[", "[" * 10**5, '[""]']
)
def test_json_that_is_no_list_of_prompts(content, tmp_path):
    for name, flag in (("prompts.json", "--prompts"), ("prompts", "--prompts_json")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"^{flag} {tmp_path / name}: (expected|cannot be read as) a JSON list"):
            read_prompts(str(tmp_path / name), flag)
    (tmp_path / "prompts.json").write_text("[]")
    with pytest.raises(ValueError, match="no prompts in it"):
        read_prompts(str(tmp_path / "prompts.json"))


@pytest.mark.parametrize(
    "content", [None, b"", b" \n\n", b"caf\xe9", b"\0" * 500_000, bytes(range(256)) * 1000, "folder"]
)
def test_prompt_files_that_are_none(content, tmp_path):
    file = tmp_path / "prompts.txt"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^--prompts {file}: (cannot be read as UTF-8 text|no prompts in it)") as e:
        pick_prompts(made_for(128), 3, str(file))
    assert len(str(e.value)) < 300
