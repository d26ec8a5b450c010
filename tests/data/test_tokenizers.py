"""Tokenizers on vocabularies of a few pieces, numbers found by hand; prompts that are none."""

import gzip
import io
import json
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Rust
from tokenizers import models, pre_tokenizers

from diffusion_jax.data import tokenizer_files
from diffusion_jax.data.byte_pairs import BytePairs, byte_letters, read_merges, read_vocabulary
from diffusion_jax.data.tokenizers import check_prompts, from_folder

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_PIECES = ["!", "c", "a", "t</w>", "at</w>", "cat</w>", "a</w>", "!</w>", START, END]
CLIP_CONFIG = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 6, "pad_token": END}
BERT_PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s", "!"]
LETTERS = byte_letters()
MERGES = [("c", "a"), ("ca", "t"), ("Ġ", "cat"), ("Ġ", "Ġ"), ("'", "s"), ("ð", "Ł")]
PAIR_PIECES = [*LETTERS, *(a + b for a, b in MERGES), END]


def write(folder: Path, **files) -> Path:
    """Files by name with "__" for the dot; objects as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def numbered(pieces) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(pieces)}


def write_clip(folder: Path, **config) -> Path:
    return write(
        folder,
        vocab__json=numbered(CLIP_PIECES),
        merges__txt="#version: 0.2\na t</w>\nc at</w>\n",
        tokenizer_config__json={**CLIP_CONFIG, **config},
    )


def write_bert(folder: Path) -> Path:
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": 6, "do_lower_case": True}
    return write(folder, vocab__txt="\n".join(BERT_PIECES) + "\n", tokenizer_config__json=config)


def write_glide(folder: Path) -> Path:
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES)
    return write(folder, encoder__json=numbered(PAIR_PIECES), vocab__bpe=merges)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory) -> Path:
    """A sentencepiece model that leaves text as it is, with T5's special pieces."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat", "a hat", "the cat sat", "that"] * 8),
        model_writer=model, vocab_size=18, model_type="unigram", pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, normalization_rule_name="identity", minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 16}
    folder = tmp_path_factory.mktemp("t5")
    return write(folder, spiece__model=model.getvalue(), tokenizer_config__json=config)


@pytest.mark.parametrize("pad, padding", [(END, 9), ("!", 0)])
def test_clip_pads_as_its_files_say(tmp_path, pad, padding):
    tokenizer = from_folder(write_clip(tmp_path, pad_token=pad))
    ids, mask = tokenizer(["A  \tcat", "", "cat cat cat cat"[:11]])
    expected = [[8, 6, 5, 9], [8, 9], [8, 5, 5, 5, 9]]
    for row, known, numbers in zip(ids, mask, expected, strict=True):
        np.testing.assert_array_equal(row, numbers + [padding] * (6 - len(numbers)))
        np.testing.assert_array_equal(known, np.arange(6) < len(numbers))
    assert ids.dtype == np.int32 and mask.dtype == bool
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.pad) == ("clip", 10, padding)
    one = tokenizer("A  \tcat")
    np.testing.assert_array_equal(one.ids, ids[0])
    np.testing.assert_array_equal(one.mask, mask[0])
    shorter = tokenizer(["cat", "a cat"], padding="longest")
    np.testing.assert_array_equal(shorter.ids, [[8, 5, 9, padding], [8, 6, 5, 9]])


def test_special_tokens_that_a_prompt_spells_out(tmp_path):
    folder = write_clip(tmp_path, pad_token="!")
    # SD 2's padding is an exclamation mark, and one that is typed becomes padding as well.
    np.testing.assert_array_equal(from_folder(folder)(f"a{END}!").ids, [8, 6, 9, 0, 9, 0])
    text = from_folder(folder, special_as_text=True)
    np.testing.assert_array_equal(text("a !").ids, [8, 6, 7, 9, 0, 0])


def test_openai_clip_numbers_follow_from_the_merges(tmp_path):
    """Visible bytes first: "!" is 0, "a" 64, their ends of words 256 later; then the merges."""
    packed = gzip.compress(b'"#version: 0.2\na t</w>\nc at</w>\n')
    tokenizer = from_folder(write(tmp_path, bpe_simple_vocab_16e6__txt__gz=packed), length=6)
    np.testing.assert_array_equal(tokenizer("a cat!").ids, [514, 320, 513, 256, 515, 0])
    assert tokenizer.pad == 0 and tokenizer.vocab_size == 516
    np.testing.assert_array_equal(tokenizer("a cat!").mask, [True] * 5 + [False])


def test_bert(tmp_path):
    ids, mask = from_folder(write_bert(tmp_path))("Á  cats!")
    np.testing.assert_array_equal(ids, [2, 5, 6, 7, 8, 3])
    assert mask.all()
    np.testing.assert_array_equal(from_folder(tmp_path)("dog").ids, [2, 1, 3, 0, 0, 0])


def test_t5_and_what_the_two_libraries_make_of_a_tab(t5_folder):
    ours = from_folder(t5_folder)
    theirs = from_folder(t5_folder, backend="sentencepiece")
    for text in ("a cat sat", "the  hat ", "", " that"):
        np.testing.assert_array_equal(ours(text).ids, theirs(text).ids)
    np.testing.assert_array_equal(ours("").ids, [1] + [0] * 15)
    assert ours("").mask.sum() == 1 and ours("a cat").ids[ours("a cat").mask.sum() - 1] == 1
    # transformers splits at any white space; the model has no piece for a tab.
    np.testing.assert_array_equal(ours("a\tcat").ids, ours("a cat").ids)
    assert 2 in theirs("a\tcat").ids and 2 not in theirs("a cat").ids
    with pytest.warns(UserWarning, match="lost its end, .*sat"):
        cut = from_folder(t5_folder, backend="sentencepiece", length=2)("a cat sat")
    np.testing.assert_array_equal(cut.ids, [theirs("a cat sat").ids[0], 1])


def test_glide(tmp_path):
    """ "cat" 257, " cat" 258, two spaces 259, "'s" 260; lower case, white space kept."""
    tokenizer = from_folder(write_glide(tmp_path), length=6)
    ids, mask = tokenizer(["Cat CAT's", "", "  cat"])
    space = LETTERS[ord(" ")]
    np.testing.assert_array_equal(ids[0], [257, 258, 260, 262, 262, 262])
    np.testing.assert_array_equal(ids[1], [262] * 6)
    np.testing.assert_array_equal(ids[2], [PAIR_PIECES.index(space), 258] + [262] * 4)
    np.testing.assert_array_equal(mask.sum(1), [3, 0, 2])
    # A special token in a text is thirteen signs.
    assert tokenizer.encode(END, 99)[0] == [ord(c) for c in END]
    with pytest.warns(UserWarning, match="lost its end, ' cat'"):
        assert from_folder(tmp_path, length=1)("cat cat").ids.tolist() == [257]


def test_byte_pairs_equal_another_implementation():
    """The tokenizers library's byte-level model, on letters of all kinds."""
    vocabulary = numbered(PAIR_PIECES)
    other = Rust(models.BPE(vocabulary, MERGES))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs, rng = BytePairs(vocabulary, MERGES), random.Random(0)
    letters = "cat  'sdon't\n\t\u00a0\u3000éñß日本語😀\u200d\ufe0f\x00\x7f0٣½_<|>." + "e\u0301"
    for _ in range(300):
        text = "".join(rng.choices(letters, k=rng.randrange(40)))
        numbers = pairs.encode(text)
        assert numbers == other.encode(text.lower()).ids, repr(text)
        assert pairs.decode(numbers) == text.lower()
    assert pairs.encode("cat" * 5000) == [257] * 5000


@pytest.mark.parametrize("length, lost", [(4, "cat  a"), (3, "CAT cat  a")])
def test_what_is_cut_off_is_shown(tmp_path, length, lost):
    tokenizer = from_folder(write_clip(tmp_path), length=length)
    prompts = ["a", "a CAT cat  a", "cat", "a a a a"]
    with pytest.warns(UserWarning) as caught:
        ids, mask = tokenizer(prompts)
    (warning,) = caught
    assert "2 of 4 prompts" in str(warning.message) and f"prompt 1 lost {lost!r}" in str(
        warning.message
    )
    assert warning.filename == __file__
    assert ids.shape == (4, length) and ids[1, 0] == 8 and ids[1, -1] == 9 and mask[1].all()
    with pytest.raises(ValueError, match=f"more than {length} tokens.*on_long_prompt='warn'"):
        tokenizer(prompts, on_long_prompt="error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(["a", "cat "])


@pytest.mark.parametrize(
    "prompts, message",
    [
        (None, "got NoneType: None; '' is the prompt"),
        (3, "got int: 3"),
        (b"cat", r"got bytes: b'cat'; decode it"),
        ({"cat"}, "got set"),
        ([], "empty list"),
        ((), "empty list"),
        (np.zeros((1, 1), "U3"), "got ndarray"),
        (["cat", None], "prompt 1 is no string but NoneType"),
        (["cat", "", 2.5], "prompt 2 is no string but float: 2.5"),
        ([b"cat"], "prompt 0 is no string but bytes.*decode it"),
        ([["cat"]], "prompt 0 is no string but list"),
        (["cat", "a\ud83d b"], r"prompt 1 \(str\) has half of a surrogate pair.*at character 1"),
        ("\udc00", r"the prompt \(str\) has half of a surrogate pair"),
    ],
)
def test_what_is_no_prompt_is_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        check_prompts(prompts)


def test_what_is_a_prompt_passes():
    assert check_prompts("") == ("",)
    assert check_prompts(("a", "\U0001f600")) == ("a", "\U0001f600")
    assert check_prompts(np.asarray(["a", "b"])) == ("a", "b")


def test_a_pipelines_tokenizers_are_found_and_come_back(tmp_path, t5_folder):
    write_clip(tmp_path / "sd/tokenizer")
    write_clip(tmp_path / "sd/tokenizer_2", pad_token="!")
    write_glide(tmp_path / "glide")
    openai = write(tmp_path / "openai", bpe_simple_vocab_16e6__txt="#\na t</w>\n")
    tokenizers = [
        from_folder(tmp_path / "sd", length=5),
        from_folder(tmp_path / "sd", subfolder="tokenizer_2"),
        from_folder(t5_folder),
        from_folder(tmp_path / "glide", length=9),
        from_folder(openai, length=9),
    ]
    for index, tokenizer in enumerate(tokenizers):
        tokenizer.save(tmp_path / f"out/{index}")
        again = from_folder(tmp_path / f"out/{index}")
        assert (again.kind, again.length, again.pad) == (
            tokenizer.kind,
            tokenizer.length,
            tokenizer.pad,
        )
        for ours, theirs in zip(again(["cat", ""]), tokenizer(["cat", ""]), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert tokenizers[0].pad == 9 and tokenizers[1].pad == 0
    vocab = "sd/tokenizer/vocab.json"
    assert (tmp_path / "out/0/vocab.json").read_bytes() == (tmp_path / vocab).read_bytes()


def broken(folder: Path, name: str) -> None:
    write_clip(folder)
    match name:
        case "class":
            write_clip(folder, tokenizer_class="XLMRobertaTokenizer")
        case "code":
            write_clip(folder, auto_map={"AutoTokenizer": ["x.T", None]})
        case "left":
            write_clip(folder, padding_side="left")
        case "length":
            write_clip(folder, model_max_length=10**30)
        case "missing":
            (folder / "merges.txt").unlink()
        case "json":
            write(folder, tokenizer_config__json="{")
        case "list":
            write(folder, tokenizer_config__json=[])
        case "vocabulary":
            write(folder, vocab__json="[1]")
        case "two":
            (folder / "tokenizer_config.json").unlink()
            write_glide(folder)
        case "none":
            for path in folder.iterdir():
                path.unlink()


@pytest.mark.parametrize(
    "name, message",
    [
        ("class", "'XLMRobertaTokenizer' is unsupported.*'CLIPTokenizer'"),
        ("code", "auto_map names code"),
        ("left", "padding_side = 'left'"),
        ("length", "give length=, 77 for CLIP"),
        ("missing", "needs vocab.json with merges.txt or tokenizer.json.*found"),
        ("json", "tokenizer_config.json: not JSON"),
        ("list", "expected an object, got list"),
        ("vocabulary", "cannot read this clip tokenizer"),
        ("two", r"make \['clip', 'glide'\].*kind="),
        ("none", "no tokenizer in .*looked for"),
    ],
)
def test_folders_that_cannot_be_read_say_why(tmp_path, name, message):
    broken(tmp_path, name)
    with pytest.raises(ValueError, match=message):
        from_folder(tmp_path)


def test_arguments_that_cannot_be_say_why(tmp_path, t5_folder):
    folder = write_clip(tmp_path)
    for options, message in (
        ({"backend": "torch"}, "backend must be one of"),
        ({"backend": "sentencepiece"}, "has clip's"),
        ({"kind": "gpt"}, "kind must be one of"),
        ({"kind": "t5"}, "tokenizer_class 'CLIPTokenizer' is not 't5'"),
        ({"length": 1}, "length must be at least 2, got 1"),
        ({"subfolder": "text"}, "no tokenizer in .*text"),
    ):
        with pytest.raises(ValueError, match=message):
            from_folder(folder, **options)
    tokenizer = from_folder(folder)
    with pytest.raises(ValueError, match="padding must be one of.*got 'max_length'"):
        tokenizer("a", padding="max_length")
    with pytest.raises(ValueError, match="on_long_prompt must be one of.*got 'ignore'"):
        tokenizer("a", on_long_prompt="ignore")


def test_vocabularies_that_do_not_fit_say_why(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="numbers 0 … N-1"):
        read_vocabulary('{"a": 0, "b": 2}', "encoder.json")
    with pytest.raises(ValueError, match="encoder.json: not JSON"):
        read_vocabulary("{", "encoder.json")
    with pytest.raises(ValueError, match="encoder.json: not JSON"):
        read_vocabulary("[" * 10**5, "encoder.json")
    with pytest.raises(ValueError, match="vocab.bpe, line 3: expected two pieces, got 'a b c'"):
        read_merges("#version\nc a\na b c\n", "vocab.bpe")
    with pytest.raises(ValueError, match="lacks 1 pieces, the first is 'xy'"):
        BytePairs(numbered(LETTERS), [("x", "y")])
    write_glide(tmp_path)
    packed = gzip.compress((tmp_path / "vocab.bpe").read_bytes())
    (tmp_path / "vocab.bpe").unlink()
    write(tmp_path, vocab__bpe__gz=packed)
    assert from_folder(tmp_path, length=2)("cat").ids[0] == 257
    for broken_gz in (packed[:-12], packed[:10] + b"\xff" + packed[11:]):
        write(tmp_path, vocab__bpe__gz=broken_gz)
        with pytest.raises(ValueError, match="vocab.bpe: cannot be read"):
            from_folder(tmp_path, length=2)
    write(tmp_path, vocab__bpe__gz=gzip.compress(b"a" * 10**5))
    monkeypatch.setattr(tokenizer_files, "_MAX_BYTES", 10**4)
    with pytest.raises(ValueError, match="more than 10000 bytes"):
        from_folder(tmp_path, length=2)


@pytest.mark.slow
def test_transformers_comes_late_and_does_not_ask_for_torch(tmp_path):
    program = (
        "import sys; from diffusion_jax.data.tokenizers import from_folder;"
        "assert 'transformers' not in sys.modules and 'sentencepiece' not in sys.modules;"
        f"print(from_folder({str(write_clip(tmp_path))!r})('cat').ids.tolist());"
        "assert 'torch' not in sys.modules and 'jax' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[8, 5, 9, 9, 9, 9]" and "PyTorch" not in done.stderr
