"""The page: whole, of one file, and without anything that would be fetched."""

from __future__ import annotations

import base64
from html.parser import HTMLParser

from composer_gradmatch.studies.html import as_html

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
VOID = {"meta", "img", "br", "hr"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and lists what they hold."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


SUMMARY = """# A study of a & b

> Do this.

![One](one.png)

| a | b |
| --- | --- |
| 1 < 2 | <script>alert(1)</script> |
"""


def test_a_page_needs_no_other_file(tmp_path):
    for name in ("one.png", "two_more.png"):
        (tmp_path / name).write_bytes(PNG)
    text = as_html(SUMMARY, tmp_path, "python -m composer_gradmatch.studies verdict c.yaml --out 'a b'")
    page = Page(text)
    assert len(page.sources) == 2
    assert all(base64.b64decode(source.removeprefix("data:image/png;base64,")) == PNG for source in page.sources)
    assert "http" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert "--out 'a b'" in page.text
    assert 'alt="two more"' in text
    assert "<title>A study of a &amp; b</title>" in text


def test_a_page_is_as_wide_as_its_window_and_its_tables_scroll(tmp_path):
    (tmp_path / "one.png").write_bytes(PNG)
    text = as_html(SUMMARY, tmp_path)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert text.count('<div class="table"><table>') == text.count("</table></div>") == 1
    assert "Made by" not in text
