"""Captions become integers in batches: ids, padding, mask, and captions that are too long."""

import warnings

import numpy as np
import pytest

from diffusion_jax.data.batching import batches
from diffusion_jax.data.text import Tokenized
from diffusion_jax.data.tokenizers import Tokenizer

START, END, PAD = 1, 2, 0


def _letters(text, length):
    """a is 3, b is 4, …, between a start and an end; computed here, by definition."""
    room = length - 2
    return [START, *(ord(letter) - 94 for letter in text[:room]), END], text[room:]


TOKENIZER = Tokenizer("clip", 6, 40, PAD, _letters, {})


class Captions:
    def __init__(self, *captions, **more):
        self.captions, self.more = captions, more

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        image = np.full((2, 2, 3), index / 10, np.float32)
        return {"image": image, "caption": self.captions[index], **self.more}


def test_tokens_and_mask_by_definition():
    source = Tokenized(Captions("abc", "", "abcd"), TOKENIZER, mask="token_mask")
    assert len(source) == 3
    expected = [
        ([1, 3, 4, 5, 2, 0], [True] * 5 + [False]),
        ([1, 2, 0, 0, 0, 0], [True] * 2 + [False] * 4),
        ([1, 3, 4, 5, 6, 2], [True] * 6),
    ]
    for index, (ids, mask) in enumerate(expected):
        example = source[index]
        assert set(example) == {"image", "tokens", "token_mask"}
        assert example["tokens"].dtype == np.int32 and example["token_mask"].dtype == bool
        np.testing.assert_array_equal(example["tokens"], ids)
        np.testing.assert_array_equal(example["token_mask"], mask)


def test_tokens_are_those_of_a_call_of_the_tokenizer():
    captions = ("abc", "", "zz")
    source = Tokenized(Captions(*captions), TOKENIZER, mask="mask")
    ids, mask = TOKENIZER(list(captions))
    np.testing.assert_array_equal([source[i]["tokens"] for i in range(3)], ids)
    np.testing.assert_array_equal([source[i]["mask"] for i in range(3)], mask)


def test_two_tokenizers_and_batches():
    first = Tokenized(Captions("a", "b", "c"), TOKENIZER, tokens="ids", drop_caption=False)
    assert first[1]["caption"] == "b"
    both = Tokenized(first, TOKENIZER.with_length(3), tokens="ids_2")
    (batch,) = batches(both, batch_size=3, seed=0, shuffle=False, num_epochs=1)
    assert {key: value.shape for key, value in batch.items()} == {
        "image": (3, 2, 2, 3),
        "ids": (3, 6),
        "ids_2": (3, 3),
    }
    np.testing.assert_array_equal(batch["ids_2"], [[1, 3, 2], [1, 4, 2], [1, 5, 2]])


def test_mirrored_images_and_tokens_do_not_mix():
    with pytest.raises(ValueError, match="flip mirrors only the image.*tokens"):
        batches(Tokenized(Captions("a"), TOKENIZER), batch_size=1, seed=0, flip=True)


def test_long_captions():
    source = Tokenized(Captions("abcdefg", "hijklmn"), TOKENIZER)
    with pytest.warns(UserWarning, match="caption 0 has more than 6 tokens: 'abcdefg'"):
        np.testing.assert_array_equal(source[0]["tokens"], [1, 3, 4, 5, 6, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert source[1]["tokens"][1] == ord("h") - 94
    source = Tokenized(Captions("a", "abcdefg"), TOKENIZER, on_long_caption="error")
    with pytest.raises(ValueError, match="caption 1 has more than 6 tokens.*shorten it"):
        source[1]


@pytest.mark.parametrize(
    "source, options, message",
    [
        ([{"image": 0}], {}, r"has no 'caption', but \['image'\]"),
        (Captions("a", tokens=1), {}, r"\['tokens'\] would stand for two"),
        (Captions("a", mask=1), {"mask": "mask"}, r"\['mask'\] would stand for two"),
        (Captions("a"), {"mask": "tokens"}, r"\['tokens'\] would stand for two"),
        (Captions("a"), {"tokens": "caption"}, r"\['caption'\] would stand for two"),
        (Captions("a"), {"on_long_caption": "cut"}, "one of .*got 'cut'"),
    ],
)
def test_bad_options(source, options, message):
    with pytest.raises(ValueError, match=message):
        Tokenized(source, TOKENIZER, **options)


@pytest.mark.parametrize("caption", [None, b"a cat", 3, ["a cat"], ["a", "b"], "\ud800"])
def test_a_caption_that_is_no_text(caption):
    name = f"the caption of example 1 of .*Captions.*{type(caption).__name__}"
    with pytest.raises(ValueError, match=name):
        Tokenized(Captions("a cat", caption), TOKENIZER)[1]
