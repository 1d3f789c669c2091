"""One self-contained page about a run: it opens anywhere and loads nothing."""

import base64
import html
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

from quantlab.report import causes, pictures, sites, tables

Walk = Mapping[str, Any]

_STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #5b6470;
  --line: #dde1e6; --wash: #f5f7f9; --mark: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 82rem;
  font: 15px/1.5 system-ui, 'Segoe UI', Helvetica, Arial, sans-serif;
  color: var(--ink); background: #fff; }
h1 { font-size: 1.7rem; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .6rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p.note, figcaption { color: var(--soft); margin: .2rem 0 .8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums;
  font-size: .88rem; }
th, td { padding: .28rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
th.name, td.name { text-align: left; }
td.wide { white-space: normal; min-width: 24rem; }
tr.float td { background: var(--wash); font-weight: 600; }
td.best { color: var(--mark); font-weight: 600; }
td code, li code { font-size: .84rem; }
figure { margin: .8rem 0; }
img { max-width: 100%; height: auto; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.pair figure { min-width: 0; }
details { border: 1px solid var(--line); border-radius: 6px;
  margin: .5rem 0; padding: 0 .9rem; }
summary { cursor: pointer; padding: .5rem 0; font-weight: 600; }
summary span { color: var(--soft); font-weight: 400; margin-left: .8rem; }
.bar { display: inline-block; height: .6rem; background: var(--mark);
  opacity: .75; vertical-align: middle; margin-left: .5rem; }
.track { display: inline-block; width: 6rem; text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem;
  font-size: .88rem; }
dt { color: var(--soft); } dd { margin: 0; }
@media print { details { break-inside: avoid; } }
"""

_PAGE = string.Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header><h1>$title</h1><p class="note">$subtitle</p></header>
<div class="scroll">$results</div>
<p class="note">± is one standard error. The best variant of a column is
coloured; <b>float</b> is the model before quantization.</p>
$models
<h2>How it was made</h2>
$manifest
</body>
</html>
""")

_MODEL = string.Template("""<section>
<h2>$model</h2>
<div class="pair">$overview</div>
$variants
</section>
""")

_VARIANT = string.Template("""<details>
<summary>$variant<span>$summary</span></summary>
<p class="note">$walk</p>
<div class="pair">$figures</div>
<h3>Bad sites</h3>
<div class="scroll">$bad</div>
<h3>All quantized sites</h3>
<div class="scroll">$table</div>
<h3>Left in float</h3>
$coverage
</details>
""")


def render(
  metrics: Mapping[str, Any],
  sites_of: Mapping[str, Mapping[str, list[sites.SiteRow]]],
  manifest: Mapping[str, Any],
  title: str = 'Quantization report',
  walks_of: Mapping[str, Mapping[str, Walk]] | None = None,
  curves_of: Mapping[str, Mapping[str, Sequence[pictures.Curves]]]
  | None = None,
) -> str:
  """The page of a run.

  Args:
    metrics: flat metrics, see `tables.rows`.
    sites_of: model -> variant -> its sites.
    manifest: what the run was made with, see `runtime.manifest`.
    title: the page's heading.
    walks_of: model -> variant -> what its chain did, see `model_rows.walk`.
    curves_of: model -> variant -> what training logged, a dict of
      `[[step, value], ...]` for each seed.

  Returns:
    HTML with every picture inside. The same input gives the same text.
  """
  rows = tables.rows(metrics)
  models = list(dict.fromkeys(row['model'] for row in rows))
  return _PAGE.substitute(
    title=_text(title),
    style=_STYLE,
    subtitle=_text(_subtitle(models, rows, manifest)),
    results=_results(rows),
    models='\n'.join(
      _model(
        m,
        [r for r in rows if r['model'] == m],
        sites_of.get(m, {}),
        (walks_of or {}).get(m, {}),
        (curves_of or {}).get(m, {}),
      )
      for m in models
    ),
    manifest=_definitions(manifest),
  )


def _subtitle(
  models: Sequence[str], rows: Sequence[tables.Row], manifest: Mapping[str, Any]
) -> str:
  variants = {r['variant'] for r in rows} - {'float'}
  device = manifest.get('device', {})
  versions = manifest.get('versions', {})
  return (
    f'{len(models)} {_plural("model", models)}, '
    f'{len(variants)} {_plural("variant", variants)} · '
    f'quantlab {versions.get("quantlab")} · jax {versions.get("jax")} · '
    f'{device.get("kind")}'
  )


def _results(rows: Sequence[tables.Row]) -> str:
  """The table of every model and variant, best values marked."""
  shown = tables.columns(rows)
  names = [('model', True), ('variant', True)]
  head = _head(names + [(c.header, False) for c in shown])
  best = {
    (r['model'], c.name): _best(rows, r['model'], c)
    for r in rows
    for c in shown
  }
  body = []
  for i, row in enumerate(rows):
    first = i == 0 or rows[i - 1]['model'] != row['model']
    cells = [_cell(row['model'] if first else '', 'name')]
    cells.append(_cell(row['variant'], 'name'))
    for c in shown:
      value = tables.number(row.get(c.name))
      is_best = value is not None and value == best[row['model'], c.name]
      is_best = is_best and row['variant'] != 'float'
      cells.append(_cell(tables.cell(row, c), 'best' if is_best else ''))
    kind = ' class="float"' if row['variant'] == 'float' else ''
    body.append(f'<tr{kind}>{"".join(cells)}</tr>')
  return f'<table>{head}<tbody>{"".join(body)}</tbody></table>'


def _best(
  rows: Sequence[tables.Row], model: str, column: tables.Column
) -> float | None:
  values = [
    tables.number(r.get(column.name))
    for r in rows
    if r['model'] == model and r['variant'] != 'float'
  ]
  known = [v for v in values if v is not None and not math.isnan(v)]
  if not known or column.better is None:
    return None
  return max(known) if column.better == 'high' else min(known)


def _model(
  model: str,
  rows: Sequence[tables.Row],
  variants: Mapping[str, list[sites.SiteRow]],
  walks: Mapping[str, Walk],
  curves: Mapping[str, Sequence[pictures.Curves]],
) -> str:
  drawn = pictures.overview(rows, variants) + pictures.learning(curves)
  overview = [_figure(png, caption) for png, caption in drawn]
  by_variant = {r['variant']: r for r in rows}
  return _MODEL.substitute(
    model=_text(model),
    overview=''.join(overview),
    variants='\n'.join(
      _variant(name, by_variant.get(name, {}), table, walks.get(name, {}))
      for name, table in variants.items()
    ),
  )


def _variant(
  name: str, row: tables.Row, table: list[sites.SiteRow], walk: Walk
) -> str:
  coded = sites.quantized(table)
  parts = [f'{len(coded)} of {len(table)} sites quantized']
  parts += [
    f'{c.header} {tables.cell(row, c)}' for c in tables.columns([row])[:1]
  ]
  return _VARIANT.substitute(
    variant=_text(name),
    summary=_text(' · '.join(parts)),
    walk=_text(_told(walk)),
    figures=''.join(_figure(p, c) for p, c in pictures.details(coded, walk)),
    bad=_bad(coded, walk.get('transform', ())),
    table=_sites(coded),
    coverage=_coverage(sites.unquantized(table)),
  )


def _told(walk: Walk) -> str:
  """The chain in a sentence, and why there are no errors by block."""
  if not walk:
    return ''
  told = f'Made by {", then ".join(walk["transform"])}.'
  if not walk['blocks']:
    told += (
      ' All weights were encoded at once, without a walk through the blocks:'
      ' there are no errors by block.'
    )
  return told


def _bad(table: list[sites.SiteRow], used: Sequence[str]) -> str:
  """The sites to worry about, each with a likely cause and a remedy."""
  rule = (
    f'more than {causes.BELOW_MEDIAN:g} dB under the median, or one of the '
    f'{causes.WORST} worst and under {causes.POOR:g} dB'
  )
  found = causes.bad(table)
  if not found:
    return f'<p class="note">None: no site is {rule}.</p>'
  head = _head([('site', True), ('SQNR', False), ('likely cause', True)])
  body = []
  for r in found:
    seen = r.get('statistics')
    cause = str(causes.diagnose(seen, used)) if seen else 'not looked at.'
    if seen and seen.get('layer'):
      layer = ', '.join(map(str, seen['layer']))
      cause = f'layer {layer}, the worst of its stack: {cause}'
    body.append(
      '<tr>'
      + _cell(r['site'], 'name', code=True)
      + _cell(f'{sites.finite(r, "sqnr"):.1f} dB')
      + _cell(cause[:1].upper() + cause[1:], 'name wide')
      + '</tr>'
    )
  return (
    f'<p class="note">A site is bad when it is {rule}.</p>'
    f'<table>{head}<tbody>{"".join(body)}</tbody></table>'
  )


def _sites(table: list[sites.SiteRow]) -> str:
  """Sites with quantizers, error, bits and bytes."""
  head = _head(
    [(n, True) for n in ('site', 'kind', 'weight', 'input')]
    + [(n, False) for n in ('SQNR', 'bits/weight', 'bytes', 'of float')]
  )
  top = max((r.get('nbytes', 0) for r in table), default=0) or 1
  body = []
  for r in table:
    size, whole = r.get('nbytes', 0), r.get('float_nbytes', 0)
    width = f'{6 * size / top:.2f}rem'
    bar = (
      f'<span class="track"><i class="bar" style="width:{width}"></i></span>'
    )
    sqnr = sites.finite(r, 'sqnr')
    bits = sites.finite(r, 'bits')
    body.append(
      '<tr>'
      + _cell(r['site'], 'name', code=True)
      + _cell(r.get('kind', ''), 'name')
      + _cell(r.get('weight') or 'float', 'name', code=True)
      + _cell(r.get('input') or 'float', 'name', code=True)
      + _cell('' if sqnr != sqnr else f'{sqnr:.1f} dB')
      + _cell('' if bits != bits else f'{bits:.2f}')
      + f'<td>{_text(tables.nbytes(size))}{bar}</td>'
      + _cell(f'{100 * size / whole:.0f} %' if whole else '')
      + '</tr>'
    )
  return f'<table>{head}<tbody>{"".join(body)}</tbody></table>'


def _coverage(table: list[sites.SiteRow]) -> str:
  if not table:
    return '<p class="note">Nothing: every site is quantized.</p>'
  items = ''.join(
    f'<li><code>{_text(r["site"])}</code> {_text(r.get("kind", ""))}'
    f'{_text(": " + r["why_float"] if r.get("why_float") else "")}</li>'
    for r in table
  )
  return f'<ul>{items}</ul>'


def _definitions(value: Mapping[str, Any], prefix: str = '') -> str:
  """A mapping as a list of terms, nested keys joined by dots."""
  flat = _flatten(value, prefix)
  items = ''.join(
    f'<dt>{_text(k)}</dt><dd>{_text(str(v))}</dd>' for k, v in flat.items()
  )
  return f'<dl>{items}</dl>'


def _flatten(value: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for k, v in value.items():
    if isinstance(v, list) and v and isinstance(v[0], Mapping):
      v = dict(enumerate(v, 1))
    if isinstance(v, Mapping):
      flat |= _flatten(v, f'{prefix}{k}.')
    elif v not in (None, [], ''):
      flat[f'{prefix}{k}'] = v
  return flat


def _figure(png: bytes, caption: str) -> str:
  data = base64.b64encode(png).decode('ascii')
  width = int.from_bytes(png[16:20], 'big')  # as drawn: its text is readable
  room = f'flex: {width} 1 {0.9 * width:.0f}px'
  return (
    f'<figure style="{room}"><img alt="{_text(caption)}" '
    f'src="data:image/png;base64,{data}">'
    f'<figcaption>{_text(caption)}</figcaption></figure>'
  )


def _head(names: Sequence[tuple[str, bool]]) -> str:
  cells = ''.join(
    f'<th{" class=" + chr(34) + "name" + chr(34) if left else ""}>'
    f'{_text(n)}</th>'
    for n, left in names
  )
  return f'<thead><tr>{cells}</tr></thead>'


def _cell(text: str, kind: str = '', code: bool = False) -> str:
  shown = f'<code>{_text(text)}</code>' if code else _text(text)
  return f'<td class="{kind}">{shown}</td>' if kind else f'<td>{shown}</td>'


def _text(value: str) -> str:
  return html.escape(value, quote=True)


def _plural(word: str, things: Any) -> str:
  return word if len(things) == 1 else word + 's'
