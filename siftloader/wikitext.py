"""Wiki markup to plain text: one paragraph, heading or list item a line, the title first.

    plain_text("Ada", "'''Ada''' wrote [[note]]s.<ref>x</ref>")      # "Ada\nAda wrote notes."

What a reader of the page would not read as prose is dropped: templates, references, tables, files,
formulas, galleries. Link text and headings stay.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Collection
from typing import Any

from siftloader.errors import CorpusError


DROPPED = frozenset(
    """
    ce chem gallery graph hiero imagemap indicator inputbox mapframe maplink math
    pages ref references score section source style syntaxhighlight table
    templatedata templatestyles timeline tr td th
    """.split()  # noqa: SIM905 - one word a line is no table
)
LINES = frozenset(
    ["br", "hr", "p", "div", "li", "ul", "ol", "dl", "dt", "dd", "blockquote", "center", "poem"]
)  # begin a line

# What wikis in common languages call the namespaces whose links show no text of their own.
HIDDEN = frozenset(
    """
    file image media category datei bild kategorie fichier catégorie archivo imagen
    categoría immagine categoria ficheiro imagem arquivo bestand afbeelding
    categorie plik grafika kategoria файл изображение категория зображення категорія
    ファイル 画像 カテゴリ 文件 檔案 圖像 图像 分类 分類 파일 그림 분류 fil kategori tiedosto kuva luokka fájl
    kép kategória soubor kategorie dosya resim kategori berkas gambar kategori
    tập_tin hình thể_loại ملف صورة تصنيف پرونده تصویر رده קובץ תמונה קטגוריה चित्र
    श्रेणी αρχείο εικόνα κατηγορία fișier imagine датотека слика категорија fitxer
    imatge датотека категория ไฟล์ ภาพ หมวดหมู่
    """.split()  # noqa: SIM905 - one word a line is no table
)

_LANGUAGE_LINK = re.compile(r"[a-z]{2,3}(-[a-z]{2,})*|simple")  # [[de:Ada]] is a link to elsewhere
_SWITCH = re.compile(r"__([^\W\d_]+)__")
# What the parser could not make sense of, and so left as text.
_LEFT_OVER = re.compile(
    r"(?m)<ref\b[^<>\n]*/>|<ref\b[^<>\n]*>[^\n]{0,2000}?</ref>"
    r"|</?(?:ref|references|blockquote|div|span|small|big|su[bp]|center|br|font|nowiki|poem)"
    r"\b[^<>\n]*>"
    r"|^[^\n]*\|(?:thumb|thumbnail)\|[^\n]*$|^[ \t]*(?:\{\||\|[-}+]?|!)[^\n]*$"
    r"|'{2,}|\[\[|\]\]|\{\{|\}\}"
)
_EMPTY_BRACKETS = re.compile(r"[ \t\xa0]*[(（][\s,;:，；]*[)）]")
_SPACES = re.compile(r"[^\S\n]+")


def wikitext_parser() -> Callable[[str], Any]:
    """The function that parses wiki markup; CorpusError if its package is missing."""
    try:
        import mwparserfromhell
    except ImportError as error:
        raise CorpusError(
            "reading a wiki dump needs the `mwparserfromhell` package; "
            "pip install 'siftloader[wiki]'"
        ) from error
    parse: Callable[[str], Any] = mwparserfromhell.parse
    return parse


def plain_text(title: str, markup: str, hidden: Collection[str] = ()) -> str:
    """The prose of a page under its title; "" if nothing is left but the title.

    ``hidden`` are the names that this wiki gives its file and category namespaces, besides those
    in common languages.
    """
    text = _render(wikitext_parser()(markup), HIDDEN | {_plain_name(name) for name in hidden})
    text = _SWITCH.sub(lambda match: "" if match[1].isupper() else match[0], text)
    text = _EMPTY_BRACKETS.sub("", _LEFT_OVER.sub("", text))
    lines = [_SPACES.sub(" ", line).strip() for line in text.splitlines()]
    body = "\n".join(line for line in lines if any(map(str.isalnum, line)))
    return f"{title.strip()}\n{body}" if body else ""


def _render(code: Any, hidden: Collection[str]) -> str:
    parts = []
    for node in code.nodes:
        match type(node).__name__:
            case "Text":
                parts.append(str(node.value))
            case "Wikilink":
                parts.append(_link(node, hidden))
            case "ExternalLink":  # [http://… text], else a bare address
                parts.append(_render(node.title, hidden) if node.title is not None else "")
            case "Heading":
                parts.append(f"\n{_render(node.title, hidden)}\n")
            case "HTMLEntity":
                parts.append(html.unescape(str(node)))  # the node's own gives lone surrogates
            case "Tag":
                parts.append(_tag(node, hidden))
            # Template, Argument, Comment: nothing
    return "".join(parts)


def _link(node: Any, hidden: Collection[str]) -> str:
    target = str(node.title).strip()
    name, colon, _ = target.partition(":")
    if colon and name and (_plain_name(name) in hidden or _LANGUAGE_LINK.fullmatch(name)):
        return ""
    if node.text is not None:
        return _render(node.text, hidden)
    return _render(node.title, hidden).strip().removeprefix(":")


def _tag(node: Any, hidden: Collection[str]) -> str:
    name = str(node.tag).strip().lower()
    if name in DROPPED:
        return ""
    if name == "nowiki":
        return html.unescape(str(node.contents))
    inside = _render(node.contents, hidden) if node.contents is not None else ""
    return f"\n{inside}\n" if name in LINES and not node.wiki_markup else inside


def _plain_name(name: str) -> str:
    return name.strip().replace(" ", "_").lower()
