"""Words: pytest tests/test_words.py"""

from __future__ import annotations

import json
import lzma
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from effort import FACTOR, examples
from hypothesis import example, given, strategies as st

import siftloader.words
from siftloader.tokens import load_tokenizer, restore_tokenizer, tokenise
from siftloader.words import Words


pytest.importorskip("tokenizers")

DEMO = Path(__file__).resolve().parent.parent / "shards" / "demo"
CONTROL = "\x00\x0b\x0c\x1c\x1f\x7f\x85\xad\u200b\u200d\ufeff\ufffd"
SPACES = "\t\n\r \xa0\u1680\u2003\u2028\u2029\u202f\u3000\u180e"
MARKS = "\u0301\u0308\u0903\u20dd\u302e\u0345"
LETTERS = "éÉßİıſKÅΣςσ的가\u1100\u1161ﬁ“”—٣²"
TEXT = st.lists(
    st.one_of(
        st.sampled_from(
            ["[MASK]", "##s", "<|endoftext|>", "'s", "'ll", "'LL", " 're", "  ", "\n\n", " \n"]
        ),
        st.sampled_from([*CONTROL, *SPACES, *MARKS, *LETTERS]),
        st.text("abcXYZ019.,'[]#_ \n", min_size=1, max_size=6),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=40,
).map("".join)


def bert(**normaliser: Any) -> Any:
    whole = json.loads(load_tokenizer(DEMO / "tokenizer.json").to_str())
    whole["normalizer"].update(normaliser)
    return restore_tokenizer(json.dumps(whole))


def gpt() -> Any:
    """A byte-level tokenizer that joins what it can: a text cut elsewhere gets other ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    rng = random.Random(0)
    pieces = ["'s", "'ll", "'LL", "'re", *" \n\t\x1c\x85\xa0\u2003", *"ab01.,'é“", "  ", "\n\n"]
    texts = ["".join(rng.choices(pieces, k=200)) for _ in range(200)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return restore_tokenizer(tokenizer.to_str())


@pytest.fixture(
    scope="module",
    params=["bert", "bert-cased", "bert-accents", "bert-chinese", "gpt"],
)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return {
        "bert": lambda: bert(),
        "bert-cased": lambda: bert(lowercase=False),
        "bert-accents": lambda: bert(strip_accents=False),
        "bert-chinese": lambda: bert(handle_chinese_chars=False),
        "gpt": gpt,
    }[request.param]()


@examples(60, large=400)
@example(texts=["a\x85b \x85 a\x0bb a\x1cb", "“a b”\x85c"])
@example(texts=["a \n b\u3000\n\nc  d \u00e9", "é  \n x\n"])
@example(texts=["a  \x1c b  \x1c it'll 'LL don't  \x1f,,  ", "'ll'ré"])
@example(texts=["", "x" * 300, "x" * 2000 + " " + "x" * 2000])
@given(texts=st.lists(TEXT, max_size=4))
def test_the_ids_are_the_tokenizers(tokenizer: Any, texts: list[str]) -> None:
    words = Words.of(tokenizer)
    assert words is not None
    ids, lengths = words.tokenise(texts)
    wanted, counts = tokenise(texts, tokenizer)
    assert lengths.tolist() == counts.tolist()
    assert ids.tolist() == wanted.tolist()
    assert ids.dtype == wanted.dtype


def test_every_character_there_is(tokenizer: Any) -> None:
    words = Words.of(tokenizer)
    assert words is not None
    marks = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    step = 401 if FACTOR == 1 else 101  # more of them would not find more
    # ASCII goes a way of its own, so each of its characters is in a text of nothing else.
    some = marks[:0x300] + marks[0x300::step]
    for first in range(0, len(some), 1 << 11):
        texts = [f"a{m}b {m} C{m} {m}d\n{m}" for m in some[first : first + (1 << 11)]]
        assert words.tokenise(texts)[0].tolist() == tokenise(texts, tokenizer)[0].tolist()


def test_real_text_and_most_of_it_from_memory(tokenizer: Any) -> None:
    with lzma.open(DEMO / "embedded_pd.txt.xz", "rt", encoding="utf-8") as file:
        texts = file.read(400_000).split("\n\n")
    words = Words.of(tokenizer)
    assert words is not None
    ids, lengths = words.tokenise(texts)
    wanted, counts = tokenise(texts, tokenizer)
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_array_equal(lengths, counts)
    assert len(words.ids) < len(ids) / 8


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siftloader.words, "MOST", 10)
    tokenizer = bert()
    words = Words.of(tokenizer)
    assert words is not None
    texts = [" ".join(f"word{number}" for number in range(100)), "x" * 5000]
    assert words.tokenise(texts)[0].tolist() == tokenise(texts, tokenizer)[0].tolist()
    assert len(words.ids) <= 10
    assert max(map(len, words.ids)) <= siftloader.words.LONGEST


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": None},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"clean_text": False},
        {"special": False},
    ],
    ids=str,
)
def test_other_tokenizers_are_left_alone(change: dict[str, Any]) -> None:
    whole = json.loads(load_tokenizer(DEMO / "tokenizer.json").to_str())
    if "clean_text" in change:
        whole["normalizer"].update(change)
    elif "special" in change:
        whole["added_tokens"][0].update(change)
    else:
        whole.update(change)
    assert Words.of(restore_tokenizer(json.dumps(whole))) is None


def test_a_version_that_fails_the_trial_is_left_alone(monkeypatch):
    """Say, one whose normaliser joins what stands on either side of a space."""
    tokenizer = bert()
    assert Words.of(tokenizer) is not None
    monkeypatch.setattr(siftloader.words, "_BERT_ASCII", siftloader.words.re.compile("[A-Za-z]+"))
    assert Words.of(tokenizer) is None
    words = Words(tokenizer, lambda text: [word for word in text.split() if word.islower()])
    assert words.agree(["plain words"]) and not words.agree(["Two words"])
