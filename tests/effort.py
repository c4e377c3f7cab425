"""How hard the property tests try: as written, or times SIFTLOADER_EXAMPLES (`make test-all`)."""

from __future__ import annotations

import os

from hypothesis import settings


FACTOR = int(os.environ.get("SIFTLOADER_EXAMPLES", "1"))


def examples(count: int, large: int | None = None) -> settings:
    """``count`` of them in `make test`; in `make test-all` ten times as many, or ten times ``large``."""
    if FACTOR > 1 and large is not None:
        count = large
    return settings(max_examples=count * FACTOR, deadline=None)
