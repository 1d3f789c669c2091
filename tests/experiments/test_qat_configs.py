"""The configs of training: they resolve, and plan from shapes."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from experiments import optimizers, qat, tasks, training, variants
from quantlab import data

_CONFIGS = pathlib.Path(__file__).parents[2] / 'configs' / 'qat'
_NAMES = sorted(p.stem for p in _CONFIGS.glob('*.py'))
_MORE = [
  'bitnet_vision:vit',
  'bitnet_vision:rates',
  'bitnet_lm:large',
  'digits:states',
  'qlora:codes',
]


def stored(spec):
  name, _, arg = spec.partition(':')
  found = importlib.util.spec_from_file_location(
    f'config_{name}', _CONFIGS / f'{name}.py'
  )
  module = importlib.util.module_from_spec(found)
  found.loader.exec_module(module)
  return module.get_config(arg) if arg else module.get_config()


@pytest.mark.parametrize('spec', [*_NAMES, *_MORE])
def test_a_config_resolves(spec):
  config = stored(spec)
  found = qat.check(config)
  assert found[0].name == 'float'
  assert len(found) > 1
  assert json.loads(config.to_json()).keys() == set(config.keys())


@pytest.mark.parametrize('spec', ['bitnet_lm', 'bitnet_vision:vit'])
def test_ternary_in_blocks_and_float_outside(spec, monkeypatch):
  monkeypatch.setenv('QUANTLAB_DATA', '')  # the embedded text then
  config = stored(spec)
  task = tasks.make(config.task, config.model.to_dict())
  found = {v.name: v for v in qat.check(config)}
  variant = found['mean' if 'vision' in spec else 'bitnet_mean']
  plan = qat._planned(config, task, variant).plan
  blocks = config.model.blocks
  assert len(plan.quantized) == 7 * blocks
  for name, site in plan.quantized.items():
    assert name.startswith('blocks/')
    assert site.rule.weight.format.name == 'ternary'
    assert site.rule.input.format.bits == 8
  wide = found['mean_wide' if 'vision' in spec else 'bitnet_wide']
  assert wide.model['dim'] == 2 * config.model.dim


@pytest.mark.shared
@pytest.mark.parametrize(('spec', 'count'), [('mnist', 3), ('resnet20', 20)])
def test_pretrained_ones_plan(spec, count):
  if data.shared_dir() is None:
    pytest.skip('no folder of real models and data (QUANTLAB_DATA)')
  config = stored(spec)
  task = tasks.make(config.task, config.model.to_dict())
  for variant in qat.check(config)[1:]:
    made = qat._planned(config, task, variant)
    assert len(made.plan.quantized) == count
    if variant.batch_norm:
      assert not made.plan.folded


def test_moments_in_8_bits_take_a_quarter_of_the_bytes():
  config = stored('digits:states')
  task = tasks.make(config.task, config.model.to_dict())
  weights = jax.eval_shape(task.init, jax.random.key(0))
  size = [
    training.optimizer_nbytes(
      qat._planned(config, task, v), {'weights': weights, 'sites': {}}
    )
    for v in qat.check(config)
  ]
  assert size[1] <= 0.27 * size[0]


# Schedules --------------------------------------------------------------------


def test_rates_and_what_they_move():
  rate = optimizers.rates('two_stage', 1.0, 100, 0.6, 0.1)
  found = np.array([rate(s) for s in (0, 9, 49, 50, 99)])
  np.testing.assert_allclose(found, [0.1, 0.91, 0.51, 0.3, 0.006], rtol=1e-5)
  cosine = optimizers.rates('cosine', 2.0, 100, 0.6, 0.0)
  assert float(cosine(0)) == 2
  np.testing.assert_allclose(cosine(50), 1, rtol=1e-6)


def test_ranges_stay_where_they_are_frozen_and_state_never_moves():
  spec = {
    'name': 'sgd',
    'learning_rate': 1.0,
    'step_learning_rate': 0.5,
    'freeze_ranges': 0.5,
  }
  labels = {'w': 'weight', 's': 'step', 'n': 'state'}
  optimizer = optimizers.make(spec, 4, labels)
  values = {k: np.float32(0) for k in labels}
  state, ones = optimizer.init(values), {k: np.float32(1) for k in labels}
  seen = []
  for _ in range(4):
    moved, state = optimizer.update(ones, state, values)
    seen.append({k: float(v) for k, v in moved.items()})
  assert [m['w'] for m in seen] == [-1] * 4
  assert [m['s'] for m in seen] == [-0.5, -0.5, 0, 0]
  assert [m['n'] for m in seen] == [0] * 4


def test_weight_decay_ends_in_the_middle_and_leaves_vectors_alone():
  spec = {
    'name': 'sgd',
    'learning_rate': 1.0,
    'schedule': 'two_stage',
    'weight_decay': 0.1,
  }
  values = {'w': np.ones((1, 1), np.float32), 'b': np.ones(1, np.float32)}
  labels = {'w': 'weight', 'b': 'weight'}
  optimizer = optimizers.make(spec, 4, labels)
  state = optimizer.init(values)
  zeros = {k: 0 * v for k, v in values.items()}
  seen = []
  for _ in range(4):
    moved, state = optimizer.update(zeros, state, values)
    seen.append((float(moved['w'][0, 0]), float(moved['b'][0])))
  np.testing.assert_allclose(
    seen, [(-0.1, 0), (-0.075, 0), (0, 0), (0, 0)], atol=1e-7
  )


def test_decay_without_an_optimizer_that_decays():
  with pytest.raises(variants.ConfigError, match='name adamw'):
    optimizers.make(
      {'name': 'adam', 'learning_rate': 1.0, 'weight_decay': 0.1}, 1, 'weight'
    )
  with pytest.raises(variants.ConfigError, match='expected 8 or 32'):
    optimizers.make(
      {'name': 'adam', 'learning_rate': 1.0, 'state_bits': 4}, 1, 'weight'
    )
