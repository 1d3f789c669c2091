"""The configs that are here: they resolve, and plan from shapes."""

import importlib.util
import json
import pathlib

import pytest

import quantlab as ql
from experiments import variants
from quantlab import data, models

_CONFIGS = pathlib.Path(__file__).parents[2] / 'configs' / 'ptq'
_NAMES = sorted(p.stem for p in _CONFIGS.glob('*.py'))


def stored(name):
  path = _CONFIGS / f'{name}.py'
  spec = importlib.util.spec_from_file_location(f'config_{name}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


@pytest.mark.parametrize('name', _NAMES)
def test_a_config_resolves(name):
  config = stored(name)
  assert variants.resolve(config.variants)
  assert set(config.models) <= set(models.WORKLOADS)
  # Nothing is lost on the way to config.json, by which a folder is known.
  assert json.loads(config.to_json()).keys() == set(config.keys())


@pytest.mark.shared
@pytest.mark.parametrize('name', [n for n in _NAMES if n != 'digits'])
def test_a_config_plans_from_shapes(name):
  if data.shared_dir() is None:
    pytest.skip('no folder of real models and data (QUANTLAB_DATA)')
  config = stored(name)
  for model_name in config.models:
    work = models.workload(model_name, shapes_only=True)
    for variant in variants.resolve(config.variants):
      plan = ql.plan(work.apply, work.params, variant.recipe, *work.example)
      assert plan.quantized
      assert plan.totals()['bits_per_weight'] < 16
