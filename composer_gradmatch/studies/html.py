"""The summary as a page: one file that needs no other, to be looked at, printed or sent."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

from markdown_it import MarkdownIt

__all__ = ["as_fragment", "as_html"]

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1rem; max-width: 68rem; color: #1b1f24; background: #fff;
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; }}
h2 {{ font-size: 1.25rem; margin-top: 2rem; border-bottom: 1px solid #d0d7de; padding-bottom: .2rem; }}
blockquote {{ margin: 1rem 0; padding: .75rem 1rem; border-left: .3rem solid #0173b2; background: #eef6fb;
  font-size: 1.1rem; }}
blockquote p {{ margin: 0; }}
.table {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ border: 1px solid #d0d7de; padding: .35rem .6rem; text-align: left; vertical-align: top; }}
th {{ background: #f6f8fa; }}
img {{ display: block; max-width: min(100%, 46rem); height: auto; margin: 1rem auto; }}
code {{ background: #f6f8fa; padding: .1em .3em; border-radius: .2rem; font-size: .9em; }}
pre {{ background: #f6f8fa; padding: .75rem; overflow-x: auto; border-radius: .3rem; }}
pre code {{ padding: 0; }}
@media (max-width: 40rem) {{ body {{ padding: .6rem; }} h1 {{ font-size: 1.3rem; }}
  th, td {{ padding: .25rem .4rem; }} }}
@media print {{ body {{ max-width: none; }} .table {{ overflow: visible; }} }}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def as_html(summary: str, folder: Path, command: str = "") -> str:
    """Makes a page of a summary, with the folder's figures in it.

    Figures stand where the summary shows them; those that it does not show follow behind it.

    Args:
        summary (str): Markdown; any HTML in it is shown as text.
        folder (Path): Of the figures, as PNG.
        command (str, optional): What makes all of it once more. Default: ``""``.
    """
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+\.png)\)", summary)
    more = [path.name for path in sorted(folder.glob("*.png")) if path.name not in shown]
    if more:
        summary += "\n## Figures\n\n" + "\n\n".join(f"![{_words(name)}]({name})" for name in more) + "\n"
    if command:
        summary += f"\n## Made by\n\n```bash\n{command}\n```\n"
    body = as_fragment(summary, folder)
    title = next((line[2:] for line in summary.splitlines() if line.startswith("# ")), "Study")
    return _PAGE.format(title=html.escape(title), body=body)


def as_fragment(summary: str, folder: Path) -> str:
    """Makes a part of a page of Markdown, with the figures that it shows; see :func:`as_html`."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(summary)
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    return re.sub(r'src="([^":/]+\.png)"', lambda found: f'src="{_inline(folder / found[1])}"', body)


def _words(name: str) -> str:
    return name.removesuffix(".png").replace("_", " ")


def _inline(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
