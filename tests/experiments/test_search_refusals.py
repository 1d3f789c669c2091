"""What the search launchers refuse, in process and before any work."""

import importlib
import json
import pathlib
import re
import sqlite3
import time

import numpy as np
import pytest
from absl import flags

from configs.ptq import digits as ptq_digits
from configs.qat import digits as qat_digits
from configs.search import common, digits, hawq_v3, quantune
from experiments import (
  command_line,
  fields,
  ptq,
  qat,
  refine,
  search,
  search_configs,
  sensitivity,
  settings,
  tune,
  variants,
)
from quantlab import models
from quantlab.runtime import files
from quantlab.search import Row, Study, Table, storages

NAN = float('nan')
RULE = {'weight': {'format': 'int4'}}
FINE = {'weight': {'format': 'int8'}}
ONLY = {
  'budgets': ('int4',),
  'kinds': (('all', 0),),
  'interactions': (),
  'around': (),
  'metrics': ('kl',),
  'measured': (),
  'allocations': (),
}


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch):
  """But shapes: neither training nor files."""
  real = models.workload

  def shapes(name, **options):
    assert options.get('shapes_only'), 'a model was loaded'
    return real(name, **options)

  monkeypatch.setattr(models, 'workload', shapes)


def with_fields(config, changes):
  with config.unlocked(), config.ignore_type():
    for name, value in changes.items():
      config[name] = value
  return config


def refused(run, config, match, tmp_path):
  with pytest.raises(variants.ConfigError, match=match):
    run(config, tmp_path / 'never')
  assert not (tmp_path / 'never').exists()


# The fields of a search, one by one -------------------------------------------


@pytest.mark.parametrize(
  ('name', 'values', 'match'),
  [
    ('batches', (0, -1, 1.5, '2', None, True, NAN), 'whole number, at least 1'),
    ('seed', (-1, None, 0.5, 2**31), 'whole number, at least 0'),
    ('seeds', (0, '5'), 'calibration sets: a whole number'),
    ('evaluation', (-5, NAN), '0 for all'),
    ('calibration', (-5,), "0 for the workload's own choice"),
    ('judged', (-1,), 'whole number, at least 0'),
    ('curved', (-1, 2.0), 'whole number, at least 0'),
    ('probes', (0, NAN), 'whole number, at least 1'),
    ('random_plans', (-1, 1, 2.5), '0, or 3 and more'),
    ('alternate', (1, 'no'), 'True or False'),
    ('distilled', (-64,), '0 for none'),
    ('model', ('', 3, None), 'the name of a workload'),
    ('model', ('digits_cmm',), "Did you mean 'digits_cnn'"),
    ('metrics', ((), 'kl', None, (3,), ('kl', 'kl')), 'one or more metrics'),
    ('metrics', (('kll',),), "unknown metric in metrics= 'kll'"),
    ('interactions', (('fisher',), ('klm',)), 'unknown metric in interactions'),
    ('interactions', ('kl', 3), 'any number of metrics, each once'),
    ('around', (('sqnr',), ('hessian',)), 'unknown metric in around'),
    ('budgets', ((), 'int4', (4,), ('int4', 'int4')), 'one or more options'),
    ('encoders', ((), ('rtn', 'rtn'), 'rtn'), 'one or more encoders'),
    ('show', ((), 'accuracy', (NAN,)), 'one or more measured numbers'),
    ('kinds', ((), 5, ('all', 0), (('all',),), (('all', 0.5),)), 'pairs of a'),
    ('kinds', ((('all', 0), ('all', 1)), (('all', -1),)), 'name, each once'),
    (
      'choices',
      (
        *((), '/kernel$', None, ('/kernel$', (RULE, RULE)), (RULE,)),
        *((('/kernel$', ()),), (('/kernel$', 5),), (('/kernel$', ('int4',)),)),
        *((('/kernel$', RULE, RULE),), (('/k', RULE), ('/k', None))),
      ),
      r"a pattern, each once, and a rule .*such as \(\('/kernel\$', \(\{",
    ),
    (
      'choices',
      ((('/k', ({'weight': {'format': 'int9'}},)),),),
      'unknown form',
    ),
    ('choices', ((('/k', {'wait': {'format': 'int8'}}),),), 'argument of rule'),
    ('groups', ('kl', ('conv', 'kl'), (('conv',),), ((1, 'kl'),)), 'no groups'),
    ('allocations', (('kl', 'dp'), (('kl',),), 3), 'a table and a method'),
    ('measured', ('kl', ('fisher.gptq',), (3,)), 'tables'),
    (
      'bisected',
      (
        *('kl', ('kl',), (('kl',),), ((3, 0.1),), (('kl', '1 %'),)),
        *((('kl', -0.1),), (('kl', 1),), (('kl', NAN),), (('kl', 0, 1),)),
      ),
      'share of quality that may be lost, from 0 to less than 1',
    ),
    ('bisected', ((('sqnr', 0.1),),), "unknown metric in bisected= 'sqnr'"),
    ('bisected', ((('kl.gptk', 0.1),),), "unknown transform 'gptk'"),
    ('ties', ('conv', ('conv', 'head'), ((),)), 'groups of sites'),
    ('cost', (None, ''), "one of .'bytes'"),
    ('latency', (5, None), 'bench/latency.py wrote'),
    (
      'bugdets',
      (('int4',),),
      "unknown field 'bugdets'.*Did you mean 'budgets'",
    ),
  ],
)
def test_a_field_is_what_is_expected(name, values, match):
  for value in values:
    config = with_fields(digits.get_config(), {name: value})
    with pytest.raises(variants.ConfigError, match=match):
      search_configs.check(config)


def test_fields_are_checked_together():
  def told(match, **changes):
    config = with_fields(digits.get_config(), changes)
    with pytest.raises(variants.ConfigError, match=match):
      search_configs.check(config)

  told(
    r"interactions=\('loss',\): expected \(\), or some of",
    metrics=('kl',),
    interactions=('loss',),
  )
  told('around=', metrics=('weight_error',), interactions=())
  told('no calibration set to draw', distilled=64, calibration=8)
  config = digits.get_config()
  del config.budgets
  with pytest.raises(variants.ConfigError, match="no field 'budgets'"):
    search_configs.check(config)


@pytest.mark.parametrize('run', [sensitivity.run, search.run])
def test_what_the_model_cannot_do_is_refused_from_shapes(run, tmp_path):
  def told(match, **changes):
    changes = {'evaluation': 250, 'batches': 1, **changes}
    config = with_fields(digits.get_config(), changes)
    refused(run, config, match, tmp_path)

  told(
    "expected some that 'digits_cnn' has",
    metrics=('similarity',),
    interactions=(),
    around=(),
  )
  told('none is left to judge on', batches=1000)
  told('none is left to judge on', judged=1)
  told('measure on fewer', batches=2, alternate=True)
  told("number in show= 'acuracy'.*Did you mean 'accuracy'", show=('acuracy',))
  told('rows have at most 5; expected 0 to 3', kinds=(('x', 9),))
  told('rows have at most 5', kinds=(('only eight bits', 4),))
  told('nothing to choose', choices=(('/kernel$', RULE),))
  two = (('conv_0', (RULE, None)), ('/kernel$', (RULE, None, FINE)))
  told('same number of options', choices=two, bisected=(('kl', 0.1),), **ONLY)
  told(
    "distilled=64: 'digits_vit' has no product that a BatchNorm follows",
    **{'model': 'digits_vit', 'distilled': 64, **ONLY},
  )


# Launchers --------------------------------------------------------------------

RUNS = {
  'ptq': ptq.run,
  'qat': qat.run,
  'sensitivity': sensitivity.run,
  'search': search.run,
  'refine': lambda c, w: refine.run(c, w, w / 'journal', 1),
  'tune': lambda c, w: tune.run(c, w, w / 'journal', 1),
}


def test_every_launcher_says_which_one_takes_a_config(tmp_path):
  configs = {
    'sensitivity or experiments.search or experiments.refine': (
      digits.get_config(),
      ('sensitivity', 'search', 'refine'),
    ),
    'tune': (quantune.get_config(), ('tune',)),
    'search': (hawq_v3.get_config(), ('search',)),
    'ptq': (ptq_digits.get_config(), ('ptq',)),
    'qat': (qat_digits.get_config(), ('qat',)),
  }
  for takers, (config, mine) in configs.items():
    for name in set(RUNS) - set(mine):
      match = f'run experiments.{takers} on it. experiments.{name} takes'
      refused(RUNS[name], config, match, tmp_path)
  empty = type(digits.get_config())()
  refused(search.run, empty, 'no config of any launcher', tmp_path)


@pytest.mark.parametrize('trials', [0, -3, 2.5, None, True, 2**31])
def test_trials_are_counted_before_work(trials, tmp_path):
  for config, run in (
    (digits.get_config(), refine.run),
    (quantune.get_config(), tune.run),
  ):
    with pytest.raises(variants.ConfigError, match=r'trials=.*at least 1'):
      run(config, tmp_path / 'never', tmp_path / 'journal', trials)
  assert not list(tmp_path.iterdir())


def test_a_table_of_numbers_is_checked(tmp_path):
  def told(match, **changes):
    config = with_fields(hawq_v3.get_config(), changes)
    refused(search.run, config, match, tmp_path)

  good = hawq_v3.get_config()
  told('pairs of a row and its options', rows=('x0', 'x1'))
  told('finite numbers', sensitivity=((NAN, 0.0), *good.sensitivity[1:]))
  told('have the shapes', sensitivity=good.sensitivity[1:])
  told('a dict of costs', costs={'size': (1.0, 2.0)})
  told('limits, finite numbers', budgets={'size': NAN})
  told('limits, finite numbers', budgets={})
  told("cost in budgets= 'bytes'", budgets={'bytes': 10.0})
  told('one or more methods', methods=())
  told("unknown method 'ilp'", methods=('ilp',))
  told('groups of sites', ties=('x4', 'x6'))
  told("unknown field 'tie'", tie=())


def tuned(**changes):
  return with_fields(quantune.get_config(), {'model': 'digits_cnn', **changes})


BOTH = {
  'weight': {'format': 'int8'},
  'input': {'format': 'int8', 'per': 'tensor'},
}
ONCE = {'n': {'50': BOTH | {'calibration': 50}}}


@pytest.mark.parametrize(
  ('values', 'match'),
  [
    *((value, 'a dict of settings, each a dict') for value in ((), 'x', {})),
    ({'bits': {}}, 'a dict of settings, each a dict'),
    ({'bits': {'4': 4}}, 'a dict of settings, each a dict'),
    ({'all': {'8': {'wait': 3}}}, "unknown setting 'wait'"),
    ({'all': {'8': BOTH}}, "say nothing of 'calibration'"),
    ({'n': {'50': {'calibration': 50}}}, "say nothing of 'weight'"),
    ({'n': {'0': {'calibration': 0}}, 'q': {'8': BOTH}}, 'examples to cali'),
    ({'n': {'a': BOTH | {'calibration': NAN}}}, 'examples to calibrate on'),
    ({'n': {'a': {'weight': 8}}}, 'weight=8: expected a dict of a quantizer'),
    ({'n': {'a': {'float': '/head/'}}}, 'patterns of sites'),
    (
      {**ONCE, 'z': {'a': {}, 'b': {'weight': {'formt': 4}}}},
      "argument of int8 'formt'",
    ),
  ],
)
def test_settings_are_checked_option_by_option(values, match, tmp_path):
  refused(RUNS['tune'], tuned(settings=values), match, tmp_path)


def test_what_is_tuned_is_checked_from_shapes(tmp_path):
  run = RUNS['tune']
  refused(run, tuned(sampler='tpe'), "unknown sampler 'tpe'", tmp_path)
  refused(run, tuned(first=-1), 'trials of a design', tmp_path)
  refused(run, tuned(first=2**30), 'first=.*at most 65536', tmp_path)
  refused(run, tuned(batches=1000), 'batches of .*measure on fewer', tmp_path)
  ends = {'ends': {'all': {}, 'inner': {'float': ('/heat/',)}}}
  refused(run, tuned(settings=ONCE | ends), "'inner'.*heat", tmp_path)


def test_another_model_or_setting_is_another_study(tmp_path, monkeypatch):
  """Whose labels, alone in the storage's table, are the same."""
  measured = []

  def measure(config, table, choice):
    measured.append(choice)
    return float(sum(choice))

  monkeypatch.setattr(tune, 'measure', measure)
  journal = tmp_path / 'journal'
  first = tuned(settings=ONCE, first=2)
  tune.run(first, tmp_path / 'first', journal, 1)
  assert tune.run(first, tmp_path / 'first', journal, 1)['n'] == '50'
  assert len(measured) == 1
  for told, changes in (
    ('model: .digits_cnn. there, .digits_vit. here', {'model': 'digits_vit'}),
    ('seed: 0 there, 1 here', {'seed': 1}),
    ('batches: 4 there, 1 here', {'batches': 1}),
    ('evaluation: 0 there, 500 here', {'evaluation': 500}),
    ('batch_size: 0 there, 50 here', {'batch_size': 50}),
    (
      r'settings\.n\.50\.calibration: 50 there, 51 here',
      {'settings': {'n': {'50': BOTH | {'calibration': 51}}}},
    ),
  ):
    other = tuned(**{'settings': ONCE, 'first': 2, **changes})
    with pytest.raises(ValueError, match=f'about something else: {told}'):
      tune.run(other, tmp_path / 'other', journal, 1)
    assert not (tmp_path / 'other' / 'best.json').exists()
    (tmp_path / 'other' / 'config.json').unlink()
  assert len(measured) == 1


# Folders ----------------------------------------------------------------------


def test_folders_that_cannot_be_used_are_refused_before_work(tmp_path):
  file = tmp_path / 'file'
  file.write_text('')
  small = {'evaluation': 250, 'batches': 1}
  config = with_fields(digits.get_config(), small)
  for run in (sensitivity.run, search.run, RUNS['tune']):
    mine = tuned(settings=ONCE) if run is RUNS['tune'] else config
    with pytest.raises(ValueError, match='cannot write to the folder'):
      run(mine, file / 'run')
    with pytest.raises(ValueError, match='it is not a workdir'):
      run(mine, tmp_path)
  for folder in (file / 'run', tmp_path / 'none'):
    with pytest.raises(variants.ConfigError, match=r'has no tables\.json'):
      RUNS['refine'](config, folder)
  found = tmp_path / 'found'
  found.mkdir()
  for content in ('[1]', '"kl"', 'null'):
    (found / 'tables.json').write_text(content)
    with pytest.raises(variants.ConfigError, match='holds no tables by metric'):
      RUNS['refine'](config, found)
  (found / 'tables.json').write_text('{"kl": {}}')
  (found / 'config.json').write_text(json.dumps(config.to_dict()))
  with pytest.raises(variants.ConfigError, match="unknown metric 'lrp'"):
    refine.run(config, found, found / 'journal', 1, metric='lrp')


TINY = Table(
  (Row('a', ('x', 'y')),), (np.zeros(2),), (np.zeros(2),), {}, '', ''
)
STORAGES = (
  ('{0}/file/journal', 'Not a directory'),
  ('{0}/folder', 'Is a directory'),
  ('/proc/none/journal', 'No such file'),
  ('{0}/file/study.db', 'Not a directory'),
  ('sqlite:///{0}/none/study.db', 'unable to open database file'),
  ('postgresql://nobody@localhost:1/none', 'database'),
  ('nosql://localhost/none', 'nosql'),
)


@pytest.mark.parametrize(('storage', 'reason'), STORAGES)
@pytest.mark.parametrize('launcher', [refine, tune])
def test_a_storage_that_cannot_be_reached_ends_with_one_line(
  launcher, storage, reason, tmp_path
):
  """Before a model is loaded; postgresql has no driver, or refuses."""
  (tmp_path / 'file').write_text('')
  (tmp_path / 'folder').mkdir()
  work = tmp_path / 'work'
  config = with_fields(digits.get_config(), {'evaluation': 250, 'batches': 1})
  if launcher is tune:
    config = tuned(settings=ONCE)
  else:
    work.mkdir()
    (work / 'tables.json').write_text('{"kl": {}}')
    (work / 'config.json').write_text(json.dumps(config.to_dict()))
  values = flags.FlagValues()
  launcher.define_flags(values)
  told = storage.format(tmp_path)
  file = tmp_path / 'config.py'
  file.write_text(
    'import ml_collections\n'
    f'get_config = lambda: ml_collections.ConfigDict({config.to_dict()!r})\n'
  )
  argv = ['x', f'--config={file}', f'--workdir={work}', f'--storage={told}']
  values(argv)
  with pytest.raises(SystemExit, match=r'^error: the storage .*Give a') as end:
    launcher.main(argv[:1], values)
  message = str(end.value)
  assert '\n' not in message
  assert told in message
  assert reason in message


@pytest.mark.parametrize(
  'content',
  [
    b'my notes, without an end',
    b'first line\nsecond, without an end',
    b'{"a": 1}\n[1]',
    b'[1]\n',
    b'{"op',
    bytes(range(255, 0, -1)),
  ],
)
def test_a_file_that_is_no_journal_is_left_as_it_is(content, tmp_path):
  path = tmp_path / 'notes'
  path.write_bytes(content)
  for arguments in ({}, {'source': path, 'sampler': 'predicted'}):
    storage = tmp_path / 'other' if arguments else path
    with pytest.raises(ValueError, match=r'notes.*no journal of a study'):
      Study(TINY, storage, **arguments)
  assert path.read_bytes() == content
  assert list(tmp_path.iterdir()) == [path]


def test_no_message_has_a_password(tmp_path):
  for url in (
    'postgresql://me:s3cr@et@localhost:1/none',
    'postgresql+none://me:s3cr@et@localhost/none',
    'nosql://localhost/none?user=me&password=s3cr@et&x=1',
  ):
    for arguments in (
      {'storage': url},
      {'storage': tmp_path / 'a', 'source': url, 'sampler': 'predicted'},
      {'storage': url, 'source': url, 'sampler': 'predicted'},
      {'storage': tmp_path / 'a', 'source': url},
    ):
      with pytest.raises(ValueError, match=r'://') as end:
        Study(TINY, **arguments)
      assert 's3cr' not in str(end.value)
      assert 'et@' not in str(end.value)
  assert storages.shown('sqlite:////a:b@c/d') == 'sqlite:////a:b@c/d'


def test_a_locked_database_ends_with_one_line_and_goes_on(
  tmp_path, monkeypatch
):
  for name, value in (('PATIENCE', 0.1), ('HEARTBEAT', 1), ('GRACE', 2)):
    monkeypatch.setattr(storages, name, value)
  other = sqlite3.connect(tmp_path / 'study.db', isolation_level=None)
  url, measured = f'sqlite:///{tmp_path}/study.db', []

  def measure(config, table, choice):
    measured.append(choice)
    if len(measured) == 2:
      # Of a trial whose worker was never heard no silence can be noticed.
      count = 'SELECT COUNT(*) FROM trial_heartbeats'
      until = time.monotonic() + 10
      while other.execute(count).fetchone()[0] < 2:
        assert time.monotonic() < until
        time.sleep(0.02)
      other.execute('BEGIN EXCLUSIVE')
    return float(sum(choice))

  monkeypatch.setattr(tune, 'measure', measure)
  work = (tuned(settings=ONCE, first=2), tmp_path / 'work', url, 3)
  for told in ('failed .* is locked.*goes on', 'cannot be reached .* is lock'):
    match = rf"^error: the storage '{url}' {told}"
    with pytest.raises(SystemExit, match=match) as end:
      command_line.guarded(tune.run, *work)
    assert '\n' not in str(end.value)
  other.rollback()
  assert tune.run(*work)['n'] == '50'
  assert len(measured) == 4  # the first is kept, what was not written is not
  assert len(files.read_json(tmp_path / 'work' / 'trials.json')) == 3
  time.sleep(3)
  made = Study(
    settings.space(work[0]),
    url,
    ('accuracy_loss',),
    about=settings.about(work[0]),
  )
  made.run(lambda choice: 0.0, 4)
  counts = made.counts()
  assert counts['killed'] == 1
  assert counts['running'] == counts['waiting'] == 0


@pytest.mark.parametrize(
  ('match', 'arguments'),
  [
    ('seed=-1: expected a whole number', {'seed': -1}),
    (r'seed=3000000000: expected .*below 2\^31', {'seed': 3_000_000_000}),
    ("source='': expected the storage", {'source': ''}),
    ('is the storage of this study itself', {'source': '{0}/journal'}),
    ('is the storage of this study itself', {'source': '{0}/../{1}/journal'}),
    ("source='x': expected none with", {'source': 'x', 'sampler': 'nsga2'}),
    ("unknown sampler 'tpe'", {'sampler': 'tpe'}),
    ("source='/none/x' is not there", {'source': '/none/x'}),
  ],
)
def test_arguments_of_a_refinement_are_refused_before_work(
  match, arguments, tmp_path
):
  config = with_fields(digits.get_config(), {'evaluation': 250, 'batches': 1})
  (tmp_path / 'tables.json').write_text('{"kl": {}}')
  (tmp_path / 'config.json').write_text(json.dumps(config.to_dict()))
  if source := arguments.get('source'):
    given = source.format(tmp_path, tmp_path.name)
    arguments = {**arguments, 'source': given}
  with pytest.raises(ValueError, match=match):
    refine.run(config, tmp_path, tmp_path / 'journal', 1, **arguments)
  assert not (tmp_path / 'journal').exists()


def test_the_commands_end_with_one_line(monkeypatch, tmp_path):
  path = pathlib.Path(common.__file__).parent / 'digits.py'
  for words, match in (
    (['--config.batches=0'], '^error: batches=0: expected labelled batches'),
    (['--config.metrics=()'], r'^error: metrics=\(\): expected a tuple of one'),
  ):
    argv = ['x', f'--config={path}', f'--workdir={tmp_path}/never', *words]
    for launcher in (sensitivity, search):
      values = flags.FlagValues()
      sensitivity.define_flags(values)
      monkeypatch.setattr('sys.argv', argv)
      with pytest.raises(SystemExit, match=match) as end:
        launcher.main(values(argv), values)
      assert '\n' not in str(end.value)


def test_every_config_is_taken_by_the_launchers_that_it_names():
  root = pathlib.Path(common.__file__).parents[1]
  seen = set()
  for path in sorted(root.glob('*/*.py')):
    name = '.'.join(('configs', *path.relative_to(root).with_suffix('').parts))
    module = importlib.import_module(name)
    if not hasattr(module, 'get_config'):  # what several have in common
      continue
    takers = set(re.findall(r'python -m experiments\.(\w+)', module.__doc__))
    # The benchmark of latencies says which command its result is for.
    takers = {'bench'} if path.parent.name == 'bench' else takers
    assert takers, name
    for launcher in takers:
      fields.check_launcher(module.get_config(), launcher)
    seen |= takers
  assert seen >= {
    'bench',
    'generate',
    'ptq',
    'qat',
    'search',
    'testbed',
    'tune',
  }
