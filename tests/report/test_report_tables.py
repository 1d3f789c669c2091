"""Metrics as rows and as a table on the terminal."""

import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rich import console as rich_console

from quantlab import report
from quantlab.report import sites, tables

METRICS = {
  'fp/b/accuracy': 0.9,
  'q/b/w8/accuracy': 0.8,
  'q/b/w8/accuracy_stderr': 0.0125,
  'q/b/w8/kl_mean': 4.2e-5,
  'q/b/w8/sqnr_db': 'inf',
  'q/b/w8/seconds': 3.0,
  'q/a/w8/perplexity': 4.5,
  'fp/a/perplexity': 4.4,
  'run/seconds': 1.0,
}


def printed(table, width=200):
  console = rich_console.Console(width=width, file=io.StringIO())
  console.print(table)
  return console.file.getvalue()


def test_rows_group_by_model_with_float_first():
  rows = report.rows(METRICS)
  assert [(r['model'], r['variant']) for r in rows] == [
    ('b', 'float'),
    ('b', 'w8'),
    ('a', 'float'),
    ('a', 'w8'),
  ]
  assert rows[1]['accuracy'] == 0.8
  assert rows[1]['seconds'] == 3.0
  assert 'run' not in {r['model'] for r in rows}


def test_a_table_shows_the_columns_that_have_values():
  text = printed(report.results_table(METRICS))
  assert 'accuracy' in text
  assert 'perplexity' in text
  assert 'Spearman' not in text
  assert '80.00 % ± 1.25' in text
  assert '4.20e-05' in text
  assert 'inf dB' in text


def test_brackets_in_a_name_are_no_markup():
  metrics = {'q/net[red]/w[4]/accuracy': 1.0}
  text = printed(report.results_table(metrics))
  assert 'net[red]' in text
  assert 'w[4]' in text


def wide():
  names = [c.name for c in tables.COLUMNS]
  names += [c.spread for c in tables.COLUMNS if c.spread]
  variants = 'a_variant_of_some_length', 'b'
  return {f'q/model/{v}/{n}': 0.123 for v in variants for n in names}


def test_a_pipe_gets_one_table_whole(capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '40')
  report.show(wide())
  lines = [x for x in capsys.readouterr().out.splitlines() if x.strip()]
  assert len(lines) == 4  # head, rule, two variants
  assert '…' not in lines[2]
  assert all(c.header in lines[0] for c in tables.COLUMNS)


@pytest.mark.parametrize('width', [60, 80, 120, 160])
def test_a_terminal_gets_tables_that_fit(width):
  found = report.results_tables(wide(), width)
  assert len(found) > 1
  text = ''.join(printed(t, width) for t in found)
  assert '…' not in text
  assert max(map(len, text.splitlines())) <= width
  headers = [str(c.header) for t in found for c in t.columns[2:]]
  assert headers == [c.header for c in tables.COLUMNS]
  assert all(len(t.columns) > 2 for t in found)


def test_nothing_measured(capsys):
  assert len(report.results_tables({}, 80)) == 1
  report.show({})
  assert capsys.readouterr().out


@pytest.mark.parametrize(
  ('value', 'expected'),
  [(1, 1.0), ('inf', math.inf), ('text', None), (None, None), (True, None)],
)
def test_number(value, expected):
  assert tables.number(value) == expected


@pytest.mark.parametrize(
  ('value', 'text'),
  [(0, '0 B'), (999, '999 B'), (1500, '1.5 kB'), (2.5e9, '2.5 GB')]
  + [(4e15, '4000.0 TB')],
)
def test_bytes_read_as_people_write_them(value, text):
  assert tables.nbytes(value) == text


@given(
  hnp.arrays(
    np.float32,
    hnp.array_shapes(max_dims=2, max_side=20),
    elements=st.floats(width=32),
  )
)
def test_a_histogram_counts_what_is_finite(x):
  found = report.histogram(x, bins=7)
  assert len(found['edges']) == len(found['counts']) + 1
  assert sum(found['counts']) == np.isfinite(x).sum()
  assert all(math.isfinite(e) for e in found['edges'])
  assert found['edges'] == sorted(found['edges'])


@pytest.mark.parametrize('value', [0.0, -3.0, 2097152.0, 3e38])
def test_equal_values_fall_into_one_bin_around_them(value):
  found = report.histogram(np.full(5, value, np.float32))
  assert found['counts'] == [5]
  low, high = found['edges']
  assert low < value < high


def test_a_histogram_is_that_of_the_values():
  found = report.histogram(np.asarray([0.0, 0.0, 1.0, np.nan, np.inf]), bins=2)
  assert found == {'edges': [0.0, 0.5, 1.0], 'counts': [2, 1]}


def test_sites_by_variant_and_by_coverage():
  rows = [
    {'site': 'a', 'weight': 'int8()'},
    {'site': 'b', 'weight': None, 'input': None},
    {'site': 'c', 'weight': None, 'input': 'int8()'},
  ]
  found = report.by_variant({'net/w8': rows, 'net/w4': rows[:1]})
  assert list(found['net']) == ['w8', 'w4']
  assert [r['site'] for r in sites.quantized(rows)] == ['a', 'c']
  assert [r['site'] for r in sites.unquantized(rows)] == ['b']
