"""Reading a page as a strict browser, a screen reader and a phone without a network would."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

VOID = {"meta", "img", "br", "wbr"}


class Page(HTMLParser):
    """Fails where a tag is closed that is not open, where a picture has no words, and at bad links.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.words: list[str] = []
        self.alts: list[str] = []
        self.links: list[Path] = []
        self.viewport = ""
        self.feed(self.source)
        self.close()

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs), f"an attribute of <{tag}> is there twice"
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            assert (found["src"] or "").startswith("data:image/png;base64,")
            assert found.get("alt"), "a picture without words"
            self.alts.append(found["alt"] or "")
        if tag == "a":
            self.follow(found["href"] or "")
        if tag == "summary":
            assert self.open[-2:] == ["details", "summary"]
        if tag == "meta" and found.get("name") == "viewport":
            self.viewport = found["content"] or ""
        assert tag not in {"script", "link", "iframe", "object"}

    def follow(self, href: str) -> None:
        """A link leads to a file that is there, by a relative way."""
        assert href.startswith("./"), href
        target = self.path.parent / unquote(href)
        assert target.is_file(), href
        self.links.append(target.resolve())

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def read(path: Path) -> Page:
    """A page that is well formed, loads nothing, fits a phone and shows no mark-up of another kind."""
    page = Page(path)
    assert page.open == []
    assert page.source.startswith("<!DOCTYPE html>")
    assert "width=device-width" in page.viewport
    assert page.source.count("<h1>") == 1
    for foreign in ("url(", "@import", "http:", "https:", "`", "$", "\\("):
        assert foreign not in page.source, foreign
    style = re.findall(r"<style>(.*?)</style>", page.source, re.DOTALL)
    assert len(style) == 1
    for kind in ("screen and (prefers-color-scheme: dark)", "print", "(max-width"):
        assert f"@media {kind}" in style[0]
    return page
