"""Markdown as one self-contained HTML page: style and pictures inside, no request to anywhere."""

from collections.abc import Mapping
from html import escape

from markdown_it import MarkdownIt

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5a6068; --line: #d9dce1; --band: #f5f6f8; --page: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #a2a9b3; --line: #3a4048; --band: #23272d; --page: #181b1f; } }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  color: var(--ink); background: var(--page); max-width: 76rem; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .94rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .9rem; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
th { font-weight: 600; color: var(--soft); border-bottom-width: 2px; vertical-align: bottom; }
th:not([style]), td:not([style]) { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 6rem; }
tbody tr:hover { background: var(--band); }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
code { font: .9em ui-monospace, "SF Mono", Menlo, Consolas, monospace; background: var(--band); padding: .1em .35em;
  border-radius: 4px; }
pre { background: var(--band); padding: 1rem; border-radius: 6px; overflow: auto; max-height: 28rem; }
pre code { background: none; padding: 0; }
li { margin: .3rem 0; max-width: 60rem; }
"""


def to_html(markdown: str, *, title: str, images: Mapping[str, str]) -> str:
    """Renders CommonMark with tables; raw HTML is shown, not obeyed. `images` are data URIs by the pictures' names."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for token in tokens:
        for child in token.children or []:
            if child.type == "image":
                child.attrSet("src", images[str(child.attrGet("src"))])
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
