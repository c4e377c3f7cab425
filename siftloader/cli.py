"""The command line: ``siftloader shard``, ``bigrams``, ``verify``, ``inspect``,
``inspect-selections``, ``report`` and ``probe``.

Exit status: 0 done, 1 the data are not as they should be, 2 the command is not, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from siftloader.bigrams import BIGRAMS, LIMIT, write_bigrams
from siftloader.corpus import BOUNDARIES
from siftloader.errors import CorpusError, CorruptShard, FetchError, ShardError, SiftError
from siftloader.inspection import (
    as_json,
    check_plot,
    look,
    on_a_line,
    plot,
    report as contents,
    shown,
)
from siftloader.packing import Packing
from siftloader.prepare import ENGINES, Preparation, Summary, prepare
from siftloader.probe_command import add_probe, probed
from siftloader.report import Selections, table as compared, write_page
from siftloader.results import read_results, write_results
from siftloader.selection_report import (
    drift,
    ids_of,
    plot_drift,
    read_log,
    report as selections,
    sources_of,
    tokens_of,
)
from siftloader.shards import (
    MANIFEST,
    UNIGRAMS,
    Shard,
    ShardSet,
    check_ids,
    check_samples,
    check_sources,
)
from siftloader.storage import LocalFolder, redacted
from siftloader.tokens import NEEDED, describe_tokenizer, load_tokenizer


LOST = 10  # shards in a row that do not arrive: it is the way then, not the shards
COUNTED = 1 << 20  # token ids counted at once: bounded memory


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        command: int = arguments.run(arguments)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ValueError as error:
        return _complain(error, 2)
    except (SiftError, OSError) as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        continues = "; the same command continues" if arguments.run is _shard else ""
        return _complain(f"interrupted{continues}", 130)
    return command


def _complain(error: object, status: int) -> int:
    if sys.stderr is None:  # as under pythonw: there is nobody to tell
        return status
    print(f"siftloader: {on_a_line(str(error))}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="siftloader",
        description="Make, check and look at token shards; see whether sifting them may pay, and what was selected.",
        epilog="`siftloader COMMAND --help` explains each of them, with an example.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_shard(commands)
    _add_bigrams(commands)
    _add_verify(commands)
    _add_inspect(commands)
    _add_inspect_selections(commands)
    _add_report(commands)
    add_probe(commands).set_defaults(run=_probe)
    return parser


def _add_shard(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "shard",
        help="turn text into a folder of token shards",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Read text, hold out a fraction of the documents (chosen by their content, so that a\n"
            "duplicate never sits on both sides), tokenise, pack into samples of equal length,\n"
            "shuffle all of them, and write tars that WebDataset tools read too. The same input,\n"
            "options and seed give the same bytes, whatever --workers, --engine and --memory are.\n"
            "However often it is killed, the same command continues."
        ),
        epilog=(
            "example: siftloader shard books=gutenberg/ 'wiki=wiki/*.parquet' --out shards/mix \\\n"
            "             --tokenizer bert-base-uncased --objective mlm-nsp --seq-len 512\n"
            "example: siftloader shard enwiki-latest-pages-articles.xml.bz2 'books=books/*.txt:2' \\\n"
            "             --out shards/wikibooks --tokenizer bert-base-uncased --max-bad 100\n\n"
            "Quote globs: else the shell makes every file a source of its own, and no sample crosses\n"
            "sources. In a folder, files that are not text and a .json beside other text are passed\n"
            "over. Exit status: 0 done, 1 the text is not as it should be, 2 the command is not, 130\n"
            "interrupted."
        ),
    )
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="[NAME=]PATH[:WEIGHT]",
        help=".txt, .jsonl (.ndjson, .json), .parquet, .arrow (.feather, .ipc), .csv, .tsv, a .tar of "
        "texts or Wikipedia's .xml, each maybe .gz, .bz2, .xz or .zst: a file, a folder, a quoted glob "
        "or a URL. Each is a source, named after its file or folder unless NAME says otherwise; its "
        "documents, but for those held out, are used WEIGHT times (2, 0.5; default 1)",
    )
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="NAME=PATH[:WEIGHT]",
        help="the same, one at a time; a NAME given again adds to its source",
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="a new or empty folder, or the job's own"
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="NAME",
        help="a tokenizer.json, a folder that holds one, or a name on the Hugging Face hub",
    )
    parser.add_argument(
        "--objective",
        choices=list(NEEDED),
        default=Preparation.objective,
        help="mlm: [CLS] text [SEP], the tail padded; mlm-nsp: BERT's sentence pairs, about half "
        "of them random; clm: running text with an end-of-text id after every document "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seq-len",
        type=int,
        default=Preparation.seq_len,
        metavar="T",
        help="tokens per sample (default: %(default)s)",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=Preparation.val_fraction,
        metavar="F",
        help="fraction of the documents to hold out (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=Preparation.seed,
        help="of the shuffle and the pairs (default: %(default)s)",
    )
    parser.add_argument(
        "--samples-per-shard",
        type=int,
        default=Preparation.samples_per_shard,
        metavar="N",
        help="the last shard of a split takes the rest (default: %(default)s)",
    )
    parser.add_argument(
        "--documents",
        choices=BOUNDARIES,
        default=Preparation.documents,
        help="what ends a document in .txt (default: %(default)s); elsewhere a record is one",
    )
    parser.add_argument(
        "--column",
        metavar="NAME",
        help="where the text is in .jsonl, .parquet, .arrow, .csv and .tsv, which has no quotes "
        "(default: text, content, or the only column of text; asked for where that is not sure)",
    )
    parser.add_argument(
        "--max-bad",
        type=int,
        default=Preparation.max_bad,
        metavar="N",
        help="bad records (not UTF-8, malformed JSON, no text) to skip and count before giving up "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes (default: one per CPU); with --engine ray, tasks at a time",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=Preparation.engine,
        help="ray: on the cluster at RAY_ADDRESS, or that `ray start` began here; --out must be on storage "
        "that all its machines share (default: %(default)s)",
    )
    parser.add_argument(
        "--memory",
        type=_bytes,
        default=Preparation.memory,
        metavar="SIZE",
        help="for writing shards, all workers together: 500MB, 4GB; more makes fewer passes over the "
        "work files (default: what one shard for each worker takes, 100 MB at 512 tokens); "
        "tokenising takes about 200 MB a worker, before that",
    )
    parser.add_argument(
        "--bigrams",
        action="store_true",
        help="at the end, count which token follows which, as `siftloader bigrams` does",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(run=_shard)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"not a size: {text!r}; write 500MB, 4GB or 1GiB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " "))


def _shard(arguments: argparse.Namespace) -> int:
    options = Preparation(
        out=arguments.out,
        tokenizer=arguments.tokenizer,
        objective=arguments.objective,
        seq_len=arguments.seq_len,
        val_fraction=arguments.val_fraction,
        seed=arguments.seed,
        samples_per_shard=arguments.samples_per_shard,
        documents=arguments.documents,
        column=arguments.column,
        max_bad=arguments.max_bad,
        workers=arguments.workers,
        engine=arguments.engine,
        memory=arguments.memory,
    )
    summary = prepare([*arguments.inputs, *arguments.source], options, _tell_estimate)
    if arguments.bigrams:
        _count(arguments.out, LIMIT)
    print(json.dumps(_jsonable(summary), indent=2) if arguments.json else report(summary))
    return 0


def _tell_estimate(progress: dict[str, Any]) -> None:
    if progress["stage"] != "estimate":
        return
    needed = progress["work"] + progress["shards"]
    line = (
        f"about {_size(progress['text'])} of text: {_size(progress['work'])} of work files until the "
        f"end, {_size(progress['shards'])} of shards, {_size(progress['free'])} free"
    )
    if needed > progress["free"]:
        print(f"siftloader: warning: the disk may be too small: {line}", file=sys.stderr)
    elif sys.stderr is not None and sys.stderr.isatty():
        print(line, file=sys.stderr)


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _jsonable(summary: Summary) -> dict[str, Any]:
    return {**asdict(summary), "out": str(summary.out)}


def report(summary: Summary) -> str:
    """The summary of a preparation as a table for people."""
    rows = [("out", str(summary.out)), ("documents", f"{summary.documents:,}")]
    if summary.reused:
        rows.append(("", "finished before with the same input and options: left as it is"))
    rows += [
        (f"  {source.name}", f"{source.documents:,} documents, {source.tokens:,} tokens")
        for source in summary.sources
    ]
    rows += [(f"skipped {reason}", f"{count:,}") for reason, count in summary.skipped.items()]
    rows += [(f"bad: {reason}", f"{count:,}, skipped") for reason, count in summary.bad.items()]
    rows += [("  for example", on_a_line(told)) for told in summary.told]
    for split, count in summary.samples.items():
        rows.append((f"{split} samples", f"{count:,}"))
        if packing := summary.packing.get(split):
            rows += [(f"{split} tokens", line) for line in _accounts(packing)]
    rows.append(("unknown tokens", f"{summary.unknown:.4%} of the train text"))
    if not summary.samples.get("val"):
        rows.append(("note", "nothing was held out; raise --val-fraction for a val split"))
    rows += [
        ("bytes", f"{summary.bytes:,}"),
        ("seconds", f"{summary.seconds:.1f}"),
        ("fingerprint", summary.fingerprint),
    ]
    return _table(rows)


def _accounts(packing: Packing) -> list[str]:
    # Every token that came in, and what is in the samples besides.
    yielded = [f"{packing.tokens:,} = {packing.kept:,} in samples"]
    if packing.tail_kept:
        yielded[0] += f" + {packing.tail_kept:,} in padded tails"
    yielded[0] += f" + {packing.dropped:,} dropped"
    if packing.carried:
        yielded.append(f"{packing.carried:,} of them waited for the end, to be packed with others")
    if packing.random or packing.alone:
        yielded.append(
            f"{packing.random:,} pairs random, with {packing.reused:,} tokens used again; "
            f"{packing.alone:,} could only be true"
        )
    return yielded


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(left) for left, _ in rows)
    return "\n".join(f"{left:<{width}}  {right}".rstrip() for left, right in rows)


def _add_bigrams(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "bigrams",
        help="count which token follows which, beside the shards",
        description=(
            "Count the pairs of neighbours in the train split and keep the most frequent in bigrams.npy and "
            "bigrams.json, for the criteria Residual(shards.bigrams) and Rarity(shards.bigrams). Pairs that "
            "were counted before are left as they are. Memory is bounded; `shard --bigrams` does the same."
        ),
        epilog="example: siftloader bigrams shards/demo",
    )
    parser.add_argument("folder", help="a finished folder of shards")
    parser.add_argument(
        "--limit",
        type=int,
        default=LIMIT,
        metavar="N",
        help="pairs to keep, 16 bytes each; the others are summed up (default: %(default)s)",
    )
    parser.set_defaults(run=_bigrams)


def _bigrams(arguments: argparse.Namespace) -> int:
    made = _count(arguments.folder, arguments.limit)
    found = "counted" if made else "counted before, left as they are"
    print(f"{shown(str(Path(arguments.folder) / BIGRAMS))}: {found}")
    return 0


def _count(folder: str, limit: int) -> bool:
    with tqdm(
        desc="counting pairs",
        unit="tokens",
        unit_scale=True,
        disable=sys.stderr is None or not sys.stderr.isatty(),
        leave=False,
    ) as bar:

        def tell(read: int, to_read: int) -> None:
            bar.total = to_read
            bar.update(read - bar.n)

        return write_bigrams(folder, limit, tell)


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "verify",
        help="read every byte and compare it with the manifest",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Check every shard: size, headers, sha256, sources, token ids inside the vocabulary, and the\n"
            "counts of the train split. Each bad shard is named as it is found, with its first bad sample\n"
            "and byte and how many of its samples are damaged; the others are read all the same.\n\n"
            "What is behind a URL is read through the cache of this machine: copies that are there are\n"
            "checked, all else is fetched. To check the other end, give an empty --cache."
        ),
        epilog=(
            "example: siftloader verify shards/demo\n"
            "example: siftloader verify s3://bucket/shards --cache /scratch/empty --cache-bytes 50GB\n\n"
            "Exit status: 0 all as it was written, 1 something is not, 2 the command is not, 130\n"
            "interrupted."
        ),
    )
    _add_folder(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object: folder, ok, shards, samples and bytes found good, copies (shards that "
        "were on this machine already), fingerprint, and errors, a list of objects: shard, sample, byte, "
        "damaged (how many samples of it) and message",
    )
    parser.set_defaults(run=_verify)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a finished folder of shards, or the URL of one")
    parser.add_argument(
        "--cache",
        metavar="FOLDER",
        help="keeps copies of what is behind a URL (default: $SIFTLOADER_CACHE, else ~/.cache/siftloader)",
    )
    parser.add_argument(
        "--cache-bytes",
        type=_bytes,
        metavar="SIZE",
        help="how much room they may take: 500MB, 50GB (default: all but a reserve of the disk)",
    )


def _opened(arguments: argparse.Namespace) -> ShardSet:
    return ShardSet.open(arguments.folder, arguments.cache, arguments.cache_bytes)


@dataclass
class _Verdict:
    """What was found in a folder so far."""

    folder: str
    shards: int = 0  # good ones, as are samples and bytes
    samples: int = 0
    bytes: int = 0
    copies: int = 0  # of those shards, what was not read from where they are
    fingerprint: str | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)

    def praise(self, shard: Shard, copied: bool) -> None:
        """Count a good shard."""
        self.shards += 1
        self.copies += copied
        self.samples += shard.num_sequences
        self.bytes += shard.bytes

    def blame(self, error: Exception, damaged: int | None = None) -> str:
        """Note a fault, and say it in a line."""
        more = f"; {damaged:,} samples of it are damaged" if damaged else ""
        self.errors.append({**_fault(error), "damaged": damaged})
        return f"{error}{more}"


def _verify(arguments: argparse.Namespace) -> int:
    verdict = _Verdict(redacted(arguments.folder))
    tell: Callable[[str], object] = (
        (lambda line: None) if arguments.json else (lambda line: _complain(line, 1))
    )
    try:
        dataset = _opened(arguments)
        verdict.fingerprint = dataset.fingerprint
        _verify_all(dataset, verdict, tell)
    except (SiftError, OSError) as error:
        tell(verdict.blame(error))
    folder = shown(verdict.folder)
    if arguments.json:
        print(json.dumps({"ok": not verdict.errors, **asdict(verdict)}))
    elif not verdict.errors:
        found = f"{verdict.shards} shards, {verdict.samples:,} samples"
        print(f"{folder}: {found}, all as they were written{_copies(verdict)}")
    elif verdict.fingerprint is not None:
        tell(
            f"{folder}: {len(verdict.errors):,} faults; {verdict.shards:,} of {len(dataset.manifest):,} "
            f"shards, {verdict.samples:,} samples, are as they were written"
        )
    return 1 if verdict.errors else 0


def _verify_all(dataset: ShardSet, verdict: _Verdict, tell: Callable[[str], object]) -> None:
    # As shards.verify does, but a fault does not end it: to read a large set once more takes hours.
    for stranger in _strangers(dataset):
        tell(verdict.blame(stranger))
    counted = np.zeros(dataset.tokenizer.vocab_size, np.int64)
    complete, lost = True, 0
    with tqdm(
        total=sum(shard.bytes for shard in dataset.manifest),
        desc="verifying",
        unit="B",
        unit_scale=True,
        disable=sys.stderr is None or not sys.stderr.isatty(),
        leave=False,
    ) as bar:
        for number, shard in enumerate(dataset.manifest, 1):
            try:
                copied = _has_copy(dataset, shard)
                _check(dataset, shard, counted)
                verdict.praise(shard, copied)
                lost = 0
            except (ShardError, OSError) as error:
                complete = complete and shard.split != "train"
                lost = lost + 1 if isinstance(error, FetchError) else 0
                bad = dataset.damaged(shard).sum() if isinstance(error, CorruptShard) else 0
                bar.clear()
                tell(verdict.blame(error, int(bad) or None))
            if lost == LOST and number < len(dataset.manifest):
                raise FetchError(
                    f"{dataset.name}: {lost} shards in a row did not arrive, so the "
                    f"{len(dataset.manifest) - number:,} after them were not asked for; look after the "
                    f"server and the network, then run again"
                )
            bar.update(shard.bytes)
    if complete and not np.array_equal(dataset.unigrams, counted):
        raise CorruptShard(f"{UNIGRAMS}: not the counts of the train split; prepare it again")


def _copies(verdict: _Verdict) -> str:
    if not verdict.copies:
        return ""
    return f"; {verdict.copies:,} of them on this machine already: to read all from there, give an empty --cache"


def _has_copy(dataset: ShardSet, shard: Shard) -> bool:
    if isinstance(dataset.files, LocalFolder):
        return False
    copies = dataset.files.copies
    return copies.has(copies.place(f"{shard.shard}.tar", shard.sha256), shard.bytes)


def _strangers(dataset: ShardSet) -> list[ShardError]:
    # Tars that no manifest names: other tools would read them.
    if not isinstance(dataset.files, LocalFolder):
        return []
    expected = {f"{shard.shard}.tar" for shard in dataset.manifest}
    found = {tar.name for tar in dataset.folder.glob("*.tar")}
    return [
        ShardError(f"{dataset.name}: {name} is not in {MANIFEST}; move it out of the folder")
        for name in sorted(found - expected)
    ]


def _check(dataset: ShardSet, shard: Shard, counted: NDArray[np.int64]) -> None:
    # Raises where a shard is not as it was written; adds up how often each id occurs in the train split.
    ids = dataset.read(shard)
    raw = np.memmap(dataset.path(shard), np.uint8, mode="r")
    check_samples(shard.shard, raw, shard.num_sequences, dataset.layout)
    step = max(1, COUNTED // dataset.layout.seq_len)
    for first in range(0, len(ids), step):
        rows = ids[first : first + step]
        check_ids(dataset, shard, rows, first)
        if shard.split == "train":
            counted += np.bincount(rows.ravel(), minlength=len(counted))
    check_sources(dataset, shard, dataset.read_sources(shard))


def _fault(error: Exception) -> dict[str, Any]:
    where = {name: getattr(error, name, None) for name in ("shard", "sample", "byte")}
    return {**where, "message": str(error)}


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "inspect",
        help="say what a folder of shards holds",
        description=(
            "Read a folder of shards, verified, and print its schema, what it was made from, counts per "
            "split and source, tokens, padding and unknown tokens, and a few samples with their special "
            "tokens."
        ),
        epilog=(
            "example: siftloader inspect shards/demo --samples 3 "
            "--tokenizer shards/demo/tokenizer.json --plot shards.png"
        ),
    )
    _add_folder(parser)
    parser.add_argument(
        "--samples",
        type=int,
        default=2,
        metavar="N",
        help="how many samples of each split to print (default: %(default)s)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="a tokenizer.json, a folder that holds one, or a hub name, to print text, not ids (default: "
        "a tokenizer.json in the folder, if there is one)",
    )
    parser.add_argument("--split", metavar="NAME", help="only this one (default: all)")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print all of it, the histograms, and error (shard, sample, byte, message) or null, as JSON",
    )
    parser.add_argument(
        "--plot",
        metavar="PNG",
        help="also draw how many samples have how many tokens, and how many unknown ones",
    )
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    if arguments.samples < 0:
        raise ValueError(f"--samples must be 0 or more, got {arguments.samples}")
    try:
        said = _look(arguments)
    except (SiftError, OSError) as error:
        if not arguments.json:
            raise
        print(json.dumps({"folder": redacted(arguments.folder), "error": _fault(error)}))
        return 1
    print(said)
    return 0


def _look(arguments: argparse.Namespace) -> str:
    if arguments.plot:
        check_plot(arguments.plot)
    dataset = _opened(arguments)
    name = arguments.tokenizer or _tokenizer_beside(dataset)
    decode, notes = None, []
    if name is not None:
        tokenizer = load_tokenizer(name)
        decode = _decoder(tokenizer)
        notes = [note] if (note := _mismatch(dataset, tokenizer, name)) else []
    names = [arguments.split] if arguments.split else dataset.splits
    splits = [look(dataset, split, arguments.samples) for split in names]
    if arguments.plot:
        plot(splits, arguments.plot)
    if arguments.json:
        return json.dumps(as_json(dataset, splits, decode) | {"notes": notes, "error": None})
    if arguments.plot:
        notes.append(f"wrote {arguments.plot}")
    width = shutil.get_terminal_size((100, 24)).columns
    return "\n\n".join([contents(dataset, splits, decode, width), *map(shown, notes)])


def _tokenizer_beside(dataset: ShardSet) -> str | None:
    if not isinstance(dataset.files, LocalFolder):
        return None
    beside = dataset.folder / "tokenizer.json"
    return str(beside) if beside.is_file() else None


def _mismatch(dataset: ShardSet, tokenizer: Any, name: str) -> str:
    # What a reader of texts should know of a tokenizer that did not make the shards; else nothing.
    recorded = dataset.tokenizer
    try:
        found = describe_tokenizer(tokenizer, name, dataset.objective).sha256
    except CorpusError:  # it lacks a special token of the objective
        found = ""
    if found == recorded.sha256:
        return ""
    return (
        f"note: {name} is not the tokenizer the shards were made with ({recorded.name}, "
        f"sha256 {recorded.sha256[:12]}); the texts may be wrong"
    )


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))


def _add_inspect_selections(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> None:
    parser = commands.add_parser(
        "inspect-selections",
        help="say which samples a run kept, and how the scores drifted",
        description=(
            "Read a selection log (a folder, also of a run under way or one that crashed) and print the "
            "most and least kept samples, the kept share by length and by source, and the scores over "
            "steps. Where the least kept are clean and the most kept are noise, select otherwise; where "
            "one source wins, compare with the Rarity control."
        ),
        epilog=(
            "example: siftloader inspect-selections runs/a/selections.parquet --shards shards/demo "
            "--tokenizer shards/demo/tokenizer.json --plot drift.png"
        ),
    )
    parser.add_argument("log", help="the folder that the run wrote its selections to")
    parser.add_argument(
        "--shards",
        metavar="FOLDER",
        help="the shards of the run: gives the names of the sources, and the texts",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="a tokenizer.json, a folder that holds one, or a hub name, to print texts (default: a "
        "tokenizer.json in the folder of the shards, if there is one)",
    )
    parser.add_argument(
        "--top",
        type=int,
        default=10,
        metavar="N",
        help="how many of the most and of the least kept samples to print (default: %(default)s)",
    )
    parser.add_argument(
        "--plot",
        metavar="PNG",
        help="also draw kept and dropped scores and the threshold over steps",
    )
    parser.set_defaults(run=_inspect_selections)


def _inspect_selections(arguments: argparse.Namespace) -> int:
    if arguments.tokenizer and not arguments.shards:
        raise ValueError("--tokenizer needs --shards: a log holds ids, the shards hold the text")
    if arguments.top < 0:
        raise ValueError(f"--top must be 0 or more samples, got {arguments.top}")
    if arguments.plot:
        check_plot(arguments.plot)
    dataset = ShardSet.open(arguments.shards) if arguments.shards else None
    table = read_log(arguments.log)
    sources, texts, notes = None, None, []
    if dataset is None:
        notes.append("texts and the names of sources: add --shards, the folder the run read from")
    else:
        _check_ids(ids_of(arguments.log), dataset)
        if table["source"].to_numpy().max() < 0:
            sources = sources_of(dataset, table["id"].to_numpy())
        texts, note = _texts(dataset, arguments.tokenizer)
        notes += [note] if note else []
    names = [shown(source.name) for source in dataset.sources] if dataset else []
    print(selections(table, top=arguments.top, names=names, sources=sources, texts=texts))
    if arguments.plot:
        plot_drift(drift(table, 60), arguments.plot)
        notes.append(f"wrote {arguments.plot}")
    if notes:
        print("\n" + "\n".join(map(shown, notes)))
    return 0


def _check_ids(ids: str, dataset: ShardSet) -> None:
    if ids in ("", "batch", dataset.fingerprint):
        return
    if ids == "candidates":
        raise SiftError(
            "the ids of this log only number the candidates, because the data set gave none: they name "
            "no samples of any shards; leave out --shards"
        )
    raise SiftError(
        f"the log is of shards with fingerprint {ids}, {dataset.name} has {dataset.fingerprint}; give "
        f"the folder that the run read from"
    )


def _texts(
    dataset: ShardSet, name: str | None
) -> tuple[Callable[[list[int]], dict[int, str]] | None, str]:
    """How to find the first 120 characters of samples, and what the reader should know about it."""
    recorded = dataset.tokenizer
    name = name or _tokenizer_beside(dataset)
    if name is None:
        return None, (
            f"texts: add --tokenizer {recorded.name}, or wherever that tokenizer is; the shards were "
            f"made with it, and there is no tokenizer.json beside them"
        )
    tokenizer = load_tokenizer(name)
    decode = _decoder(tokenizer)
    frame = {number for key, number in recorded.special_ids.items() if key not in ("unk", "mask")}

    def texts(ids: list[int]) -> dict[int, str]:
        found = {}
        for number, tokens in tokens_of(dataset, ids).items():
            text = on_a_line(decode([token for token in tokens if token not in frame]))
            found[number] = text if len(text) <= 120 else f"{text[:117]}..."
        return found

    return texts, _mismatch(dataset, tokenizer, name)


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "report",
        help="say which of several training runs ended better, as a table and a page",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Read the logs of training runs (*.jsonl, as examples/pretrain_bert.py --log writes them; results\n"
            "in Parquet), print how every arm ended, and write a page that needs no network. Arms are compared\n"
            "with the control seed by seed: same seed, same initial weights and candidates, so that a small\n"
            "difference shows. One seed decides nothing; five make an interval worth looking at."
        ),
        epilog=(
            'A log is named by its first line, {"run": {"experiment": .., "arm": .., "seed": ..}}, else by its\n'
            "folder and file: runs/small/loss-3.jsonl is arm loss, seed 3 of small. An arm plain@0.71 is plain\n"
            "training at 0.71 of the budget: with some of these, the page says what a loss is worth in time.\n"
            "plain#1 and plain#2 repeat plain, which shows how much chance does.\n\n"
            "example: siftloader report runs/compare\n"
            "example: siftloader report runs/seeds --control bert-none --out bert.html --parquet bert.parquet\n"
            "example: siftloader report runs/compare --selections runs/loss.selections --shards shards/demo"
        ),
    )
    parser.add_argument("runs", help="a folder of logs and results, looked through to its depth")
    parser.add_argument(
        "--control",
        default="plain",
        metavar="ARM",
        help="the arm that the others are compared with (default: %(default)s)",
    )
    parser.add_argument(
        "--out", metavar="HTML", help="the page (default: report.html in the folder of the runs)"
    )
    parser.add_argument(
        "--parquet", metavar="FILE", help="also write every evaluation of every run as one table"
    )
    parser.add_argument(
        "--selections",
        action="append",
        default=[],
        metavar="LOG",
        help="a folder that log_selections=... wrote, to show on the page too; may be given again",
    )
    parser.add_argument(
        "--shards", metavar="FOLDER", help="the shards of those runs: gives the texts"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="a tokenizer.json, a folder that holds one, or a hub name (default: a tokenizer.json in the "
        "folder of the shards, if there is one)",
    )
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    if arguments.shards and not arguments.selections:
        raise ValueError("--shards are for the texts of --selections; add those, or leave it out")
    if arguments.tokenizer and not arguments.shards:
        raise ValueError("--tokenizer needs --shards: a log holds ids, the shards hold the text")
    folder = Path(arguments.runs)
    page = Path(arguments.out or (folder if folder.is_dir() else folder.parent) / "report.html")
    for file, ending in ((page, ".html"), (Path(arguments.parquet or "x.parquet"), ".parquet")):
        if file.suffix != ending:
            raise ValueError(f"{file}: give it a name that ends in {ending}")
        if not file.parent.is_dir():
            raise SiftError(f"{file}: no folder {file.parent}; make it, or write somewhere else")
    results = read_results(folder)
    told = compared(results, arguments.control)
    print("\n".join(map(shown, told.split("\n"))) + "\n")
    if arguments.parquet:
        write_results(results, arguments.parquet)
        print(shown(f"wrote {arguments.parquet}"))
    dataset = ShardSet.open(arguments.shards) if arguments.shards else None
    logs = [_selections(log, dataset, arguments.tokenizer) for log in arguments.selections]
    write_page(results, page, control=arguments.control, selection_logs=logs)
    print(shown(f"wrote {page}: the same with figures, to open in a browser"))
    return 0


def _probe(arguments: argparse.Namespace) -> int:
    print(probed(arguments))
    return 0


def _selections(log: str, dataset: ShardSet | None, tokenizer: str | None) -> Selections:
    if dataset is None:
        return Selections(log, note="For the texts behind the ids, add --shards.")
    _check_ids(ids_of(log), dataset)
    texts, note = _texts(dataset, tokenizer)
    return Selections(log, texts, [source.name for source in dataset.sources], note)


if __name__ == "__main__":
    sys.exit(main())
