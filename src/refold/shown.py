"""What people are shown: names that a stranger chose, made safe, and small tables for notebooks.

Knows no framework, no model and no other module: whatever prints a name may use it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from html import escape


def printable(name: object, limit: int = 200) -> str:
    r"""A name from a file or a path, fit for a terminal, a log and one line.

    Control characters, escape sequences, bidirectional overrides, invisible and unassigned characters are
    shown as escapes. Of a name longer than ``limit`` characters only the two ends are shown.

    >>> printable("conv\x1b[31m\u202e1")
    'conv\\x1b[31m\\u202e1'
    """
    text = str(name)
    if len(text) > limit:
        end = max(limit // 2, 1)
        text = f"{text[:end]}... ({len(text) - 2 * end} more characters) ...{text[-end:]}"
    return "".join(c if c == " " or unicodedata.category(c)[0] not in "CZ" else _escaped(c) for c in text)


def brief(name: object, limit: int) -> str:
    r"""A name as :func:`printable` shows it, in about ``limit`` characters: of a longer one, the two ends.

    For places where many names stand and another place has more of each.

    >>> brief("backbone/stage_3/conv", 12)
    'backb…3/conv'
    """
    text = str(name)
    if len(text) > limit:
        head = (limit - 1) // 2
        text = f"{text[:head]}…{text[-(limit - 1 - head) :]}"
    return printable(text, limit)


def _escaped(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


# ---- notebooks -------------------------------------------------------------------------------------------

# More rows than this help nobody in a notebook; the report page has them all.
MOST_ROWS = 50

# Colors that stand out on a light and on a dark notebook; everything else takes the notebook's own.
TONES = {"good": "#1a7f37", "bad": "#cf222e", "warn": "#9a6700", "plain": "#0969da"}

_CELL = "padding:.2em 1em .2em 0;text-align:left;vertical-align:top;border:0;background:none;color:inherit"
_NUMBER = "padding:.2em 1em .2em 0;text-align:right;border:0;background:none;color:inherit"
_RULE = "1px solid rgba(127,127,127,.35)"


def notebook_view(tone: str, verdict: str, sentence: str, tables: Iterable[str] = ()) -> str:
    """A small view for ``_repr_html_``: a colored word or two, a sentence, and tables of :func:`notebook_table`.

    It brings no script and no style sheet, and takes its letters and its background from the notebook.
    """
    badge = f"color:#fff;background:{TONES[tone]};border-radius:.4em;padding:.15em .6em;font-weight:600"
    return (
        f'<div style="border:{_RULE};border-radius:.6em;padding:.8em 1em;max-width:60em;overflow-x:auto">'
        f'<p style="margin:0"><span style="{badge}">{escape(printable(verdict))}</span> '
        f"{escape(printable(sentence, 400))}</p>{''.join(tables)}</div>"
    )


def notebook_table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[int] = ()
) -> str:
    """A table; ``numbers`` are the columns that stand to the right. Without rows, nothing."""
    rows = list(rows)
    if not rows:
        return ""
    styles = [_NUMBER if column in numbers else _CELL for column in range(len(head))]
    heads = "".join(
        f'<th scope="col" style="{style};opacity:.75;font-weight:600;border-bottom:{_RULE}">{escape(name)}</th>'
        for name, style in zip(head, styles, strict=True)
    )
    body = "".join(
        f"<tr>{''.join(_cell(cell, style) for cell, style in zip(row, styles, strict=True))}</tr>"
        for row in rows[:MOST_ROWS]
    )
    more = f'<p style="margin:.4em 0 0;opacity:.75">and {len(rows) - MOST_ROWS:,} more</p>'
    return (
        '<table style="border-collapse:collapse;margin:.8em 0 0;background:none">'
        f'<caption style="text-align:left;font-weight:600;padding-bottom:.2em;color:inherit">{escape(caption)}'
        f"</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
        f"{more if len(rows) > MOST_ROWS else ''}"
    )


def _cell(cell: object, style: str) -> str:
    return f'<td style="{style}">{escape(printable(cell))}</td>'
