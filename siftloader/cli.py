"""The command line: ``siftloader shard``, ``bigrams``, ``verify``, ``inspect``,
``inspect-selections`` and ``report``.

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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from siftloader.bigrams import BIGRAMS, LIMIT, write_bigrams
from siftloader.corpus import BOUNDARIES
from siftloader.errors import CorpusError, SiftError
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
from siftloader.shards import Shard, ShardSet, verify
from siftloader.storage import LocalFolder
from siftloader.tokens import NEEDED, describe_tokenizer, load_tokenizer


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
        return _complain("interrupted; the same command continues", 130)
    return command


def _complain(error: object, status: int) -> int:
    if sys.stderr is None:  # as under pythonw: there is nobody to tell
        return status
    print(f"siftloader: {on_a_line(str(error))}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="siftloader",
        description="Make, check and look at token shards; see what was selected from them.",
        epilog="`siftloader COMMAND --help` explains each of them, with an example.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_shard(commands)
    _add_bigrams(commands)
    _add_verify(commands)
    _add_inspect(commands)
    _add_inspect_selections(commands)
    _add_report(commands)
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
        description=(
            "Check every shard: size, headers, sha256, sources, token ids inside the vocabulary, "
            "and the counts of the train split. The first fault is named and the status is 1."
        ),
        epilog="example: siftloader verify shards/demo",
    )
    parser.add_argument("folder", help="a finished folder of shards")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object: folder, ok, shards, samples, bytes, fingerprint, and error (shard, "
        "sample, byte, message) or null",
    )
    parser.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    good: list[Shard] = []
    fingerprint: str | None = None
    try:
        dataset = ShardSet.open(arguments.folder)
        fingerprint = dataset.fingerprint
        with tqdm(
            total=sum(shard.bytes for shard in dataset.manifest),
            desc="verifying",
            unit="B",
            unit_scale=True,
            disable=sys.stderr is None or not sys.stderr.isatty(),
            leave=False,
        ) as bar:
            for shard in verify(arguments.folder):
                good.append(shard)
                bar.update(shard.bytes)
    except (SiftError, OSError) as error:
        if not arguments.json:
            raise
        _print_verdict(arguments.folder, good, fingerprint, error)
        return 1
    if arguments.json:
        _print_verdict(arguments.folder, good, fingerprint, None)
        return 0
    samples = sum(shard.num_sequences for shard in good)
    folder = shown(arguments.folder)
    print(f"{folder}: {len(good)} shards, {samples:,} samples, all as they were written")
    return 0


def _print_verdict(
    folder: str, good: Sequence[Shard], fingerprint: str | None, error: Exception | None
) -> None:
    # shards, samples, bytes: those found good
    verdict = {
        "folder": folder,
        "ok": error is None,
        "shards": len(good),
        "samples": sum(shard.num_sequences for shard in good),
        "bytes": sum(shard.bytes for shard in good),
        "fingerprint": fingerprint,
        "error": None if error is None else _fault(error),
    }
    print(json.dumps(verdict))


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
    parser.add_argument("folder", help="a finished folder of shards")
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
        print(json.dumps({"folder": arguments.folder, "error": _fault(error)}))
        return 1
    print(said)
    return 0


def _look(arguments: argparse.Namespace) -> str:
    if arguments.plot:
        check_plot(arguments.plot)
    dataset = ShardSet.open(arguments.folder)
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


def _selections(log: str, dataset: ShardSet | None, tokenizer: str | None) -> Selections:
    if dataset is None:
        return Selections(log, note="For the texts behind the ids, add --shards.")
    _check_ids(ids_of(log), dataset)
    texts, note = _texts(dataset, tokenizer)
    return Selections(log, texts, [source.name for source in dataset.sources], note)


if __name__ == "__main__":
    sys.exit(main())
