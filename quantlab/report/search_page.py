"""One self-contained page about a search."""

from __future__ import annotations

import base64
import html
import string
from collections.abc import Mapping, Sequence
from typing import Any

import rich
import rich.box
import rich.console
import rich.table

from quantlab.report import html as page
from quantlab.report import plots

_PAGE = string.Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header><h1>$title</h1></header>
$sections
</body>
</html>
""")


def render_search(
  title: str,
  tables: Mapping[str, Sequence[Mapping[str, Any]]],
  figures: Mapping[str, plots.Figure],
) -> str:
  """The page: tables of plain rows, and pictures, each under its name."""
  parts = []
  for name, rows in tables.items():
    parts.append(f'<h2>{html.escape(name)}</h2>{_table(rows)}')
  for name, figure in figures.items():
    data = base64.b64encode(plots.to_png(figure)).decode()
    parts.append(
      f'<h2>{html.escape(name)}</h2><figure><img '
      f'alt="{html.escape(name, quote=True)}" '
      f'src="data:image/png;base64,{data}"></figure>'
    )
  return _PAGE.substitute(
    title=html.escape(title), style=page._STYLE, sections='\n'.join(parts)
  )


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
  """Rows as a table on the terminal; wide in a file, where nothing wraps."""
  out = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  heads = list(dict.fromkeys(k for row in rows for k in row))
  for head in heads:
    out.add_column(head, overflow='fold')
  for row in rows:
    out.add_row(*(_text(row.get(h, '')) for h in heads))
  console = rich.get_console()
  if not console.is_terminal:
    console = rich.console.Console(width=200)
  console.print(out)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
  heads = list(dict.fromkeys(k for row in rows for k in row))
  top = ''.join(f'<th>{html.escape(h)}</th>' for h in heads)
  body = ''.join(
    '<tr>'
    + ''.join(f'<td>{html.escape(_text(row.get(h, "")))}</td>' for h in heads)
    + '</tr>'
    for row in rows
  )
  return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _text(value: Any) -> str:
  return f'{value:.5g}' if isinstance(value, float) else str(value)
