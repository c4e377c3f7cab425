"""How hard the property tests try: as written, or times SIFTLOADER_EXAMPLES (`make test-all`)."""

from __future__ import annotations

import os

from hypothesis import settings


FACTOR = int(os.environ.get("SIFTLOADER_EXAMPLES", "1"))


def examples(count: int) -> settings:
    return settings(max_examples=count * FACTOR, deadline=None)
