"""Text to token ids: which tokenizer, what it calls its special tokens, documents through it.

tokenizer = load_tokenizer("bert/tokenizer.json")
about = describe_tokenizer(tokenizer, "bert/tokenizer.json", "mlm")
ids, lengths = tokenise(["One text.", "Another."], tokenizer)      # uint32, end to end
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siftloader.errors import CorpusError
from siftloader.shards import Tokenizer


PIECE = 1 << 18  # characters a tokenizer is given as one text
BATCH = 1 << 18  # characters it is given at a time; more is no faster, and takes memory
NEEDED = {  # special ids, by objective
    "mlm": ("pad", "cls", "sep", "mask"),
    "mlm-nsp": ("pad", "cls", "sep", "mask"),
    "clm": ("eos",),
}
SPECIAL = {  # key -> what tokenizers call it, the usual name first
    "pad": ("[PAD]", "<pad>", "<|pad|>", "<|padding|>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "eos": ("<|endoftext|>", "<|end_of_text|>", "[EOS]", "<eos>", "</s>"),
}


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """The ``tokenizers.Tokenizer`` of a file, a folder or a hub name, without its extras.

    Truncation and padding are switched off, and text that spells a special token stays text.
    """
    try:
        from tokenizers import Tokenizer as Fast
    except ImportError as error:
        raise CorpusError(
            "making shards needs the `tokenizers` package; pip install 'siftloader[prepare]'"
        ) from error
    path = Path(name)
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        raise CorpusError(
            f"{path}: no tokenizer.json in this folder; save the tokenizer there with "
            f"AutoTokenizer.from_pretrained(...).save_pretrained({str(name)!r})"
        )
    if not path.exists() and (path.suffix == ".json" or str(name).startswith((".", "/", "~"))):
        raise CorpusError(f"{path}: no such tokenizer file or folder (looked from {Path.cwd()})")
    try:
        if path.is_dir():
            tokenizer = Fast.from_file(str(path / "tokenizer.json"))
        elif path.exists():
            tokenizer = Fast.from_file(str(path))
        else:
            tokenizer = Fast.from_pretrained(str(name))
    except Exception as error:  # the Rust side raises bare Exception
        where = "" if path.exists() else "neither here nor on the hub "
        raise CorpusError(
            f"{name}: {where}a tokenizer that can be loaded ({error}); give a tokenizer.json, a "
            f"folder that holds one, or a hub name"
        ) from error
    return _plain(tokenizer)


def restore_tokenizer(serialised: str) -> Any:
    """The tokenizer that ``load_tokenizer(...).to_str()`` wrote, for another process."""
    from tokenizers import Tokenizer as Fast

    return _plain(Fast.from_str(serialised))


def _plain(tokenizer: Any) -> Any:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if getattr(tokenizer.model, "dropout", None):  # of merges, at random: other ids in every run
        tokenizer.model.dropout = None
    return tokenizer


def describe_tokenizer(tokenizer: Any, name: str | os.PathLike[str], objective: str) -> Tokenizer:
    """Name, hash, size and special ids; CorpusError if the objective needs one that is missing."""
    special = {}
    for key, names in SPECIAL.items():
        ids = [tokenizer.token_to_id(name) for name in names]
        found = [number for number in ids if number is not None]
        if found:
            special[key] = found[0]
    unknown = getattr(tokenizer.model, "unk_token", None)
    if "unk" not in special and unknown and tokenizer.token_to_id(unknown) is not None:
        special["unk"] = tokenizer.token_to_id(unknown)
    if "unk" not in special and not _knows_all(tokenizer):
        raise CorpusError(
            f"{os.fspath(name)}: a tokenizer with no token for what it does not know, and no bytes to fall "
            f"back on, so characters would vanish; give it an unk token, or choose another"
        )
    if objective == "clm" and "eos" not in special and "sep" in special:
        special["eos"] = special["sep"]  # BERT's vocabulary ends its texts with [SEP]
    missing = [key for key in NEEDED[objective] if key not in special]
    if missing:
        wanted = "; ".join(f"{key} ({', '.join(SPECIAL[key])})" for key in missing)
        raise CorpusError(
            f"{os.fspath(name)}: objective {objective!r} needs special "
            f"tokens this tokenizer lacks: {wanted}; add them or choose another tokenizer"
        )
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return Tokenizer(
        name=_tokenizer_name(name),
        sha256=_tokenizer_hash(tokenizer),
        vocab_size=max(vocabulary.values()) + 1,  # there may be holes
        special_ids=special,
    )


def _knows_all(tokenizer: Any) -> bool:
    # Whether any text at all has its ids: by bytes, one way or the other.
    whole = json.loads(tokenizer.to_str())
    return bool(whole["model"].get("byte_fallback")) or '"ByteLevel"' in json.dumps(
        [whole["normalizer"], whole["pre_tokenizer"]]
    )


def _tokenizer_name(name: str | os.PathLike[str]) -> str:
    # A folder's name tells more than "tokenizer.json"; the rest of the path is nobody's business.
    path = Path(name)
    if not path.exists():
        return str(name)
    path = path.absolute()  # a link keeps its own name: hubs link to files named by their hash
    return path.parent.name if path.name == "tokenizer.json" else path.stem


def _tokenizer_hash(tokenizer: Any) -> str:
    # What decides the ids, and nothing else: not the file's layout, nor padding or truncation.
    whole = json.loads(tokenizer.to_str())
    parts = {key: whole[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokenise(texts: Sequence[str], tokenizer: Any) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The ids of all texts end to end, no special ones among them, and how many each has, [D].

    A text above 262,144 characters goes through the tokenizer in pieces, cut at line ends where
    there are any: the tokenizer needs a hundred times the memory of the text it is given.
    """
    ids: list[NDArray[np.uint32]] = [np.empty(0, np.uint32)]
    lengths = np.zeros(len(texts), np.int64)
    for batch in _batches(_in_pieces(texts)):
        pieces = [piece for _, piece in batch]
        lists = [encoding.ids for encoding in _encoded(tokenizer, pieces)]
        counts = np.fromiter(map(len, lists), np.int64, len(lists))
        ids.append(np.fromiter(chain.from_iterable(lists), np.uint32, int(counts.sum())))
        np.add.at(lengths, [number for number, _ in batch], counts)
    return np.concatenate(ids), lengths


def _encoded(tokenizer: Any, pieces: Sequence[str]) -> Any:
    try:
        return tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
    except Exception as error:  # the Rust side raises bare Exception
        raise CorpusError(
            f"the tokenizer failed on text ({error}); mend it, or choose another"
        ) from error


# The number of a text, and a piece of it.
_Piece = tuple[int, str]


def _in_pieces(texts: Sequence[str]) -> Iterator[_Piece]:
    for number, text in enumerate(texts):
        first = 0
        while len(text) - first > PIECE:
            # After a line end, else before a space (byte-level vocabularies begin words with it).
            cut = text.rfind("\n", first, first + PIECE) + 1
            if cut <= first:
                cut = text.rfind(" ", first + 1, first + PIECE)
            if cut <= first:
                cut = first + PIECE
            yield number, text[first:cut]
            first = cut
        yield number, text[first:]


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    length = 0
    for piece in pieces:
        batch.append(piece)
        length += len(piece[1])
        if length >= BATCH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch
