"""The page of a run: whole, closed, and honest about what it lacks."""

import html.parser
import math

import numpy as np
import pytest

from quantlab import report
from quantlab.report import plots

_EVIL = '<b>&"\'$x$'
_VOID = {'meta', 'img', 'br', 'hr'}


class _Reader(html.parser.HTMLParser):
  """Tags that are open, every attribute, and the text."""

  def __init__(self):
    super().__init__()
    self.open, self.attributes, self.text, self.tags = [], [], [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += [(tag, *a) for a in attrs]
    if tag not in _VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


def read(page):
  reader = _Reader()
  reader.feed(page)
  reader.close()
  assert not reader.open
  return reader


def row(site='params/a/kernel', **changes):
  values = np.random.RandomState(0).normal(size=200)
  return {
    'site': site,
    'kind': 'dot',
    'weight': 'int4()',
    'input': None,
    'bits': 4.5,
    'nbytes': 100,
    'float_nbytes': 800,
    'sqnr': 20.0,
    'histograms': {
      'weight': report.histogram(values),
      'weight_coded': report.histogram(np.round(values)),
    },
    **changes,
  }


METRICS = {
  'fp/net/accuracy': 0.98,
  'fp/net/nbytes': 800,
  'q/net/w4/accuracy': 0.97,
  'q/net/w4/nbytes': 100,
  'q/net/w4/seconds': 3.0,
}


def test_the_page_loads_nothing_and_is_closed():
  page = report.render(METRICS, {'net': {'w4': [row()]}}, {'seed': 0})
  reader = read(page)
  assert {'script', 'link', 'iframe', 'object'}.isdisjoint(reader.tags)
  assert '://' not in page
  assert 'url(' not in page
  sources = [v for _, name, v in reader.attributes if name in ('src', 'href')]
  assert len(sources) == 4
  assert all(s.startswith('data:image/png;base64,') for s in sources)


def test_the_same_input_gives_the_same_page():
  given = METRICS, {'net': {'w4': [row()]}}, {'seed': 0}
  assert report.render(*given) == report.render(*given)


def test_names_are_shown_and_never_obeyed():
  metrics = {k.replace('net', _EVIL): v for k, v in METRICS.items()}
  metrics = {k.replace('w4', f'{_EVIL}4'): v for k, v in metrics.items()}
  sites = [
    row(site=_EVIL, kind=_EVIL, weight=_EVIL, input=_EVIL),
    row(site=f'{_EVIL}2', weight=None, why_float=_EVIL),
  ]
  page = report.render(
    metrics,
    {_EVIL: {f'{_EVIL}4': sites}},
    {_EVIL: {_EVIL: _EVIL}},
    title=_EVIL,
  )
  assert '<b>&' not in page
  text = ''.join(read(page).text)
  assert text.count(f'{_EVIL}4') == 2  # in the table and over its sites
  assert f'{_EVIL}2 dot: {_EVIL}' in text
  assert f'{_EVIL}.{_EVIL}{_EVIL}' in text


@pytest.mark.parametrize('spell', [float, str])  # JSON keeps them as strings
def test_what_is_not_finite_is_shown_and_not_drawn(spell):
  metrics = METRICS | {
    'q/net/w4/accuracy': spell('nan'),
    'q/net/w4/kl_mean': spell('inf'),
    'q/net/w4/sqnr_db': spell('inf'),
  }
  rows = [row(sqnr=spell('inf')), row('b', sqnr=spell('nan'))]
  text = ''.join(read(report.render(metrics, {'net': {'w4': rows}}, {})).text)
  assert 'nan %' in text
  assert 'inf dB' in text


def test_a_model_without_variants_and_a_run_without_models():
  text = ''.join(read(report.render({'fp/net/accuracy': 0.5}, {}, {})).text)
  assert '1 model, 0 variants' in text
  assert '50.00 %' in text
  text = ''.join(read(report.render({}, {}, {})).text)
  assert '0 models, 0 variants' in text


def test_sites_without_sizes_or_histograms():
  bare = {'site': 'site:scores', 'kind': 'dot', 'weight': 'int8()'}
  page = report.render(METRICS, {'net': {'w4': [bare]}}, {})
  assert 'site:scores' in page
  nothing = report.render(METRICS, {'net': {'w4': []}}, {})
  assert '0 of 0 sites quantized' in nothing


WALK = {
  'transform': ['smooth', 'gptq', 'norm_tweak'],
  'prepared': ['smooth'],
  'blocks': [
    {'block': 'params/a', 'relative_error': 1e-3, 'tuned': {'bias': {}}},
    {
      'block': 'params/b',
      'relative_error': 0.0,
      'tuned': {'norm_tweak': {'loss': [0.2, 0.1]}},
    },
  ],
}


def test_blocks_losses_and_preparation_are_drawn_where_there_are_any():
  found = report.histogram(np.arange(9.0))
  seen = row(before={'input': found}, after={'input': found})
  walks = {'net': {'w4': WALK}}
  page = report.render(METRICS, {'net': {'w4': [seen]}}, {}, walks_of=walks)
  assert page.count('<img') == 7
  assert 'there are no errors by block' not in page
  assert 'after smooth (line)' in page
  walks = {'net': {'w4': WALK | {'prepared': [], 'blocks': []}}}
  seen = row(before={'input': found})
  page = report.render(METRICS, {'net': {'w4': [seen]}}, {}, walks_of=walks)
  assert page.count('<img') == 5
  assert 'there are no errors by block' in page
  assert 'no transform changed them before encoding' in page


def test_a_block_without_error_has_no_bar():
  ax = plots.figure(2, 2).subplots()
  plots.block_bars(ax, list('abc'), [1e-3, 0.0, math.nan])
  [bar] = ax.patches
  assert bar.get_x() + bar.get_width() == pytest.approx(1e-3)
  ax = plots.figure(2, 2).subplots()
  plots.block_bars(ax, ['a'], [0.0])
  assert not ax.patches


def test_a_bad_site_has_a_cause_and_a_good_one_is_not_listed():
  seen = {'weight_sqnr': 9.0, 'weight_per': 'channel', 'tail': 7.0}
  rows = [row(sqnr=9.0, statistics=seen), row('b', sqnr=40.0)]
  page = report.render(METRICS, {'net': {'w4': rows}}, {})
  bad = page.split('<h3>Bad sites</h3>')[1].split('<h3>')[0]
  assert 'Heavy tails' in bad
  assert 'scale=mse()' in bad
  assert '9.0 dB' in bad
  assert '40.0 dB' not in bad
  rows = [row(sqnr=30.0), row('b', sqnr=40.0)]
  page = report.render(METRICS, {'net': {'w4': rows}}, {})
  assert 'None: no site is more than 10 dB under the median' in page


def test_coded_values_alone_are_not_shown_as_float():
  folded = row()
  del folded['histograms']['weight']
  fig = plots.figure(2, 2)
  ax = plots.histogram(
    fig.subplots(), None, folded['histograms']['weight_coded']
  )
  assert [p.get_label() for p in ax.patches] == ['coded']
  page = report.render(METRICS, {'net': {'w4': [folded]}}, {})
  assert page.count('<img') == 4


def test_many_sites_are_all_in_the_table_and_the_picture_says_its_share():
  rows = [row(f'params/layer_{i}/kernel', histograms={}) for i in range(75)]
  page = report.render(METRICS, {'net': {'w4': rows}}, {})
  assert page.count('<td class="name"><code>params/layer_') == 75
  assert page.count('15 more are in the table.') >= 2


def test_the_best_variant_of_a_column_is_marked_float_is_not():
  metrics = METRICS | {'q/net/w2/accuracy': 0.5, 'q/net/w2/nbytes': 50}
  page = report.render(metrics, {}, {})
  assert page.count('class="best"') == 2
  assert '<td class="best">97.00 %</td>' in page
  assert '<td class="best">50 B</td>' in page


def test_a_variant_that_is_not_a_number_is_not_the_best():
  metrics = METRICS | {'q/net/w2/accuracy': math.nan}
  page = report.render(metrics, {}, {})
  assert '<td class="best">97.00 %</td>' in page
  metrics = {'q/net/w2/accuracy': math.nan} | METRICS
  assert '<td class="best">97.00 %</td>' in report.render(metrics, {}, {})


def test_sessions_of_a_resumed_run_are_terms_of_their_own():
  manifest = {'seed': 0, 'resumed_by': [{'git': 'abc'}, {'git': 'def'}]}
  page = report.render({}, {}, manifest)
  assert '<dt>resumed_by.1.git</dt><dd>abc</dd>' in page
  assert '<dt>resumed_by.2.git</dt><dd>def</dd>' in page
  assert 'resumed_by' not in report.render({}, {}, {'resumed_by': []})


def test_figures_fill_their_width_whatever_the_names():
  for names in (['a'], ['params/' + 40 * 'x'], ['…' * 38]):
    left = plots.label_width(names)
    fig, axes = plots.grid(9.6, 1.2, (1, 3), left=left, below=0.5, above=0.1)
    plots.sqnr_bars(axes[0, 0], names, [3.0])
    fig.canvas.draw()
    label = axes[0, 0].get_yticklabels()[0].get_window_extent()
    assert label.x0 >= 0
    right = axes[0, 2].get_position().x1
    assert 0.95 < right < 1
