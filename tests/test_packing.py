"""Every token that goes in comes out, in order, or is counted as dropped."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from siftloader.packing import Documents, Packing, pack_clm, pack_mlm


PAD, CLS, SEP, EOS = 0, 1, 2, 3
TEXT = 4  # ids from here on are text, so that a test can tell them from the rest

token = st.integers(TEXT, 99)
corpora = st.lists(st.lists(token, max_size=12), max_size=12)
# Text may hold the very ids that separate it: counting must not be fooled.
hostile = st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=12)


def flat(documents) -> Documents:
    ids = np.array([token for document in documents for token in document], np.int32)
    return Documents(ids, np.array([len(document) for document in documents], np.int64))


def lists(documents: Documents) -> list[list[int]]:
    ends = np.cumsum(documents.lengths)
    return [each.tolist() for each in np.split(documents.ids, ends[:-1])] if len(ends) else []


def pack_all_mlm(documents, seq_len, last=True):
    return pack_mlm(flat(documents), seq_len, cls=CLS, sep=SEP, pad=PAD, last=last)


def pack_all_clm(documents, seq_len, last=True):
    return pack_clm(flat(documents), seq_len, eos=EOS, last=last)


def mlm(documents, seq_len):
    packed = pack_all_mlm(documents, seq_len)
    return packed.rows, packed.packing


def clm(documents, seq_len):
    packed = pack_all_clm(documents, seq_len)
    return packed.rows, packed.packing


def joined(documents, separator, after):
    if not after:
        documents = [document for document in documents if document]
    stream = [token for document in documents for token in [*document, separator]]
    return stream if after else stream[:-1]


@given(documents=corpora, seq_len=st.integers(3, 16))
def test_mlm_samples_laid_end_to_end_are_the_documents_joined_by_sep(documents, seq_len):
    samples, _ = mlm(documents, seq_len)
    bodies = []
    for row in samples.tolist():
        padding = len(row) - len(np.trim_zeros(row, "b"))
        assert row[0] == CLS and row[len(row) - padding - 1] == SEP
        bodies.append(row[1 : len(row) - padding - 1])
    assert [token for body in bodies for token in body] == joined(documents, SEP, after=False)
    assert all(len(body) == seq_len - 2 for body in bodies[:-1]), "only the tail may be padded"
    assert all(any(token >= TEXT for token in body) for body in bodies[-1:])


@given(documents=corpora, seq_len=st.integers(2, 16))
def test_clm_samples_laid_end_to_end_are_the_documents_each_with_its_end(documents, seq_len):
    samples, _ = clm(documents, seq_len)
    stream = joined(documents, EOS, after=True)
    assert samples.ravel().tolist() == stream[: samples.size]
    assert len(stream) - samples.size < seq_len


@pytest.mark.parametrize("pack", [mlm, clm])
@given(documents=hostile, seq_len=st.integers(3, 16))
def test_tokens_in_are_tokens_kept_plus_tokens_dropped(pack, documents, seq_len):
    samples, packing = pack(documents, seq_len)
    assert packing.tokens == sum(map(len, documents))
    assert packing.tokens == packing.kept + packing.tail_kept + packing.dropped
    assert packing.documents == sum(map(bool, documents))
    assert packing.samples == len(samples)
    breaks = packing.documents - 1 if pack is mlm else len(documents)
    if pack is mlm:
        assert packing.dropped == 0
        ends = 2 * packing.samples
        assert samples.size == packing.tokens + max(breaks, 0) + ends + packing.padding
    else:
        assert packing.tail_kept == packing.padding == 0
        assert samples.size <= packing.kept + breaks


@pytest.mark.parametrize("pack", [pack_all_mlm, pack_all_clm])
@given(blocks=st.lists(hostile, max_size=4), seq_len=st.integers(3, 16))
def test_blocks_and_their_carried_tails_keep_every_token(pack, blocks, seq_len):
    """A tail goes on to be packed with the other tails: no token is lost or doubled on the way."""
    total, tails, kept = Packing(), [], Counter()
    for block in blocks:
        packed = pack(block, seq_len, last=False)
        carried = lists(packed.tail)
        assert all(carried) or pack is pack_all_clm  # an end may be all that is left of a document
        assert sum(map(len, carried)) < seq_len
        assert packed.packing.tokens == packed.packing.kept + sum(map(len, carried))
        assert packed.packing.padding == packed.packing.dropped == packed.packing.tail_kept == 0
        tails += carried
        total += packed.packing
        kept.update(packed.rows.ravel().tolist())
    packed = pack(tails, seq_len, last=True)
    kept.update(packed.rows.ravel().tolist())
    total += replace(packed.packing, documents=0, tokens=0)
    assert total.tokens == total.kept + total.tail_kept + total.dropped
    text = Counter(token for block in blocks for document in block for token in document)
    for token in range(TEXT, 10):  # those that are only text, and at the end those dropped
        assert text[token] >= kept[token]
    if pack is pack_all_mlm:
        assert all(text[token] == kept[token] for token in range(TEXT, 10))
    assert len(packed.tail.ids) == len(packed.tail.lengths) == 0


@given(
    blocks=st.lists(st.lists(st.lists(token, min_size=1, max_size=9), max_size=5), max_size=5),
    seq_len=st.integers(2, 9),
)
def test_every_document_of_a_causal_corpus_has_its_end_wherever_blocks_and_samples_end(
    blocks, seq_len
):
    """Also one whose last token is the last of a block's last full sample."""
    rows, tails = [], []
    for block in blocks:
        packed = pack_all_clm(block, seq_len, last=False)
        rows += packed.rows.ravel().tolist()
        tails += lists(packed.tail)
    last = pack_all_clm(tails, 2 + sum(map(len, tails)) + len(tails), last=False)
    left = [token for tail in lists(last.tail) for token in [*tail, EOS]]
    assert (rows + left).count(EOS) == sum(map(len, blocks))


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ([], []),
        ([[]], []),
        ([[7]], [[CLS, 7, SEP, PAD, PAD]]),
        ([[7, 8, 9]], [[CLS, 7, 8, 9, SEP]]),
        ([[7], [8]], [[CLS, 7, SEP, 8, SEP]]),
        ([[7, 8, 9], [10]], [[CLS, 7, 8, 9, SEP], [CLS, SEP, 10, SEP, PAD]]),
        ([[7, 8], [9]], [[CLS, 7, 8, SEP, SEP], [CLS, 9, SEP, PAD, PAD]]),
    ],
)
def test_mlm_by_hand(documents, expected):
    assert mlm(documents, 5)[0].tolist() == expected


@pytest.mark.parametrize(
    ("documents", "expected", "dropped"),
    [
        ([], [], 0),
        ([[7, 8]], [[7, 8, EOS]], 0),
        ([[7], [8]], [[7, EOS, 8]], 0),
        ([[7, 8, 9]], [[7, 8, 9]], 0),
        ([[7, 8, 9, 10], [11]], [[7, 8, 9], [10, EOS, 11]], 0),
        ([[7, 8], [9]], [[7, 8, EOS]], 1),
    ],
)
def test_clm_by_hand(documents, expected, dropped):
    samples, packing = clm(documents, 3)
    assert (samples.tolist(), packing.dropped) == (expected, dropped)


@pytest.mark.parametrize(
    ("pack", "documents", "seq_len", "message"),
    [
        (mlm, [[7]], 2, "seq_len must be at least 3"),
        (clm, [[7]], 1, "seq_len must be at least 2"),
        (mlm, [[-1]], 5, "must not be negative"),
    ],
)
def test_what_cannot_be_packed_is_refused(pack, documents, seq_len, message):
    with pytest.raises(ValueError, match=message):
        pack(documents, seq_len)
