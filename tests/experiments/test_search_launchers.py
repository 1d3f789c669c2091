"""The launchers of sensitivity, search and refinement, on a small model."""

import dataclasses
import functools
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import quantlab as ql
from configs.search import (
  adaquant_ip,
  bisection,
  digits,
  hawq_v1,
  hawq_v2,
  hawq_v3,
  lrp_qvit,
  minilm,
  mixdq,
  quantune,
  resnet8,
  resnet20,
  stories,
  zeroq,
)
from experiments import (
  allocated,
  refine,
  search,
  search_configs,
  sensitivity,
  settings,
  spaces,
  tune,
  variants,
)
from quantlab import data, models, runtime
from quantlab.models import digits as networks
from quantlab.search import Measure, Table


@pytest.fixture(scope='module', autouse=True)
def _trained_once():
  """Every launcher trains the model anew: here once, and not for long."""
  train = networks.train_digits

  @functools.cache
  def once(model, seed):
    return train(model, seed, epochs=3)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(networks, 'train_digits', once)
    yield


METHODS = (adaquant_ip, bisection, hawq_v1, hawq_v2, lrp_qvit, mixdq, zeroq)


@pytest.mark.parametrize('method', METHODS, ids=lambda m: m.__name__)
def test_methods_of_papers_are_configs(method):
  """Of known fields, and they differ from the one that they are made of."""
  config = method.get_config()
  search_configs.check(config)
  assert config.metrics != digits.get_config().metrics
  for metric, _ in config.allocations:
    assert metric.split('.')[0] in config.metrics


def small():
  config = digits.get_config()
  config.evaluation = 250
  config.batches = 1
  config.choices = (
    ('head', {'weight': {'format': 'int8'}}),
    ('/kernel$', tuple({'weight': {'format': f'int{b}'}} for b in (2, 8))),
  )
  config.metrics = ('similarity', 'kl', 'hessian')
  config.random_plans = 5
  config.kinds = (('all', 0),)
  config.interactions = ('hessian',)
  config.budgets = ('int2', 'int8')
  config.around = ('kl',)
  config.allocations = (
    ('kl', 'dp'),
    ('kl@', 'dp'),
    ('hessian', 'quadratic'),
    ('lrp', 'dp'),
  )
  config.measured = ('kl',)
  config.encoders = ('rtn',)
  config.groups = (('conv_0', 'kl'), ('conv_[12]', 'hessian'))
  return config


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  folder = tmp_path_factory.mktemp('search')
  config = small()
  found = {
    'search': search.run(config, folder / 'search'),
    'refined': refine.run(config, folder / 'search', folder / 'journal', 9),
  }
  tables = (folder / 'search' / 'tables.json').read_text()
  return folder, config, found, tables


def test_plans_are_what_was_measured(folders):
  folder, config, found, tables = folders
  work = spaces.workload(config)
  plans = json.loads((folder / 'search' / 'plan.json').read_text())
  assert set(plans) == {
    f'{b}/{m}'
    for b in ('int2', 'int8')
    for m in (
      *('uniform', 'kl-dp', 'kl@-dp', 'hessian-quadratic', 'decoupled'),
      'kl-measured',
    )
  }
  plan = ql.Plan.from_json(plans['int8/kl-dp'])
  model = ql.ptq(work.apply, work.params, plan, work.calibration)
  metrics = found['search']
  assert model.nbytes == metrics['q/int8/kl-dp/rtn/0/nbytes']
  assert model.nbytes <= metrics['q/int8/uniform/rtn/0/nbytes']
  assert str(plan.sites['params/head/kernel'].rule.weight) == 'int8()'
  table = Table.from_json(json.loads(tables)['kl'])
  assert table.kept['params/head/kernel'].weight == ql.int8()
  page = (folder / 'search' / 'report.html').read_text()
  assert page.count('<img') == len(config.metrics) - 1 + 1
  assert 'int8/hessian-quadratic' in page


def test_a_measurement_picks_among_the_allocations_of_a_metric(folders):
  folder, config, found, tables = folders
  work = spaces.workload(config)
  read = {k: Table.from_json(v) for k, v in json.loads(tables).items()}
  more = (folder / 'search' / 'tables_rtn.json').read_text()
  for mark, group in json.loads(more).items():
    read |= {k + mark: Table.from_json(v) for k, v in group.items()}
  made = search.allocations(config, read)
  picked = json.loads((folder / 'search' / 'measured.json').read_text())
  program = spaces.program(config, work)
  measure = Measure(
    program, spaces.measured_on(config, work), work.metric, ['kl']
  )
  for option in ('int2', 'int8'):
    names = [f'{option}/{n}' for n in ('uniform', 'kl-dp', 'kl@-dp')]
    values = measure([program.choice(made[n].choice) for n in names])['kl']
    best = min(range(3), key=lambda i: values[i][0])
    chosen = names.index(picked[f'{option}/kl-measured'])
    assert values[chosen] == values[best]
    judged = found['search'][f'q/{option}/kl-measured/rtn/0/kl_mean']
    assert judged == found['search'][f'q/{names[chosen]}/rtn/0/kl_mean']


def test_the_same_command_resumes(folders):
  folder, config, found, _ = folders
  assert search.run(config, folder / 'search') == found['search']


def test_tables_around_a_budget_begin_at_its_option(folders):
  folder, config, _, _ = folders
  work = spaces.workload(config)
  with runtime.Workdir(
    folder / 'search', config.to_dict(), seed=config.seed
  ) as at:
    tables = allocated.tables(at, config, work)  # read, not measured
  assert set(tables) == {'kl@int2', 'kl@int8'}
  for option, table in ((o, tables[f'kl@{o}']) for o in ('int2', 'int8')):
    assert table.facts['base'] == option
    assert table.predict(table.uniform(option)) == 0


def test_a_budget_of_another_cost(folders):
  _, config, _, tables = folders
  found = {k: Table.from_json(v) for k, v in json.loads(tables).items()}
  rng = np.random.default_rng(0)
  seconds = tuple(rng.random(len(r.options)) for r in found['kl'].rows)
  found = {
    k: dataclasses.replace(t, costs={**t.costs, 'latency': seconds})
    for k, t in found.items()
  }
  config = config.copy_and_resolve_references()
  config.cost = 'latency'
  made = search.allocations(config, found)
  for option in config.budgets:
    limit = made[f'{option}/uniform'].costs['latency']
    assert made[f'{option}/kl-dp'].costs['latency'] <= limit


def test_what_cannot_be_solved_is_refused_before_measuring(tmp_path):
  def refused(match, **fields):
    config = small()
    for name, value in fields.items():
      config[name] = value
    with pytest.raises(variants.ConfigError, match=match):
      search.run(config, tmp_path / 'never')
    assert not (tmp_path / 'never').exists()

  refused("unknown cost 'joules'", cost='joules')
  refused("has no option 'int5'", budgets=('int5',))
  refused("unknown method 'ilp'", allocations=(('kl', 'ilp'),))
  refused("unknown metric 'kll'", allocations=(('kll', 'dp'),))
  refused('expected pairs of a table and a method', allocations=('kl', 'dp'))
  refused("unknown transform 'gptk'", allocations=(('kl.gptk', 'dp'),))
  refused('no row matches', groups=(('conv_0', 'kl'), ('nothing', 'kl')))
  refused('rows in common', groups=(('conv', 'kl'), ('conv_1', 'hessian')))
  refused('leave out', groups=(('conv_0', 'kl'), ('conv_1', 'hessian')))
  for content in ('{', '[1]', '{"latency": 3}', '{"latency": {"device": ""}}'):
    file = tmp_path / 'bench.json'
    file.write_text(content)
    refused('holds no measured latencies', latency=str(file))
  lacking = {'device': 'here', 'seconds': {'dot 1x1x1 float x float': 1.0}}
  file.write_text(json.dumps({'latency': lacking}))
  refused("'here' lacks", latency=str(file), cost='latency')


def test_tables_without_data_are_of_distilled_batches(monkeypatch):
  rng = np.random.default_rng(0)
  params = {
    'w': rng.normal(size=(4, 6)).astype(np.float32),
    'mean': rng.normal(size=6).astype(np.float32),
    'var': rng.uniform(0.5, 4, 6).astype(np.float32),
    'head': rng.normal(size=(6, 3)).astype(np.float32),
  }

  def apply(p, x):
    h = (x @ p['w'] - p['mean']) / jnp.sqrt(p['var'] + 1e-3)
    return jnp.tanh(h) @ p['head']

  x = rng.normal(size=(8, 4)).astype(np.float32)
  real = models.workload('digits_cnn', calibration=8, evaluation=8)
  work = dataclasses.replace(
    real,
    apply=apply,
    params=params,
    calibration=data.Batches((x,), 8),
  )
  monkeypatch.setattr(models, 'workload', lambda *_, **__: work)
  config = small()
  config.distilled = 64
  config.calibration = 0
  made = spaces.workload(config)
  [(found, labels)] = spaces.measured_on(config, made)
  assert found.shape == (64, 4)
  np.testing.assert_array_equal(labels, apply(params, found).argmax(-1))

  def off(x):  # of what the BatchNorm expects
    return np.abs((x @ params['w']).mean(0) - params['mean']).mean()

  assert off(found) < off(rng.normal(size=(64, 4))) / 2


def test_what_has_no_table_is_said(folders, capsys):
  _, config, _, tables = folders
  found = {k: Table.from_json(v) for k, v in json.loads(tables).items()}
  search.allocations(config, found)
  assert 'for want of a measurement: ' in (said := capsys.readouterr().out)
  assert 'lrp-dp (no such table)' in said


def test_tables_of_another_model_or_config_are_not_used(folders, tmp_path):
  folder, config, _, _ = folders

  def refused(match, change=lambda c, tables: None):
    kept = tmp_path / str(len(list(tmp_path.iterdir())))
    shutil.copytree(folder / 'search', kept)
    mine = config.copy_and_resolve_references()
    data = json.loads((kept / 'tables.json').read_text())
    change(mine, data)
    (kept / 'tables.json').write_text(json.dumps(data))
    for run in (
      lambda: refine.run(mine, kept, kept / 'journal', 1),
      lambda: search.run(mine, kept),
    ):
      with pytest.raises(ValueError, match=match):
        run()

  def other_model(c, tables):
    tables['kl']['model'] = 'abc'

  def other_config(c, tables):
    c.judged = 3

  def no_values(c, tables):
    del tables['kl']['values']

  refused('measured on another model', other_model)
  refused('a run of another config', other_config)
  refused("cannot be used: this is no table: it has no 'values'", no_values)


def test_refinement_measures_the_front(folders):
  folder, _, found, _ = folders
  rows = found['refined']
  sizes = [r['bytes'] for r in rows]
  assert sizes == sorted(sizes, reverse=True)
  made = json.loads(
    (folder / 'search' / 'refined' / '0' / 'plan.json').read_text()
  )
  assert ql.Plan.from_json(made).quantized


def test_the_truth_and_what_is_near_it(tmp_path):
  config = small()
  config.metrics = ('kl', 'weight_error')
  config.groups = ()
  config.interactions = ('kl',)
  metrics = sensitivity.run(config, tmp_path / 'run')
  assert -1 <= metrics['spearman/kl/all'] <= 1
  truth = json.loads((tmp_path / 'run' / 'truth.json').read_text())
  assert len(truth['joint']['all']['kl']) == 5
  # Of two rows joint, a table with interactions predicts better.
  fits = [metrics[f'random_plans/all/kl/{n}/R2'] for n in ('none', 'own')]
  assert fits[0] < fits[1] < 1
  assert len(truth['alone']) == 6
  # Eight bits change the loss of one site less than two bits.
  loss = np.array([v for v, _ in truth['alone']]).reshape(3, 2)
  assert (np.abs(loss[:, 1]) < loss[:, 0]).all()
  assert sensitivity.run(config, tmp_path / 'run') == metrics


def test_hawq_is_solved_by_its_config(tmp_path):
  metrics = search.run(hawq_v3.get_config(), tmp_path / 'run')
  assert metrics['size/milp/objective'] == pytest.approx(-1.2332, abs=6e-5)
  assert metrics['latency/dp/objective'] == pytest.approx(-1.1050, abs=6e-5)
  with pytest.raises(variants.ConfigError, match='published numbers'):
    sensitivity.run(hawq_v3.get_config(), tmp_path / 'other')


@pytest.mark.shared
@pytest.mark.parametrize(
  'module', [resnet20, resnet8, stories, minilm], ids=lambda m: m.__name__
)
def test_spaces_of_the_configs_resolve(module):
  config = module.get_config()
  try:
    work = models.workload(config.model, shapes_only=True)
  except FileNotFoundError as error:
    pytest.skip(str(error))
  found = ql.search.space(
    work.apply, work.params, spaces.choices(config), *work.example
  )
  assert len(found.rows) > 5
  for option in config.budgets:
    labels = {o for r in found.rows for o in r.options}
    assert option in labels
  assert spaces.metrics(config, work)


def test_settings_are_tuned_within_their_space(tmp_path):
  config = quantune.get_config()
  table = settings.space(config)
  assert np.prod([len(r.options) for r in table.rows]) == 96
  config.model, config.batches, config.first = 'digits_cnn', 1, 2
  with config.unlocked():
    config.settings = {
      'images': {'50': {'calibration': 50}},
      'bits': {
        str(b): {
          'weight': {'format': f'int{b}'},
          'input': {'format': 'int8', 'per': 'tensor'},
        }
        for b in (2, 8)
      },
      'ends': {'quantized': {}, 'float': {'float': ('head',)}},
    }
  best = tune.run(config, tmp_path / 'run', tmp_path / 'journal', 3)
  trials = json.loads((tmp_path / 'run' / 'trials.json').read_text())
  assert len(trials) == 3
  assert best['accuracy_loss'] == min(t['accuracy_loss'] for t in trials)
  table = settings.space(config)
  labels = {'images': '50', 'bits': '8', 'ends': 'float'}
  assert set(labels) == {r.name for r in table.rows}
  chosen = settings.chosen(config, labels)
  assert chosen['weight'] == {'format': 'int8'}
  assert chosen['float'] == ('head',)
  config.settings.images['50'] = {'calibrate': 50}
  with pytest.raises(variants.ConfigError, match="unknown setting 'calibrate'"):
    settings.chosen(config, labels)
