"""Text that repeats itself: python tools/repeat_documents.py text.txt.xz --share 0.5 --out repeated.txt

Crawls, logs, code and forums hold the same pages, licences and templates over and over. This tool takes a few
documents of a corpus and writes them as often as it takes to be ``--share`` of everything, so that the
effect can be measured: prepare both together, and train.

    siftloader shard text.txt.xz repeated=repeated.txt --out shards/repeated ...

The documents taken are those whose content hash is highest: never ones that preparation holds out, which
takes the lowest. That goes for a document as it was and as it is written here, without its blank lines. The same
inputs give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from siftloader.corpus import read_documents  # noqa: E402
from siftloader.files import find_inputs  # noqa: E402


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="the corpus, as siftloader shard takes it")
    add("--out", type=Path, required=True, metavar="FILE.txt", help="the repeated documents")
    add("--share", type=float, default=0.5, help="of all characters, theirs included (0.5)")
    add("--size", type=int, default=100_000, help="characters that are repeated (100,000)")
    options = parser.parse_args(arguments)
    if not 0 < options.share < 1 or options.size < 1:
        parser.error("--share must lie between 0 and 1, --size be at least 1")
    before = [document.text for document in read_documents(find_inputs(options.paths))]
    # A blank line would end a document.
    texts = ["\n".join(line for line in text.splitlines() if line.strip()) for text in before]
    whole = sum(map(len, before))
    lowest = [min(map(content_hash, pair)) for pair in zip(before, texts, strict=True)]
    taken, size = [], 0
    for _, text in sorted(zip(lowest, texts, strict=True), reverse=True):
        if size + len(text) <= options.size:
            taken.append(text)
            size += len(text)
    if not taken:
        sys.exit(f"no document has at most {options.size:,} characters; raise --size")
    times = max(1, round(options.share / (1 - options.share) * whole / size))
    unfinished = options.out.with_name(options.out.name + ".tmp")
    unfinished.write_text(("\n\n".join(taken) + "\n\n") * times, encoding="utf-8", newline="")
    unfinished.replace(options.out)
    print(
        f"{options.out}: {len(taken)} documents of {size:,} characters, {times} times each, beside "
        f"{len(texts):,} documents of {whole:,}: {size * times / (size * times + whole):.1%}"
    )


def content_hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


if __name__ == "__main__":
    main()
