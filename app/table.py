"""Small tables as HTML that screen readers can walk through. Every text in them is escaped."""

from collections.abc import Iterable, Sequence
from html import escape


def to_html(caption: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table whose first cell in each row names the row; it scrolls by itself where the page is narrow."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    return (
        f'<p class="caption">{escape(caption)}</p>'
        f'<div class="table" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cells(row: Sequence[object]) -> str:
    first, *rest = (escape(str(value)) for value in row)
    return f'<th scope="row">{first}</th>' + "".join(f"<td>{value}</td>" for value in rest)
