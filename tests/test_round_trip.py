"""Whatever the text lay in, its tokens decode back to it: from files to shards and back."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from compressions import COMPRESS
from tokenizers import Tokenizer, models, pre_tokenizers

from siftloader.prepare import Preparation, prepare
from siftloader.shards import ShardSet


pa = pytest.importorskip("pyarrow")

BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
DOCUMENTS = [f"tale {n} begins here, and it ends with word{n}." for n in range(7)]


def txt() -> bytes:
    return "\n\n".join(DOCUMENTS).encode()


def jsonl() -> bytes:
    records = ({"id": n, "text": text} for n, text in enumerate(DOCUMENTS))
    return "\n".join(map(json.dumps, records)).encode()


def table() -> pa.Table:
    return pa.table({"id": list(range(len(DOCUMENTS))), "text": DOCUMENTS})


def parquet() -> bytes:
    from pyarrow import parquet as tables

    sink = io.BytesIO()
    tables.write_table(table(), sink, row_group_size=2)
    return sink.getvalue()


def arrow() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table().schema) as file:
        file.write_table(table(), max_chunksize=3)
    return sink.getvalue().to_pybytes()


def comma_separated() -> bytes:
    sink = io.StringIO()
    writer = csv.writer(sink)
    writer.writerow(["id", "text"])
    writer.writerows(enumerate(DOCUMENTS))
    return sink.getvalue().encode()


def tar() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as file:
        for n, text in enumerate(DOCUMENTS):
            info = tarfile.TarInfo(f"{n:04d}.txt")
            info.size = len(text)
            file.addfile(info, io.BytesIO(text.encode()))
    return sink.getvalue()


def wiki() -> bytes:
    pytest.importorskip("mwparserfromhell")
    pages = "".join(
        f"<page><title>Page {n}</title><ns>0</ns><revision><text>'''{escape(text[:6])}'''"
        f"{escape(text[6:])}{{{{stub}}}}</text></revision></page>\n"
        for n, text in enumerate(DOCUMENTS)
    )
    return f'<mediawiki xml:lang="en">\n{pages}</mediawiki>\n'.encode()


FORMATS = {
    ".txt": txt,
    ".jsonl": jsonl,
    ".parquet": parquet,
    ".arrow": arrow,
    ".csv": comma_separated,
    ".tar": tar,
    ".xml": wiki,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """One that loses nothing but white space."""
    marks = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    texts = [*DOCUMENTS, *(f"Page {n}" for n in range(len(DOCUMENTS)))]
    words = {word for text in texts for word, _ in marks.pre_tokenize_str(text)}
    vocabulary = {word: n for n, word in enumerate([*BERT, *sorted(words)])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = marks
    made.add_special_tokens(list(BERT))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def packed_words(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("compression", COMPRESS, ids=lambda name: name or "plain")
@pytest.mark.parametrize("suffix", FORMATS)
def test_tokens_decode_back_to_the_documents(tmp_path, tokenizer, suffix, compression):
    """All of them in one sample, so in their order, with [SEP] between them."""
    path = tmp_path / f"corpus{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](FORMATS[suffix]()))
    options = Preparation(tmp_path / "out", tokenizer, seq_len=512, val_fraction=0)
    summary = prepare([str(path)], options)
    assert summary.documents == len(DOCUMENTS) and not summary.skipped and summary.unknown == 0
    (shard,) = ShardSet.open(tmp_path / "out").manifest
    (row,) = ShardSet.open(tmp_path / "out").read(shard).tolist()
    text = Tokenizer.from_file(str(tokenizer)).decode(row, skip_special_tokens=False)
    found = text.replace("[PAD]", "").replace("[CLS]", "").split("[SEP]")
    title = "Page{}" if suffix == ".xml" else ""
    expected = [title.format(n) + packed_words(text) for n, text in enumerate(DOCUMENTS)]
    assert [packed_words(part) for part in found if part.strip()] == expected


@pytest.mark.parametrize("objective", ["clm", "mlm-nsp"])
def test_every_objective_decodes_back_to_the_words(tmp_path, tokenizer, objective):
    path = tmp_path / "corpus.txt"
    path.write_bytes(txt())
    length = 16 if objective == "clm" else 40
    options = Preparation(
        tmp_path / "out", tokenizer, objective=objective, seq_len=length, val_fraction=0
    )
    prepare([str(path)], options)
    dataset, found = ShardSet.open(tmp_path / "out"), set()
    made = Tokenizer.from_file(str(tokenizer))
    whole = packed_words("".join(DOCUMENTS))
    for row in dataset.read(dataset.manifest[0]).tolist():
        text = made.decode(row, skip_special_tokens=False).replace("[PAD]", "")
        for part in text.replace("[CLS]", "[SEP]").split("[SEP]"):
            assert packed_words(part) in whole
            found.update(part.split())
    if objective == "mlm-nsp":  # a causal set may have dropped its tail
        assert found >= {f"word{n}" for n in range(len(DOCUMENTS))}
    else:
        assert len(found) > 10
