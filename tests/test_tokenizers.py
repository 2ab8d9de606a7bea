"""utils/tokenizers.py: what is learnt from the same prompts is the same, and gives words back."""

from utils import scenes
from utils.tokenizers import TEXT_LENGTH, make_tokenizers


def test_the_same_prompts_give_the_same_tokens():
    prompts = scenes.train_prompts(200)
    first, second = (make_tokenizers(prompts) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.get_vocab() == other.get_vocab()
        assert one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()


def test_words_come_back_from_tokens_and_ends_of_words_are_in_order():
    prompts = scenes.train_prompts(200)
    clip, t5 = make_tokenizers(prompts, clip_length=30)
    assert (clip.model_max_length, t5.model_max_length) == (30, TEXT_LENGTH)
    for prompt in prompts[:20]:
        words = prompt.lower().replace(".", " .").strip()
        assert clip.decode(clip(prompt).input_ids, skip_special_tokens=True).strip() == words
    tokens = sorted(clip.get_vocab(), key=clip.get_vocab().get)
    ends = [token for token in tokens if token.endswith("</w>") and len(token) == 5]
    assert len(ends) > 10 and ends == sorted(ends)
    assert sorted(clip.get_vocab().values()) == list(range(len(tokens)))
