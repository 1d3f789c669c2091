"""Refinement and bisection by their launchers, on a small model."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip('optuna')

import quantlab as ql
from configs.search import bisection, digits
from experiments import bisected, refine, search, spaces, variants
from quantlab import search as searches
from quantlab.models import digits as networks
from quantlab.search import Table, predict

EPOCHS = 3


@pytest.fixture(scope='module', autouse=True)
def _trained_once():
  """Every launcher trains the model anew: here once, and not for long."""
  train = networks.train_digits

  @functools.cache
  def once(model, seed):
    return train(model, seed, epochs=EPOCHS)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(networks, 'train_digits', once)
    yield


def small(config=None):
  config = digits.get_config() if config is None else config
  config.evaluation = 250
  config.batches = 1
  config.choices = (
    ('/kernel$', tuple({'weight': {'format': f'int{b}'}} for b in (2, 4, 8))),
  )
  config.metrics = ('kl', 'hessian')
  config.interactions = ('hessian',)
  config.around = ()
  config.kinds = (('all', 0),)
  config.budgets = ('int4',)
  config.allocations = (('kl', 'dp'),)
  config.measured = ()
  config.encoders = ('rtn',)
  return config


def bisecting():
  config = small(bisection.get_config())
  config.bisected = (('hessian', 0.02), ('kl', 0.5))
  return config


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  """A search by bisection, and one that is refined twice."""
  at = tmp_path_factory.mktemp('refined')
  metrics = search.run(bisecting(), at / 'bisected')
  search.run(small(), at / 'search')
  first = refine.run(small(), at / 'search', at / 'journal', 8, 'random')
  return at, metrics, first


def read(path):
  return json.loads(path.read_text())


# Bisection --------------------------------------------------------------------


def test_bisection_keeps_the_quality_that_was_asked_for(found):
  at, metrics, _ = found
  config = bisecting()
  work = spaces.workload(config)
  kept = read(at / 'bisected' / 'bisection.json')
  plans = read(at / 'bisected' / 'plan.json')
  tables = read(at / 'bisected' / 'tables.json')
  measure = bisected.measure(config, work)
  for name, lost in config.bisected:
    key = f'{lost:g} lost/{name}-bisected'
    one = kept[key]
    assert one['quality'] >= one['target'] == 1 - lost
    # As accuracy over that of the float model, measured here again.
    assert measure(one['choice']) == one['quality']
    head = f'bisection/{key}'
    assert metrics[f'{head}/measurements'] == len(one['measured'])
    assert metrics[f'{head}/violations'] == one['violations']
    # At most: all dear, two levels, each log2 of four rows, rounded up, and a
    # look beyond.
    assert len(one['measured']) <= 1 + 2 * (3 + 1)
    table = Table.from_json(tables[name])
    dear = [len(r.options) - 1 for r in table.rows]
    assert table.cost(one['choice']) < table.cost(dear)
    assert metrics[f'q/{key}/rtn/0/nbytes'] == table.cost(one['choice'])
    plan = ql.Plan.from_json(plans[key])
    assert plan.quantized
  # More may be lost, and less is left.
  sizes = [
    metrics[f'q/{lost:g} lost/{name}-bisected/rtn/0/nbytes']
    for name, lost in config.bisected
  ]
  assert sizes[1] < sizes[0]
  page = (at / 'bisected' / 'report.html').read_text()
  assert '<h2>Bisection</h2>' in page
  assert '0.02 lost/hessian-bisected' in page


def test_a_bisection_resumes_without_a_measurement(found, monkeypatch):
  at, metrics, _ = found

  def never(*args):
    raise AssertionError('measured again')

  monkeypatch.setattr(bisected, 'measure', never)
  assert search.run(bisecting(), at / 'bisected') == metrics


def test_a_quality_out_of_reach_is_said(tmp_path):
  """Of two bits, the dearest option here."""
  config = small(bisection.get_config())
  coarse = {'format': 'int2'}
  ranged = {'format': 'int2', 'scale': {'rule': 'mse'}}
  config.choices = (('/kernel$', ({'weight': coarse}, {'weight': ranged})),)
  config.metrics, config.interactions = ('kl',), ()
  config.budgets, config.allocations = ('int2',), ()
  config.bisected = (('kl', 0.0),)
  match = r"bisected=\('kl', 0.0\): the target 1 is out of reach.*Permit a"
  with pytest.raises(variants.ConfigError, match=match):
    search.run(config, tmp_path / 'run')


# Refinement -------------------------------------------------------------------


def test_a_refinement_leaves_its_results(found):
  at, _, rows = found
  kept = read(at / 'search' / 'refined' / 'refined.json')
  assert kept['sampler'] == 'random'
  assert kept['counts']['finished'] == len(kept['history']) == 8
  assert len(kept['seconds']) == 8
  assert min(kept['seconds']) > 0
  front = kept['front']
  assert [{k: p[k] for k in ('loss', 'bytes')} for p in front] == [
    {k: r[k] for k in ('loss', 'bytes')} for r in rows
  ]
  measured = {tuple(h['choice']): tuple(h['values']) for h in kept['history']}
  for point in front:
    choice = tuple(
      kept['rows'][row].index(label) for row, label in point['options'].items()
    )
    assert measured[choice] == (point['loss'], point['bytes'])
    assert not any(
      loss <= point['loss'] and size < point['bytes']
      for loss, size in measured.values()
    )


def test_a_refinement_begins_at_the_allocations(found):
  """So that within a budget it is never worse than the table."""
  at = found[0]
  table = _table(at).floored()
  limit = table.cost(table.uniform('int4'))
  chosen = ql.allocate(table, limit).choice
  begun = refine.starts(small(), table)
  assert chosen == begun[0]
  assert len(set(begun)) == len(begun)
  cheap, dear = ((k,) * len(table.rows) for k in (0, 2))
  assert cheap in begun
  assert table.predict(begun[-1]) == min(table.predict(c) for c in begun)
  assert table.predict(begun[-1]) <= table.predict(dear)
  kept = read(at / 'search' / 'refined' / 'refined.json')
  within = [
    (h['values'][0], tuple(h['choice']))
    for h in kept['history']
    if h['values'][1] <= limit
  ]
  assert chosen in [c for _, c in within]
  assert (
    min(p['loss'] for p in kept['front'] if p['bytes'] <= limit)
    == (min(within)[0])
  )


def test_a_refinement_learns_from_another(found, monkeypatch):
  """Its predictors are corrections of those of the first one."""
  at, _, _ = found
  seen = []
  real = searches.Study.run

  def run(self, *args):
    seen.append(self.study.sampler.inner.sources)
    return real(self, *args)

  monkeypatch.setattr(searches.Study, 'run', run)
  config = small()
  folder = at / 'search'
  refine.run(config, folder, at / 'second', 7, source=at / 'journal')
  refine.run(config, folder, at / 'third', 7)
  [(learned, source)], none = seen[0].items(), seen[1]
  assert learned == 0  # the loss; bytes are known
  assert none == {}
  kept = read(folder / 'refined' / 'refined.json')
  assert 'source' not in kept
  trials = searches.trials_of(at / 'journal', _table(at), 2)
  best, worst = min(trials, key=_loss), max(trials, key=_loss)
  x = predict.one_hot(np.array([best[0], worst[0]]), [3] * 4)
  better, worse = source.predict(x)
  assert better < worse


def test_a_refinement_keeps_to_what_it_was_judged_on(
  found, tmp_path, monkeypatch
):
  """Also from itself it learns nothing; before a model is loaded."""
  at, _, _ = found
  folder = at / 'search'
  kept = (at / 'journal').read_bytes()
  monkeypatch.setattr(spaces, 'workload', None)
  (tmp_path / 'link').symlink_to(at / 'journal')
  for source in (at / 'journal', tmp_path / 'link'):
    with pytest.raises(ValueError, match='is the storage of this study itself'):
      refine.run(small(), folder, at / 'journal', 9, source=str(source))
  other = small()
  other.judged = 2
  (tmp_path / 'run').mkdir()
  for name in ('tables.json', 'config.json'):
    text = (folder / name).read_text()
    (tmp_path / 'run' / name).write_text(text)
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(other.to_dict()))
  with pytest.raises(ValueError, match='else: judged: 0 there, 2 here'):
    refine.run(other, tmp_path / 'run', at / 'journal', 9)
  assert (at / 'journal').read_bytes() == kept


def test_a_refinement_of_failures_has_no_front(found, tmp_path, monkeypatch):
  at = found[0]
  config, folder = small(), at / 'search'
  failed = {'loss': [(float('nan'), float('nan'))]}
  monkeypatch.setattr(searches.Measure, '__call__', lambda *a: failed)
  assert refine.run(config, folder, tmp_path / 'journal', 2, 'random') == []
  kept = read(folder / 'refined' / 'refined.json')
  assert kept['counts']['failed'] == 2
  assert kept['front'] == []
  assert '<h2>Progress</h2>' in (folder / 'refined/report.html').read_text()


def _loss(trial):
  return trial[1][0]


def _table(at):
  return Table.from_json(read(at / 'search' / 'tables.json')['kl'])


COPY = """
import functools, sys, time
from absl import app
from experiments import command_line, refine
from quantlab import search
from quantlab.models import digits
epochs = int(sys.argv.pop(1))
digits.train_digits = functools.partial(digits.train_digits, epochs=epochs)
def measure(self, choices):
  print('measuring', flush=True)
  time.sleep(600)
search.Measure.__call__ = measure
refine.define_flags()
app.run(refine.main, flags_parser=command_line.parse)
"""


def test_a_killed_copy_of_the_command_loses_nothing(
  found, tmp_path, monkeypatch
):
  """Two copies on one journal; one gets SIGKILL within a trial."""
  at = found[0]
  file, journal = tmp_path / 'config.py', tmp_path / 'journal'
  file.write_text(
    'import ml_collections\n'
    f'get_config = lambda: ml_collections.ConfigDict({small().to_dict()!r})\n'
  )
  words = [f'--config={file}', f'--workdir={at}/search', '--trials=8']
  copy = subprocess.Popen(
    [sys.executable, '-c', COPY, str(EPOCHS), *words, f'--storage={journal}'],
    stdout=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(refine.__file__).parents[1],
    env={**os.environ, 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'},
  )
  try:
    assert copy.stdout.readline() == 'measuring\n'
    real, alive = searches.Measure.__call__, []

    def measure(self, choices):
      alive.append(copy.poll() is None)
      if len(alive) == 3:
        os.kill(copy.pid, signal.SIGKILL)
        copy.wait()
      return real(self, choices)

    monkeypatch.setattr(searches.Measure, '__call__', measure)
    refine.run(small(), at / 'search', journal, 8, 'random')
  finally:
    copy.kill()
    copy.wait()
  assert alive[:4] == [True, True, True, False]
  kept = read(at / 'search' / 'refined' / 'refined.json')
  assert kept['counts'] == {
    'complete': 8,
    'failed': 0,
    'finished': 8,
    'killed': 1,
    'running': 0,
    'waiting': kept['counts']['waiting'],  # starts that were not wanted
  }
  made = searches.Study(
    _table(at), journal, ('loss', 'bytes'), about=refine.about(small())
  )
  trials = made.study.get_trials()
  [lost] = [t for t in trials if t.user_attrs.get('killed')]
  [again] = [t for t in trials if t.user_attrs.get('retry_of') == lost.number]
  assert again.params == lost.params
  assert again.state.name == 'COMPLETE'
