"""What a reader would read stays, what the page is built from goes."""

from __future__ import annotations

import sys

import pytest
from effort import examples
from hypothesis import given, strategies as st

from siftloader.errors import CorpusError
from siftloader.wikitext import plain_text


pytest.importorskip("mwparserfromhell")

PARTS = """[[ ]] {{ }} {| |} |- | [http://a ] <ref> </ref> <ref/> <nowiki> </nowiki> ''' '' == = * #
: ; <!-- --> &lt; &#xD800; &#0; __TOC__ File: Category: <math> </math> <table> <td> <br> </div>
<div""".split()  # noqa: SIM905 - a line of markup reads better than a list of strings


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("'''Ada''' is ''a'' name.", "Ada is a name."),
        ("One.\n\nTwo.\n\n\nThree.", "One.\nTwo.\nThree."),
        ("[[link]]s and [[target|text]] and [[:Category:X]]", "links and text and Category:X"),
        ("[http://a.b text] [http://a.b] http://a.b end", "text end"),
        ("a{{template|{{nested|x}}}}b{{{argument}}}c", "abc"),
        ("a<ref>no [[such]] thing</ref>b<ref name=x />c", "abc"),
        ("a<!-- hidden -->b", "ab"),
        ("a\n{| class=x\n|-\n| cell\n|}\nb", "a\nb"),
        ("a<math>x^2</math>b<gallery>File:x.jpg|y</gallery>c", "abc"),
        ("[[File:a.jpg|thumb|a [[nested]] caption]]text", "text"),
        ("[[Image:a.jpg]][[Datei:b.jpg]][[Fichier:c.jpg|x]][[Файл:d.jpg]]text", "text"),
        ("[[Category:A]][[Kategorie:B]][[Catégorie:C|key]][[category:d]]text", "text"),
        ("[[Pildi:a.jpg]][[LIIGI JA CO:b]]text", "text"),
        ("text[[de:Text]][[zh-min-nan:X]][[simple:Y]]", "text"),
        ("[[Star Trek: Picard]] and [[Book: A|b]]", "Star Trek: Picard and b"),
        ("a &amp; b&nbsp;c &mdash; d &#8364; e", "a & b c — d € e"),
        ("a&#xD800;b", "a\ufffdb"),
        ("== Heading ==\ntext\n=== Next ===\nmore", "Heading\ntext\nNext\nmore"),
        ("* one\n* two\n# three\n; term : means", "one\ntwo\nthree\nterm means"),
        ("a<br />b<div>c</div>d", "a\nb\nc\nd"),
        ("__NOTOC__text__FORCETOC__ __init__", "text __init__"),
        ("<nowiki>[[x]] &amp;</nowiki>", "x &"),
        ("Ada ({{lang|x}}; ) wrote ( ) it", "Ada wrote it"),
        ("broken <ref>unclosed\nnext line", "broken unclosed\nnext line"),
        ("broken [[link and {{template", "broken link and template"),
        ("a\u2028b\x0bc", "a\nb\nc"),
        ("{{only|a template}}", ""),
        ("[[File:only.jpg]]\n\n----\n* ", ""),
        ("", ""),
    ],
    ids=[f"{number:02}" for number in range(29)],
)
def test_markup_goes_and_text_stays(markup, expected):
    found = plain_text(" Title ", markup, ("Pildi", "Liigi ja co"))
    assert found == (f"Title\n{expected}" if expected else "")


@examples(200)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(PARTS),
            st.sampled_from(["\n", " ", "word", "\n\n"]),
        ),
        max_size=25,
    ).map("".join)
)
def test_any_markup_gives_lines_of_text(markup):
    """However broken, parsing ends, and a document has no blank line, NUL or half character."""
    text = plain_text("T", markup)
    text.encode()
    assert "\0" not in text
    assert all(line == line.strip() and line for line in text.splitlines())


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mwparserfromhell", None)
    with pytest.raises(CorpusError, match=r"mwparserfromhell.*pip install 'siftloader\[wiki\]'"):
        plain_text("T", "x")
