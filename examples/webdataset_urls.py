"""python examples/webdataset_urls.py [URL] [--steps 20] [--cache FOLDER]

Train from shards behind a URL: http://, file://, s3:// or whatever fsspec opens. Without one, the demo's shards are
served from this machine, and read back over HTTP. Read in two ways:

    TokenShards(URL, cache=...)      fetched a window ahead, verified, exactly resumable
    webdataset(URL + "/{...}.tar")   the same tars through webdataset's own pipeline, as any tars of text
"""

import argparse
import contextlib
import functools
import http.server
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM

from siftloader import SiftingDataLoader, TokenShards
from siftloader.stream import webdataset


DEMO = Path(__file__).resolve().parent.parent / "shards" / "demo"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "url", nargs="?", help="a folder of shards, as siftloader shard makes them"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cache", help="where fetched shards are kept; else they are removed")
    given = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        cache = given.cache or stack.enter_context(tempfile.TemporaryDirectory())
        url = given.url or stack.enter_context(served(DEMO))
        shards = TokenShards(url, cache=cache)
        model = bert(shards.vocab_size)
        loader = SiftingDataLoader(shards, batch_size=8, model=model, warmup_steps=0)
        train("TokenShards", loader, model, given.steps)

        names = [f"{url}/{shard.shard}.tar" for shard in shards.shard_set.shards("train")]
        stream = webdataset(names, batch_size=8, batches_per_epoch=2 * given.steps)
        model = bert(shards.vocab_size)
        inner = DataLoader(stream, batch_size=None)  # the stream makes whole batches
        loader = SiftingDataLoader.wrap(inner, model=model, warmup_steps=0)
        train("webdataset", loader, model, given.steps)


def bert(vocabulary: int) -> BertForMaskedLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return BertForMaskedLM(BertConfig(vocab_size=vocabulary, **sizes)).train()


def train(name: str, loader: Iterable[Any], model: BertForMaskedLM, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step, batch in enumerate(loader, 1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == steps:
            print(f"{name}, step {step}: loss {loss.item():.3f} nats on the half that was kept")
            break


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The files of a folder on a free port of this machine, for as long as the block runs."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


if __name__ == "__main__":
    main()
