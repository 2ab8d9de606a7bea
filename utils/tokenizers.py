"""Tokenizers of a FLUX pipeline, made from prompts: nothing has to be downloaded."""

import json
import math
from collections.abc import Sequence

import transformers

TEXT_LENGTH = 24  # tokens of tiny-flux; the longest prompt of utils/scenes.py has 22
END = "</w>"
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizers(
    prompts: Sequence[str], clip_length: int = TEXT_LENGTH, t5_length: int = TEXT_LENGTH
) -> tuple[transformers.CLIPTokenizer, transformers.T5Tokenizer]:
    """CLIP: byte-pair encoding learnt from the prompts. T5: a unigram model whose pieces are the prompts' words,
    scored by log frequency, with single characters to spell what it does not know. The lengths are in tokens."""
    blank = transformers.CLIPTokenizer(
        vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[], model_max_length=clip_length
    )
    clip = sorted_ends(blank.train_new_from_iterator(prompts, vocab_size=512, show_progress=False))

    counts: dict[str, int] = {}
    for prompt in prompts:
        for word in prompt.rstrip(".").split():
            counts[word] = counts.get(word, 0) + 1
    total = sum(counts.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\u2581{word}", math.log(count / total)) for word, count in sorted(counts.items())]
    pieces += [(piece, -20.0) for piece in ["\u2581", *map(chr, range(33, 127))]]
    return clip, transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=t5_length)


def sorted_ends(learnt: transformers.CLIPTokenizer) -> transformers.CLIPTokenizer:
    """The tokenizer with the characters that end a word in order. Training numbers them anew each time, which gives the
    same prompt other tokens."""
    model = json.loads(learnt.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    ends = iter(sorted(token for token in tokens if is_end(token)))
    vocab = {next(ends) if is_end(token) else token: number for number, token in enumerate(tokens)}
    merges = [tuple(pair) for pair in model["merges"]]
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=learnt.model_max_length)


def is_end(token: str) -> bool:
    """Whether it is a single character at the end of a word."""
    return len(token) == 1 + len(END) and token.endswith(END)


def make_qwen_tokenizer(prompts: Sequence[str], vocabulary: int, length: int) -> transformers.Qwen2Tokenizer:
    """Byte-pair encoding learnt from the prompts, of at most `vocabulary` tokens, with a chat's turns as FLUX.2-klein
    wraps its prompts in. `length` is in tokens."""
    turns = ["<|im_start|>", "<|im_end|>"]
    blank = transformers.Qwen2Tokenizer(model_max_length=length)
    made = blank.train_new_from_iterator(prompts, vocab_size=vocabulary - len(turns), show_progress=False)
    made.add_special_tokens({"additional_special_tokens": turns})
    made.chat_template = CHAT
    return made
