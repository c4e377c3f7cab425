"""Sentences joined are the text; every token is in a pair or counted; a random B is from elsewhere.

The ids of most tests are the tokens' own places, so a row says where each of its tokens is from.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_right
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from effort import FACTOR, examples
from hypothesis import example, given, strategies as st

from siftloader.pairs import SHORT, Pairing, Segmented, pack_pairs, segment


PAD, CLS, SEP = 0, 1, 2
TEXT = 3  # places count from here
DEMO = Path(__file__).parent.parent / "shards" / "demo"

# Sentences' sizes, by document: nothing at all, empty ones, one token, far above a pair's length.
sizes = st.lists(
    st.lists(st.one_of(st.integers(0, 12), st.sampled_from([1, 40])), max_size=8), max_size=6
)
keys = st.tuples(st.integers(0, 2**63), st.integers(0, 9))


def placed(sizes, dtype=np.int64):
    segments = np.cumsum([0, *(size for document in sizes for size in document)])
    documents = np.cumsum([0, *(len(document) for document in sizes)])
    return Segmented(np.arange(TEXT, TEXT + segments[-1]).astype(dtype), segments, documents)


def packed(documents, seq_len, key=(0,)):
    pairing = Pairing()
    rows, labels = pack_pairs(
        documents, seq_len, cls=CLS, sep=SEP, pad=PAD, key=key, pairing=pairing
    )
    return rows, labels, pairing


def spans(row):
    """The places of A and of B, each from and to, after a look at all the rest of the row."""
    row = row.tolist()
    first, second = (place for place, token in enumerate(row) if token == SEP)
    assert row[0] == CLS and row[second + 1 :] == [PAD] * (len(row) - second - 1)
    a, b = row[1:first], row[first + 1 : second]
    assert a and b, "both segments must hold a token"
    for tokens in (a, b):
        assert tokens == list(range(tokens[0], tokens[0] + len(tokens))), "a token is missing"
        assert tokens[0] >= TEXT
    return a[0] - TEXT, a[-1] + 1 - TEXT, b[0] - TEXT, b[-1] + 1 - TEXT


def cuts(sizes, room):
    """Where a sentence may begin or end, those above ``room`` in equal parts."""
    found, place = {0}, 0
    for size in (size for document in sizes for size in document):
        parts = -(-size // room)
        found.update(place + part * size // parts for part in range(1, parts + 1))
        place += size
    return found


@examples(400)
@given(sizes=sizes, seq_len=st.integers(5, 30), key=keys)
def test_every_token_is_in_a_pair_or_counted_as_dropped(sizes, seq_len, key):
    documents = placed(sizes)
    rows, labels, pairing = packed(documents, seq_len, key)
    where = [0, *np.cumsum([sum(document) for document in sizes]).tolist()]
    room, boundaries = seq_len - 3, cuts(sizes, seq_len - 3)
    seen, copied, padded = set(), 0, 0
    reached = {}  # document -> where its next pair begins
    for row, label in zip(rows, labels, strict=True):
        a, a_end, b, b_end = spans(row)
        own, other = bisect_right(where, a) - 1, bisect_right(where, b) - 1
        assert a_end <= where[own + 1] and b_end <= where[other + 1], (
            "a segment ends in its document"
        )
        assert (own == other) == (label == 0)
        begin = reached.get(own, where[own])
        assert a >= begin, "a token twice"
        length = a_end - a + b_end - b
        if not label:
            assert b >= a_end
        if length < room:  # so nothing was truncated
            assert a == begin
            assert label or b == a_end
            assert a_end in boundaries or pairing.alone
            assert not label or b in boundaries
        reached[own] = a_end if label else b_end
        seen.update(range(a, a_end), range(b, b_end))
        copied += (b_end - b) if label else 0
        padded += room - length
    assert pairing.tokens == where[-1] == pairing.kept + pairing.dropped
    assert (pairing.kept, pairing.reused, pairing.padding) == (len(seen), copied, padded)
    assert (pairing.samples, pairing.random) == (len(labels), labels.sum())
    assert pairing.documents == sum(map(any, sizes))
    for own, (begin, end) in enumerate(pairwise(where)):  # every document is read to its end
        rest = end - reached.get(own, begin)
        assert rest == 0 or (rest == 1 and pairing.documents == 1)


@given(sizes=sizes, seq_len=st.integers(60, 90), key=keys)
def test_nothing_is_dropped_where_nothing_is_too_long(sizes, seq_len, key):
    sizes = [[min(size, 5) for size in document] for document in sizes]
    rows, _, pairing = packed(placed(sizes), seq_len, key)
    assert pairing.dropped == (pairing.tokens == 1)
    assert not pairing.dropped or not len(rows)


@given(sizes=sizes, seq_len=st.integers(5, 30), key=keys)
def test_a_document_alone_has_true_pairs_only(sizes, seq_len, key):
    alone = [size for document in sizes for size in document]
    _, labels, pairing = packed(placed([[], alone, [0]]), seq_len, key)
    assert not labels.any() and pairing.random == pairing.forced == pairing.reused == 0
    if len([size for size in alone if size]) == 1 and max(alone) <= seq_len - 3:
        assert pairing.alone == len(labels)
        assert pairing.dropped == (sum(alone) == 1), "halves lose nothing"


@given(sizes=sizes, seq_len=st.integers(5, 30), key=keys)
def test_the_same_key_gives_the_same_bytes_whatever_the_type_of_the_ids(sizes, seq_len, key):
    rows, labels, pairing = packed(placed(sizes), seq_len, key)
    assert rows.dtype == np.int64 and labels.dtype == np.uint8 and rows.shape[1:] == (seq_len,)
    again, twice, counted = packed(placed(sizes, np.uint16), seq_len, key)
    assert rows.tobytes() == again.tobytes() and labels.tobytes() == twice.tobytes()
    assert pairing == counted


@given(sizes=sizes, more=sizes, seq_len=st.integers(5, 30))
def test_documents_may_hold_no_token_and_change_nothing(sizes, more, seq_len):
    rows, labels, pairing = packed(placed(sizes), seq_len)
    empty = [[], [0, 0], *([0, *document] for document in sizes), []]
    again, twice, counted = packed(placed(empty), seq_len)
    assert np.array_equal(rows, again) and np.array_equal(labels, twice) and pairing == counted


def test_these_bytes_stay_for_ever():
    rows, labels, _ = packed(placed([[7, 3, 9, 1, 12] * 40, [5, 2, 100], [4] * 60]), 64, (1, 2, 3))
    digest = hashlib.sha256(rows.astype("<i8").tobytes() + labels.tobytes()).hexdigest()
    assert (len(rows), digest[:16]) == (43, "146c458fe9baf729")


def test_another_key_makes_other_pairs():
    documents = placed([[7, 3, 9, 1, 12] * 40, [5, 2, 100]])
    first, other = (packed(documents, 64, key)[0] for key in [(0, 1), (0, 2)])
    assert first.shape != other.shape or not np.array_equal(first, other)


@example(a=4, b=4, seq_len=10, key=(0,))  # as long as each other, and one token too many
@given(a=st.integers(1, 40), b=st.integers(1, 40), seq_len=st.integers(5, 43), key=keys)
def test_the_longer_gives_way_token_by_token(a, b, seq_len, key):
    room = seq_len - 3
    a, b = min(a, room), min(b, room)
    expected = [a, b]
    while sum(expected) > room:  # as the authors did it
        expected[0 if expected[0] > expected[1] else 1] -= 1
    rows, labels, _ = packed(placed([[a], [b]]), seq_len, key)
    first, first_end, second, second_end = spans(rows[0])
    assert labels[0] and first < a <= second, "a sentence alone in its document takes a random B"
    assert [first_end - first, second_end - second] == expected


@pytest.mark.parametrize(("a", "b", "seq_len"), [(40, 40, 43), (300, 300, 400), (30, 10, 35)])
def test_a_coin_says_from_which_end_each_token_goes(a, b, seq_len):
    fronts, totals = [], []
    for seed in range(400):
        first, first_end, second, second_end = spans(
            packed(placed([[a], [b]]), seq_len, (seed,))[0][0]
        )
        fronts.append((first, second - a))
        totals.append((a - first_end + first, b - second_end + second))
    front, total = np.array(fronts), np.array(totals)
    for side in range(2):
        cut = total[0, side]
        assert (total[:, side] == cut).all()
        # Binomial(cut, 1/2): its mean within five standard errors, and its spread.
        assert abs(front[:, side].mean() - cut / 2) <= 5 * (cut / 4 / 400) ** 0.5
        assert front[:, side].var() == pytest.approx(cut / 4, rel=0.4)
    if total.all():  # both were cut, each by coins of its own
        assert abs(np.corrcoef(front.T)[0, 1]) < 0.25


@pytest.mark.parametrize(
    ("sizes", "seq_len", "expected"),
    [
        ([], 8, []),
        ([[], [0]], 8, []),
        ([[1]], 8, []),
        ([[2]], 8, [[CLS, 3, SEP, 4, SEP, PAD, PAD, PAD]]),
        ([[5]], 8, [[CLS, 3, 4, SEP, 5, 6, 7, SEP]]),
        ([[2, 3]], 8, [[CLS, 3, 4, SEP, 5, 6, 7, SEP]]),
        ([[1], [1]], 5, [[CLS, 3, SEP, 4, SEP], [CLS, 4, SEP, 3, SEP]]),
        ([[2], [3]], 8, [[CLS, 3, 4, SEP, 5, 6, 7, SEP], [CLS, 5, 6, 7, SEP, 3, 4, SEP]]),
    ],
)
def test_pairs_by_hand(sizes, seq_len, expected):
    # A key whose first targets are not short.
    assert packed(placed(sizes), seq_len, (1,))[0].tolist() == expected


def test_counts_add_up():
    one, two = (packed(placed(sizes), 9)[2] for sizes in ([[4, 4], [3]], [[30] * 9]))
    both = one + two
    for name, value in vars(both).items():
        assert value == getattr(one, name) + getattr(two, name)
    pairing = Pairing(samples=5)
    pack_pairs(placed([[4, 4], [3]]), 9, cls=CLS, sep=SEP, pad=PAD, key=(0,), pairing=pairing)
    assert pairing == one + Pairing(samples=5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: packed(placed([[3]]), 4), "seq_len must be at least 5"),
        (lambda: Segmented(np.arange(3), np.array([0, 2]), np.array([0, 1])), "from 0 to 3"),
        (lambda: Segmented(np.arange(3), np.array([0, 3]), np.array([1])), "from 0 to 1"),
        (lambda: Segmented(np.arange(3), np.array([0, 4, 3]), np.array([0, 2])), "never fall"),
        (lambda: Segmented(np.arange(0), np.array([], int), np.array([0])), "from 0 to 0"),
    ],
    ids=["seq_len", "segments", "documents", "falling", "empty"],
)
def test_what_cannot_be_paired_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------- real text


@pytest.fixture(scope="module")
def novels():
    tokenizers = pytest.importorskip("tokenizers")
    from siftloader.corpus import read_documents
    from siftloader.files import find_inputs

    tokenizer = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    texts, length = [], 0
    for document in read_documents(find_inputs([str(DEMO / "embedded_pd.txt.xz")])):
        texts.append(segment(document.text))
        length += len(document.text)
        if length > 1_500_000:
            break
    sentences = [sentence for text in texts for sentence in text]
    tokens = [
        np.array(each.ids, np.uint32)
        for each in tokenizer.encode_batch_fast(sentences, add_special_tokens=False)
    ]
    documents = Segmented(
        np.concatenate(tokens),
        np.cumsum([0, *map(len, tokens)]),
        np.cumsum([0, *map(len, texts)]),
    )
    return documents, sentences, tokenizer


def places_of(documents):
    ids = np.arange(TEXT, TEXT + len(documents.ids))
    return Segmented(ids, documents.segments, documents.documents)


def as_the_authors(documents, seq_len, seed):
    """Shares of random pairs and dropped tokens, mean lengths: lists, loops and coins."""
    dice, room = random.Random(seed), seq_len - 3
    bounds, offsets = documents.documents.tolist(), documents.segments.tolist()
    texts = []
    for begin, end in pairwise(bounds):
        texts.append([])
        for first, last in pairwise(offsets[begin : end + 1]):
            parts = -(-(last - first) // room)
            edges = [first + part * (last - first) // parts for part in range(parts + 1)]
            texts[-1] += [list(range(*edge)) for edge in pairwise(edges)] if parts else []
    seen, labels, lengths, totals = set(), [], [], []
    for own, text in enumerate(texts):
        rest = list(text)
        while rest:
            target = dice.randint(2, room) if dice.random() < SHORT else room
            chunk = []
            while rest and sum(map(len, chunk)) < target:
                chunk.append(rest.pop(0))
            middle = dice.randint(1, max(len(chunk) - 1, 1))
            a, b = list(chain(*chunk[:middle])), list(chain(*chunk[middle:]))
            unused = []
            if label := not b or dice.random() < 0.5:
                unused, b = chunk[middle:], []
                other = dice.choice([text for index, text in enumerate(texts) if index != own])
                for sentence in other[dice.randrange(len(other)) :]:
                    b += sentence
                    if len(a) + len(b) >= target:
                        break
            back = []  # what was cut off the end
            while len(a) + len(b) > room:
                side = a if len(a) > len(b) else b
                token = side.pop(0 if (front := dice.random() < 0.5) else -1)
                if not front and side is (a if label else b):
                    back.insert(0, token)
            rest = ([back] if back else []) + unused + rest
            seen.update(a, b)
            labels.append(label)
            lengths.append(len(a))
            totals.append(len(a) + len(b))
    dropped = 1 - len(seen) / offsets[-1]
    return len(labels), np.mean(labels), dropped, np.mean(lengths), np.mean(totals)


@pytest.mark.parametrize("seq_len", [128, 512])
def test_novels_are_paired_as_the_authors_paired(novels, seq_len):
    documents = places_of(novels[0])
    rows, labels, pairing = packed(documents, seq_len)
    assert pairing.tokens == pairing.kept + pairing.dropped

    # The shares, within five standard deviations.
    free = pairing.samples - pairing.forced
    assert abs(pairing.random - pairing.forced - free / 2) < 5 * (free / 4) ** 0.5
    expected = 0.1 * (seq_len - 5) / (seq_len - 4) * pairing.samples
    assert abs(pairing.short - expected) < 5 * expected**0.5
    assert pairing.forced < 0.05 * pairing.samples
    assert pairing.dropped < {128: 0.08, 512: 0.03}[seq_len] * pairing.tokens

    where = documents.segments[documents.documents]
    places = np.array([spans(row) for row in rows])
    own, other = (np.searchsorted(where, places[:, side], "right") for side in (0, 2))
    assert ((own != other) == labels).all(), "a pair from one document must not be marked random"
    assert (places[:, 2] >= places[:, 1])[labels == 0].all()
    # Where B follows, the gap is what truncation took.
    gap = (places[:, 2] - places[:, 1])[labels == 0]
    full = (rows[:, -1] != PAD)[labels == 0]
    assert not gap[~full].any() and gap.mean() < 0.1 * seq_len
    # Random Bs are from everywhere, not only from the neighbours.
    assert len(np.unique(other[labels == 1])) > 0.9 * (len(where) - 1)
    assert np.bincount((other - own)[labels == 1] + len(where)).max() < 0.1 * labels.sum()

    # Lists, loops and coins come to the same: the means over the seeds, within five standard errors.
    seeds = range(5 if FACTOR == 1 else 10)
    slow = np.array([as_the_authors(documents, seq_len, seed) for seed in seeds])
    fast = []
    for seed in seeds:
        rows, labels, pairing = packed(documents, seq_len, (seed,))
        lengths = (rows == SEP).argmax(1) - 1
        dropped = pairing.dropped / pairing.tokens
        total = (rows >= TEXT).sum(1).mean()
        fast.append((len(rows), labels.mean(), dropped, lengths.mean(), total))
    error = ((slow.var(0) + np.var(fast, 0)) / len(seeds)) ** 0.5
    assert (abs(np.mean(fast, 0) - slow.mean(0)) < 5 * error).all()


def test_the_rows_of_novels_read_as_the_novels_do(novels):
    documents, _, tokenizer = novels
    special = {name: tokenizer.token_to_id(f"[{name.upper()}]") for name in ("cls", "sep", "pad")}
    rows, labels = pack_pairs(documents, 128, key=(0,), **special)
    places, twice, _ = packed(places_of(documents), 128)
    assert np.array_equal(labels, twice), "what the tokens are must not matter"
    text = places >= TEXT
    assert np.array_equal(rows[text], documents.ids[places[text] - TEXT])
    whole = tokenizer.decode(documents.ids.tolist(), skip_special_tokens=False)
    for row in rows[labels == 0][:50]:
        first, second = np.flatnonzero(row == special["sep"])
        for side in (row[1:first], row[first + 1 : second]):
            # Less a token at each end: truncation may have cut a word in pieces.
            assert (
                tokenizer.decode(side[1:-1].tolist(), skip_special_tokens=False).strip("# ")
                in whole
            )


# ---------------------------------------------------------------- sentences


@examples(300)
@given(st.text() | st.text(st.sampled_from("aB.!?…。！ \n\t\"')([“I5,é")))
def test_sentences_joined_are_the_text(text):
    sentences = segment(text)
    assert "".join(sentences) == text
    assert all(sentences)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" ", [" "]),
        ("no end", ["no end"]),
        ("One. Two! Three? Four", ["One.", " Two!", " Three?", " Four"]),
        ("One.  Two.\tThree.", ["One.", "  Two.", "\tThree."]),
        ("One... Two… Three?! Four", ["One...", " Two…", " Three?!", " Four"]),
        ("wait... and see", ["wait... and see"]),
        ("pi is 3.14. So", ["pi is 3.14.", " So"]),
        ("In 1816. 12 came.", ["In 1816.", " 12 came."]),
        ("www.a.org is up", ["www.a.org is up"]),
        ('"Go!" he said. "No."', ['"Go!" he said.', ' "No."']),
        ("He went. “Why?” “So.” Then", ["He went.", " “Why?”", " “So.”", " Then"]),
        ("(It was.) She", ["(It was.)", " She"]),
        ("Fin. Élan. Ça va. été", ["Fin.", " Élan.", " Ça va. été"]),
        ("Да. Нет. да", ["Да.", " Нет. да"]),
        ("Mr. Dee met Mrs. Eve, Dr. Fo and St. Gil. He", None),
        ("Some, e.g. The Times, i.e. Papers, vs. Books", None),
        ("J. R. R. Tolkien and É. Zola", None),
        ("No. 5, pp. 3 and vol. 2, fig. 7, p. 9", None),
        ("No. He did. It was I. Then", ["No.", " He did.", " It was I.", " Then"]),
        ("A line\nAnother\n\nThird", ["A line\n", "Another\n\n", "Third"]),
        ("It ends.\nThen. More \n  In", ["It ends.\n", "Then.", " More \n", "  In"]),
        ("wrapped in the\nmiddle of it\n\nof it", ["wrapped in the\nmiddle of it\n\n", "of it"]),
        ("它。好！是？「对。」不", ["它。", "好！", "是？", "「对。」", "不"]),
    ],
)
def test_sentences_by_hand(text, expected):
    if expected is None:
        whole, _, last = text.partition(". He")
        expected = [whole + ".", " He"] if last or text.endswith(". He") else [text]
    assert segment(text) == expected


@pytest.mark.parametrize(
    "unit", [".", ". ", ".)", ". (", "\n", "\n ", "。", "a", '."', "." + " " * 99, "\n" + " " * 99]
)
def test_no_text_makes_sentences_slow(unit):
    # A quadratic search would need minutes.
    text = (unit * 300_000)[:300_000]
    assert "".join(segment(text)) == text


def test_novels_are_cut_in_sentences(novels):
    _, sentences, _ = novels
    length = np.array(list(map(len, sentences)))
    assert 90 < length.mean() < 160 and np.median(length) < 130
    assert not any(sentence.endswith(("Mr.", "Mrs.", "Dr.")) for sentence in sentences)
    assert np.mean([not sentence.strip() for sentence in sentences]) == 0
