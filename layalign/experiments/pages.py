"""Pages with tables and plots: self-contained HTML, and Markdown."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from layalign.utils.files import write_whole

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px }
th, td { border-bottom: 1px solid #ddd; padding: .2rem .6rem; text-align: right; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% } figure { margin: 1rem 0 } figcaption { font-size: 13px; color: #555 }
"""
Rows = Sequence[Sequence[str]]


def png(figure: Any, **options: Any) -> bytes:
    """A figure as PNG; `options` are those of `savefig`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **{"dpi": 110, "bbox_inches": "tight", **options})
    return buffer.getvalue()


def page(title: str, body: str, style: str = STYLE) -> str:
    """A page of HTML."""
    wide = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8"><title>{title}</title>{wide}'
    return f'<!doctype html><html lang="en"><head>{head}<style>{style}</style></head><body>{body}</body></html>\n'


def paragraphs(*lines: str, kind: str = "") -> str:
    """A paragraph for each line of text, in HTML."""
    of_kind = f' class="{kind}"' if kind else ""
    return "".join(f"<p{of_kind}>{html.escape(line)}</p>" for line in lines)


def items(lines: Iterable[str]) -> str:
    """A list of lines of text, in HTML."""
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def table(head: Sequence[str], rows: Rows, kind: str = "", marked: bool = False) -> str:
    """A table in HTML. The cells are text; those below the header are HTML if `marked`."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = ["".join(f"<td>{cell if marked else html.escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    of_kind = f' class="{kind}"' if kind else ""
    return f"<table{of_kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def image(data: bytes, title: str) -> str:
    """A PNG picture inside a page of HTML, with its title below."""
    title = html.escape(title)
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<figure><img alt="{title}" src="{source}"><figcaption>{title}</figcaption></figure>'


def markdown_table(rows: Rows) -> str:
    """Rows as a Markdown table; the first row is the header."""
    left = "|---" + "|---:" * (len(rows[0]) - 1) + "|"
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], left, *lines[1:]]) + "\n"


def terminal_table(title: str, rows: Rows) -> Any:
    """Rows as a `rich` table for the terminal; the first row is the header."""
    from rich.table import Table

    table = Table(title=title)
    for place, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if place else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return table


class Report:
    """A report that is written twice: as `report.html`, and as `report.md` with its pictures beside it."""

    def __init__(self, folder: Path, title: str) -> None:
        self.folder, self.title = folder, title
        self.html, self.markdown = [f"<h1>{title}</h1>"], [f"# {title}\n"]

    def heading(self, title: str) -> None:
        """Begin a section."""
        self.html.append(f"<h2>{title}</h2>")
        self.markdown.append(f"## {title}\n")

    def items(self, lines: Sequence[str]) -> None:
        """Add a list."""
        self.html.append(items(lines))
        self.markdown.append("".join(f"- {line}\n" for line in lines))

    def table(self, rows: Rows, note: str = "") -> None:
        """Add a table, whose first row is the header, and a note on it."""
        self.html.append(table(rows[0], rows[1:]) + (paragraphs(note) if note else ""))
        escaped = [[cell.replace("*", "\\*") for cell in row] for row in rows]
        self.markdown.append(markdown_table(escaped) + ("\n" + note.replace("*", "\\*") + "\n" if note else ""))

    def picture(self, name: str, title: str, data: bytes) -> None:
        """Add a picture, which the caller writes to NAME.png too."""
        self.html.append(image(data, title))
        self.markdown.append(f"![{title}]({name}.png)\n")

    def write(self) -> None:
        """Write both files."""
        write_whole(self.folder / "report.html", page(self.title, "".join(self.html)))
        write_whole(self.folder / "report.md", "\n".join(self.markdown))
