"""Make everything in shards/demo from embedded_pd.txt.xz; twice gives the same bytes.

python tools/make_demo_data.py            # writes tokenizer.json, then the shards

The tokenizer is a WordPiece vocabulary of 8,192 entries trained on the whole text; bpe-2048.json is a small
byte-level one for tools/compare.py, whose tiny models would else spend their time in the head. The shards hold
the beginning of every document, so that all the books are in them: about 2,400 samples of 128 tokens
to train on and 100 held out.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from siftloader.cli import report  # noqa: E402
from siftloader.corpus import read_documents  # noqa: E402
from siftloader.files import find_inputs  # noqa: E402
from siftloader.prepare import Preparation, prepare  # noqa: E402


TEXT = "embedded_pd.txt.xz"
VOCABULARY = 8192
SHARE = 0.093  # of every document goes into the shards
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # ids 0..4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "shards" / "demo")
    folder: Path = parser.parse_args().folder
    texts = [document.text for document in read_documents(find_inputs([str(folder / TEXT)]))]
    train_tokenizer(texts, folder / "tokenizer.json")
    train_small_tokenizer(texts, folder / "bpe-2048.json")
    with tempfile.TemporaryDirectory() as scratch:
        excerpt = Path(scratch, "embedded_pd.txt")
        excerpt.write_text("\n\n".join(map(beginning, texts)), encoding="utf-8", newline="")
        built = Path(scratch, "demo")
        summary = prepare(
            [str(excerpt)],
            Preparation(
                out=built,
                tokenizer=folder / "tokenizer.json",
                objective="mlm",
                seq_len=128,
                val_fraction=0.05,
                seed=0,
                samples_per_shard=640,
            ),
        )
        for file in sorted(built.iterdir(), key=lambda file: file.name == "manifest.jsonl"):
            shutil.copyfile(file, folder / file.name)
    print(report(summary))


def train_tokenizer(texts: list[str], out: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer numbers "##a", "##b" ... in the order of a randomly seeded map, and breaks ties by
    # these numbers, so no two runs would agree. Given as special tokens, they are numbered first.
    continued = {
        character
        for text in texts
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(
            tokenizer.normalizer.normalize_str(text)
        )
        for character in word[1:]
    }
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL + [f"##{character}" for character in sorted(continued)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)

    clean = Tokenizer(models.WordPiece(vocab=tokenizer.get_vocab(), unk_token="[UNK]"))
    clean.normalizer = tokenizer.normalizer
    clean.pre_tokenizer = tokenizer.pre_tokenizer
    clean.decoder = decoders.WordPiece()
    clean.add_special_tokens(SPECIAL)
    clean.save(str(out))


def train_small_tokenizer(texts: list[str], out: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(out))


def beginning(text: str) -> str:
    """Whole paragraphs from the start of a document until SHARE of it is reached."""
    return "\n".join(_until(text.splitlines(), SHARE * len(text)))


def _until(paragraphs: list[str], length: float) -> Iterator[str]:
    for paragraph in paragraphs:
        yield paragraph
        length -= len(paragraph)
        if length <= 0:
            return


if __name__ == "__main__":
    main()
