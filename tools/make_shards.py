"""Text files to token shards: the same as `siftloader shard`, without installing anything.

python tools/make_shards.py 'wiki/*.txt' --out shards/wiki --tokenizer bert-base-uncased \
    --objective mlm --seq-len 512 --val-fraction 0.005 --seed 0
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from siftloader.cli import main


if __name__ == "__main__":
    sys.exit(main(["shard", *sys.argv[1:]]))
