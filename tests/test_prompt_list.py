"""The prompts: enough of them, well formed, mixed, and the same everywhere."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from utils import prompt_list
from utils.prompt_list import CATEGORIES, eval_prompts, train_prompts

ROOT = Path(__file__).parents[1]
ALL = eval_prompts() + train_prompts()


def digest(prompts: list[str]) -> str:
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def test_enough_prompts_and_all_different():
    assert len(train_prompts()) >= 10_000
    assert len(eval_prompts()) == 256
    assert len({" ".join(prompt.lower().split()) for prompt in ALL}) == len(ALL)  # so the two sets are disjoint, too


def test_evaluation_set_is_fixed():
    """Results are comparable only on the same prompts: a new digest means that published tables must be made again."""
    assert digest(eval_prompts()) == "8b0ac7d2f75d58a4b774fb3e20a6909ebffdec70ccd4ce51a39df92442526765"


@pytest.mark.parametrize("hash_seed", ["0", "1234"])
def test_same_prompts_in_every_process(hash_seed):
    code = "from utils.prompt_list import *; print('\\n'.join(eval_prompts() + train_prompts()))"
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONIOENCODING": "utf-8"}
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert output.stdout.decode().splitlines() == ALL


def test_a_short_list_is_the_start_of_a_long_one():
    assert train_prompts(100) == train_prompts()[:100]
    assert eval_prompts(10) == eval_prompts()[:10]
    assert prompt_list.get_default_prompts(3) == train_prompts(3)


def test_every_round_has_every_category():
    """Checked against the sentences that each category can start from, so it does not trust the order of the list."""
    of = {prompt_list._compose(c, i).lower(): c for c in reversed(CATEGORIES) for i in range(3_000)}
    for prompts in (train_prompts(), eval_prompts()):
        assert {of[prompt.lower()] for prompt in prompts[:64]} == set(CATEGORIES)
    counts = [sum(of[prompt.lower()] == c for prompt in eval_prompts()) for c in CATEGORIES]
    assert max(counts) - min(counts) <= 2, "the evaluation set is not balanced"
    every_second = {of[prompt.lower()] for prompt in train_prompts()[:128:2]}
    assert every_second == set(CATEGORIES), "a rank that takes every second prompt misses a category"


def test_lists_are_copies():
    train_prompts().clear()
    assert train_prompts()


@pytest.mark.parametrize("get", [train_prompts, eval_prompts])
@pytest.mark.parametrize("n", [0, -1, 20_000])
def test_bad_n(get, n):
    with pytest.raises(ValueError, match=f"^{n} .* prompts asked for.*$"):
        get(n)


def test_form():
    for prompt in ALL:
        assert 3 <= len(prompt.split()) <= 40, prompt
        assert prompt == prompt.strip(), prompt
        assert not re.search(r"[{}|\n]|  | [,.;]|[,;:][,.;:]|[,;:]$", prompt), prompt
        assert prompt.count('"') % 2 == 0, prompt
        assert not re.search(r"\b(\w+) \1\b", prompt.lower()), prompt
        assert prompt.endswith(".") <= prompt[0].isupper(), prompt


def test_articles():
    """By the first letter, with every exception named; the code under test goes by patterns."""
    vowel_letter_consonant_sound = {"unicycle", "unicorn", "user", "used", "European", "one"}
    consonant_letter_vowel_sound = {"hourglass", "honest", "85mm", "8-bit"}
    for prompt in ALL:
        for article, word in re.findall(r"\b([Aa]n?) ([\w-]+)", prompt):
            vowel = word[0].lower() in "aeiou" and word not in vowel_letter_consonant_sound
            assert (article.lower() == "an") == (vowel or word in consonant_letter_vowel_sound), prompt


def test_grammar_has_no_loose_ends():
    options = prompt_list._OPTIONS
    named = {name for texts in options.values() for text in texts for name in re.findall(r"\{(\w+)\}", text)}
    assert named | set(CATEGORIES) == set(options)
