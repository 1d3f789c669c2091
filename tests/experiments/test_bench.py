"""The benchmark launcher: what its JSON holds. Nothing is said of times."""

import builtins
import functools
import importlib.util
import json
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantlab as ql
from experiments import bench, variants
from experiments.benchmarks import crossover, latency, timing, trace
from quantlab import search
from quantlab.models import resnet_cifar, transformer

_ROOT = pathlib.Path(__file__).parents[2]


def _config(name):
  path = _ROOT / 'configs' / 'bench' / f'{name}.py'
  spec = importlib.util.spec_from_file_location(f'config_{name}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def _tiny():
  config = _config('trace')
  config.model = {
    'blocks': 1,
    'dim': 16,
    'heads': 2,
    'vocab': 16,
    'length': 4,
    'batch': 2,
  }
  config.images, config.batches = 2, 1
  config.rounds = {'trace': 1, 'compile': 1, 'calibration': 1}
  return config


@pytest.fixture(scope='module')
def without_peer(tmp_path_factory):
  """A run where qwix cannot be imported, installed or not."""
  real = builtins.__import__

  def guarded(name, *args, **kwargs):
    if name.partition('.')[0] == 'qwix':
      raise ImportError('No module named qwix')
    return real(name, *args, **kwargs)

  folder = tmp_path_factory.mktemp('bench')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(builtins, '__import__', guarded)
    small = functools.partial(resnet_cifar.init, blocks=1, widths=(4, 8, 16))
    patch.setattr(resnet_cifar, 'init', small)
    result = bench.run(_tiny(), str(folder))
  return result, folder


def _check_case(case):
  names = set(case['seconds'])
  assert case['baseline'] in names
  assert set(case['ratios']) == names - {case['baseline']}
  assert set(case['limits']) == set(case['met']) <= set(case['ratios'])
  for clocks in case['ratios'].values():
    assert set(clocks) == {'wall', 'cpu'}
    assert all(math.isfinite(v) and v > 0 for v in clocks['wall'].values())
  for clocks in case['seconds'].values():
    for stages in clocks.values():
      for found in stages.values():
        order = [found[k] for k in ('min', 'q1', 'median', 'q3', 'max')]
        assert order == sorted(order)
        assert order[0] >= 0


def test_json_holds_cases_ratios_and_where_it_ran(without_peer):
  result, folder = without_peer
  found = json.loads((folder / 'bench.json').read_text())
  assert found['benchmark'] == 'trace'
  assert found['config']['model']['blocks'] == 1
  assert found['versions']['jax']
  assert found['device']['platform']
  assert set(found['load']) == {'before', 'after'}
  assert set(found['cases']) == {
    'trace/bare/cold',
    'trace/bare/warm',
    'trace/linen/cold',
    'trace/linen/warm',
    'compile/linen',
    'calibrate/bare',
    'calibrate/linen',
    'calibrate/resnet20',
  }
  for case in found['cases'].values():
    _check_case(case)
  metrics = json.loads((folder / 'metrics.json').read_text())
  ratio = found['cases']['trace/bare/cold']['ratios']['identity']
  key = 'trace/trace/bare/cold/identity/wall'
  assert metrics[key] == ratio['wall']['median']
  assert bench.table(result).row_count == sum(
    len(case['seconds']) for case in found['cases'].values()
  )


def test_the_picture_has_every_ratio(without_peer):
  result, folder = without_peer
  assert (folder / 'speed.png').read_bytes().startswith(b'\x89PNG')
  (axes,) = bench.picture(result).axes
  cases = {k: c for k, c in result['cases'].items() if c['ratios']}
  labels = [label.get_text() for label in axes.get_yticklabels()]
  assert labels == [f'{k}\nbeside {c["baseline"]}' for k, c in cases.items()]
  # A line of quartiles and a point for each.
  points = [line for line in axes.lines if line.get_marker() == 'o']
  assert [p.get_xdata()[0] for p in points] == [
    1 / clocks['wall']['median']
    for case in cases.values()
    for clocks in case['ratios'].values()
  ]


def test_an_absent_peer_is_said_to_be_absent(without_peer):
  found = without_peer[0]
  peer = found['peers']['qwix']
  assert peer['used'] is False
  assert 'not compared' in peer['why']
  case = found['cases']['compile/linen']
  assert set(case['seconds']) == {'float', 'quantlab'}
  assert case['baseline'] == 'float'
  assert case['limits'] == {}


def test_w8a8_runs_on_integer_products(without_peer):
  products = without_peer[0]['cases']['compile/linen']['integer_products']
  # Six matrices in the one block, and the output matrix.
  assert products == {'float': 0, 'quantlab': 7}


def test_a_peer_computes_the_same_products():
  pytest.importorskip('qwix')
  config = _tiny()
  model = transformer.Transformer(16, 16, 2, blocks=1, context=4)
  tokens = jnp.zeros((2, 4), jnp.int32)
  params = jax.jit(model.init)(jax.random.key(0), tokens)
  cases, peers = trace.compiling(model, params, tokens, config)
  case, peer = cases['compile/linen'], peers['qwix']
  assert (peer['used'], peer['fair']) == (True, True)
  assert peer['version']
  assert case['baseline'] == 'qwix'
  assert case['integer_products'] == {'float': 0, 'quantlab': 7, 'qwix': 7}
  assert set(case['limits']) == {'quantlab'}
  _check_case(case)


def test_unknown_benchmark_names_the_known_ones(tmp_path):
  config = _tiny()
  config.benchmark = 'tracing'
  with pytest.raises(ValueError, match=r"unknown benchmark 'tracing'.*trace"):
    bench.run(config, str(tmp_path / 'never'))
  assert not (tmp_path / 'never').exists()


def test_every_contestant_is_measured_every_round_and_order_rotates():
  order = []

  def contestant(name):
    return {
      'first': lambda _: order.append(name) or name,
      'second': lambda value: order.append(value.upper()),
    }

  cleared = []
  samples = timing.interleaved(
    {name: contestant(name) for name in 'abc'}, 3, lambda: cleared.append(1)
  )
  assert len(cleared) == 12  # a round that is not counted, and three
  calls = ''.join(order[6:])
  assert sorted(calls[:6]) == sorted(calls[6:12]) == sorted('aAbBcC')
  assert len({calls[0], calls[6], calls[12]}) == 3
  for clocks in samples.values():
    for stages in clocks.values():
      assert set(stages) == {'first', 'second', 'total'}
      assert all(len(v) == 3 for v in stages.values())
      np.testing.assert_allclose(
        np.add(stages['first'], stages['second']), stages['total'], atol=1e-9
      )


def test_ratios_are_of_the_same_round():
  def clocks(*seconds):
    return {c: {'total': list(seconds)} for c in timing.CLOCKS}

  # The machine is ten times slower in the last round, for both.
  samples = {'base': clocks(1.0, 2.0, 20.0), 'ours': clocks(2.0, 3.0, 30.0)}
  case = timing.case(samples, 'base', {'ours': 1.5})
  wall = case['ratios']['ours']['wall']
  assert (wall['min'], wall['median'], wall['max']) == (1.5, 1.5, 2.0)
  assert wall['of_minima'] == 2.0
  assert case['met'] == {'ours': True}
  strict = timing.case(samples, 'base', {'ours': 1.4})
  assert strict['met'] == {'ours': False}


def test_products_on_the_cpu(tmp_path):
  """Every contestant, its floors and limits; peers only where installed."""
  config = _config('matmul_cpu')
  [shape, *_] = config.shapes
  config.shapes = (shape | {'k': 128, 'n': 64, 'rows': (1, 3)},)
  config.rotate, config.rounds, config.peers = 2**15, 1, ()
  config.seconds = 1e-3
  result = bench.run(config, str(tmp_path))
  cases = result['cases']
  assert cases.keys() == {'128x64/1', '128x64/3', 'call'}
  one = cases['128x64/1']
  assert one['seconds'].keys() == set(shape['products'])
  limits = {'w8a8': 4.2, 'w4a8': 8, 'ternary': 16}
  limits |= {f'{name}_prepacked': limit for name, limit in limits.items()}
  assert one['limits'] == {k: 1 / v for k, v in limits.items()}
  assert not cases['128x64/3']['limits']
  for case in (one, cases['128x64/3']):
    assert all(v > 0 for v in case['of_bandwidth'].values())
    assert all(v > 0 for v in case['of_int8_peak'].values())
  assert result['floors']['bytes_per_second'] > 0
  assert cases['call']['seconds'].keys() == {'empty', 'int8'}


def test_convolutions_on_the_cpu(tmp_path):
  """Each shape and batch that fits; the preferred kernels have a limit."""
  config = _config('conv_cpu')
  config.shapes, config.batches = ('mobilenet025_dw7', 'mobilenet025_dw1'), (1,)
  config.most, config.rounds, config.implementations = 2**15, 1, ('xla',)
  cases = bench.run(config, str(tmp_path))['cases']
  assert cases.keys() == {'mobilenet025_dw7/1'}
  (case,) = cases.values()
  assert case['seconds'].keys() == {'float32', 'w8a8 xla'}
  assert case['limits'] == {'w8a8 xla': 1.0}


def test_sizes_from_which_on_a_product_is_as_fast():
  def case(ratio):
    return {'ratios': {'w8a8': {'wall': {'median': ratio}}}}

  cases = {
    '16x16/1': case(0.9),  # by chance: the next larger one is slower
    '32x32/1': case(1.2),
    '64x64/1': case(1.04),
    '16x16/4': case(0.5),
    'call': {},
  }
  found = crossover.table(cases)
  assert found == {'w8a8': {'1': 4096, '4': 0}}
  other = {'w8a8': {'1': 1024, '4': 256}}
  assert crossover.largest([found, other]) == {'w8a8': {'1': 4096, '4': 256}}
  with pytest.raises(ValueError, match='w8a8 at 1 rows is slower'):
    crossover.table(cases | {'64x64/1': case(1.1)})


def test_what_a_search_costs(tmp_path):
  config = _config('search')
  config.model = {'blocks': 1, 'widths': (4,)}
  config.images = {'table': 2, 'probes': 2, 'population': 2}
  config.widths, config.compiled, config.probes, config.plans = (2, 8), 1, 1, 2
  config.rounds = {'table': 1, 'probes': 1, 'population': 1}
  cases = bench.run(config, str(tmp_path))['cases']
  assert set(cases) == {'table', 'probes', 'population'}
  for case in cases.values():
    _check_case(case)
    assert case['limits']
  # One of six entries was run, and stands for all of them.
  assert 'of the loop 1 entries' in cases['table']['notes']
  assert cases['table']['notes'].startswith('8 entries')


def test_a_latency_table_is_of_every_product_of_a_search(monkeypatch, tmp_path):
  params = {k: jnp.ones((8, 8)) for k in 'ab'} | {'c': jnp.ones((8, 16))}

  def apply(p, x):
    x = jnp.tanh(jnp.tanh(x @ p['a']) @ p['b'])
    return (x @ x.T) @ x @ p['c']

  work = types.SimpleNamespace(
    apply=apply, params=params, example=(jnp.ones((3, 8)),)
  )
  monkeypatch.setattr(latency.spaces, 'workload', lambda config: work)
  config = _config('latency')
  both = {'input': {'format': 'int8', 'per': 'token'}}
  config.search.choices = (
    ('c', None),
    ('', tuple({'weight': {'format': f'int{b}'}, **both} for b in (4, 8))),
  )
  config.rounds, config.copies = 2, 2
  result = bench.run(config, str(tmp_path))
  assert set(result['cases']) == {'8x8/3', '8x16/3', '8x3/3', '3x8/3'}
  _check_case(result['cases']['8x8/3'])
  table = ql.cost.LatencyTable.from_json(result['latency'])
  # Two of the same geometry in two formats and float; three float ones, of
  # which those of activations take as many operations.
  assert len(table.seconds) == 3 + 3
  config.search.latency = str(tmp_path / 'bench.json')
  found = search.space(
    apply,
    params,
    latency.spaces.choices(config.search),
    *work.example,
    costs=latency.spaces.costs(config.search),
  )
  assert [len(c) for c in found.costs['latency']] == [2, 2]
  assert all((c > 0).all() for c in found.costs['latency'])
  assert found.fixed['latency'] > 0
  config.search.latency = str(tmp_path / 'metrics.json')
  with pytest.raises(variants.ConfigError, match='holds no measured latencies'):
    latency.spaces.costs(config.search)

  def convolution(p, x):
    return jax.lax.conv(x, p['k'], (1, 1), 'SAME')

  work.apply, work.params = convolution, {'k': jnp.ones((2, 2, 3, 3))}
  work.example = (jnp.ones((1, 2, 4, 4)),)
  config.search.choices = (('', ({'weight': {'format': 'int8'}}, None)),)
  with pytest.raises(variants.ConfigError, match='only products of a matrix'):
    bench.run(config, str(tmp_path / 'conv'))
