"""Texts to token ids, each word looked at once: the same ids as the tokenizer's, several times as fast.

    words = Words.of(tokenizer)                # None: this tokenizer does not take texts word by word
    ids, lengths = words.tokenise(texts)       # as tokenise(texts, tokenizer)

Tokenizers cut a text to words before anything else, and what becomes of a word depends on the word
alone. A word that is new is asked of the tokenizer, one seen before is looked up. Only words of ASCII
are cut here; what stands together with any other character is asked for as it is. The tokenizer stays
the judge: kinds that are not known to work so, and versions that fail a trial, are left alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray


MOST = 1 << 19  # words that are remembered; about 100 MB
LONGEST = 1 << 10  # characters of one that is

Split = Callable[[str], list[str]]

# What is known to part tokenizers: marks, signs, spaces and capitals next to one another.
_TRIAL = [
    "Don't he'll I'M we've 3.14 1,000 U.S.A. e-mail x_y [MASK] [SEP] <s> ##ing @#$%^&*()",
    "  two  spaces\n\nand\tlines \r\n end ",
    "Zoë naïve façade ÅNGSTRÖM ﬁne Straße İstanbul ΣΟΦΟΣ “quoted” — dash… €5 x²",
    "漢字とかな 한국어 עברית العربية हिन्दी a\u0301b\u200bc\u00add\ufeffe\u2003f\x85g\xa0h\x1ci",
    "a" * 120 + " é" + "b" * 300 + " 😀 👩‍👩‍👧 \ufffd",
]

# White space as the tokenizers' Rust has it: Python's own takes \x1c..\x1f too.
_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


class Words:
    """The words of a tokenizer, each with its ids."""

    def __init__(self, tokenizer: Any, split: Split) -> None:
        self.split, self.ids = split, _Ids(tokenizer)

    @classmethod
    def of(cls, tokenizer: Any) -> Words | None:
        """Words of a tokenizer that takes texts word by word; None if this one does not."""
        about = json.loads(tokenizer.to_str())
        plain = (
            all(token["special"] for token in about["added_tokens"])
            and tokenizer.encode_special_tokens
            and not about["truncation"]
            and not about["padding"]
        )
        split = _bert(about) or _byte_level(about)
        if not plain or not split:
            return None
        words = cls(tokenizer, split)
        return words if words.agree(_TRIAL) else None

    def agree(self, texts: Sequence[str]) -> bool:
        """Whether the tokenizer gives the same ids for these texts as a whole."""
        whole = self.ids.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = np.array([number for encoding in whole for number in encoding.ids], np.uint32)
        return np.array_equal(ids, self.tokenise(texts)[0])

    def tokenise(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """The ids of all texts end to end, no special ones among them, and how many each has, [D]."""
        get = self.ids.__getitem__
        parts = [np.empty(0, np.uint32)]
        lengths = np.zeros(len(texts), np.int64)
        for number, text in enumerate(texts):
            ids = list(chain.from_iterable(map(get, self.split(text))))
            lengths[number] = len(ids)
            parts.append(np.array(ids, np.uint32))
        return np.concatenate(parts), lengths


class _Ids(dict[str, list[int]]):
    # A word that is not there is asked of the tokenizer.

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, word: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(word, add_special_tokens=False).ids
        if len(word) <= LONGEST:
            if len(self) >= MOST:
                self.clear()
            self[word] = ids
        return ids


# BERT: cut at white space, which goes, and at punctuation, which stays. The normaliser deletes the
# control characters first, which joins what stands on either side; \x85 is one of them.
_BERT_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_BERT_ASCII = re.compile("[A-Za-z0-9]+|[!-/:-@[-`{-~]")
_BERT_SPACE = "".join(mark for mark in _SPACE if mark not in "\x0b\x0c\x85")
_BERT_OTHER = re.compile(
    rf"[!-~]*[^\x00-\x7f{_BERT_SPACE}][^{_BERT_SPACE}]*|{_BERT_ASCII.pattern}"
)


def _bert(about: Mapping[str, Any]) -> Split | None:
    normaliser = about["normalizer"] or {}
    if not (
        normaliser.get("type") == "BertNormalizer"
        and normaliser["clean_text"]
        and (about["pre_tokenizer"] or {}).get("type") == "BertPreTokenizer"
        and about["model"]["type"] == "WordPiece"
    ):
        return None
    lowercase = bool(normaliser["lowercase"])

    def split(text: str) -> list[str]:
        if _BERT_CONTROL.search(text):
            text = _BERT_CONTROL.sub("", text)
        if text.isascii():
            return _BERT_ASCII.findall(text.lower() if lowercase else text)
        found: list[str] = []
        for line in text.split("\n"):
            if line.isascii():
                found += _BERT_ASCII.findall(line.lower() if lowercase else line)
            else:
                found += _BERT_OTHER.findall(line)
        return found

    return split


# GPT-2: a word takes the space before it along, nothing goes. A text may be cut before white space
# wherever none stands before that: no word reaches across.
_BYTES_SPACE = "[\t-\r ]"
_BYTES_ASCII = re.compile(
    f"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\t-\r A-Za-z0-9]+"
    f"|{_BYTES_SPACE}+(?![^\t-\r ])|{_BYTES_SPACE}+"
)
_BYTES_LINES = re.compile(rf"(?<=[^{_SPACE}])(?=\n)")
_BYTES_OTHER = re.compile(rf"[{_SPACE}]*[^{_SPACE}]+|[{_SPACE}]+")


def _byte_level(about: Mapping[str, Any]) -> Split | None:
    pre_tokenizer, model = about["pre_tokenizer"] or {}, about["model"]
    if not (
        about["normalizer"] is None
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("use_regex", True)
        and not pre_tokenizer["add_prefix_space"]
        and model["type"] == "BPE"
        and not model["dropout"]
    ):
        return None

    def split(text: str) -> list[str]:
        if text.isascii():
            return _BYTES_ASCII.findall(text)
        found: list[str] = []
        for line in _BYTES_LINES.split(text):
            found += (_BYTES_ASCII if line.isascii() else _BYTES_OTHER).findall(line)
        return found

    return split
