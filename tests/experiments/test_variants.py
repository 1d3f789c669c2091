"""What a config can say, and what it is told when it says something else."""

import pytest

import quantlab as ql
from experiments import variants

W4 = {'format': 'int4', 'group': 32}


def variant(**changes):
  return {'name': 'a', 'rules': (('/kernel$', {'weight': W4}),), **changes}


def ruled(rule):
  return variant(rules=(('/kernel$', rule),))


def test_a_quantizer_is_its_factory_call():
  spec = {
    'format': 'int4',
    'group': 64,
    'symmetric': False,
    'scale': {'rule': 'mse', 'p': 2.4},
  }
  found = variants.quantizer(spec)
  scale = ql.scales.mse(p=2.4)
  assert found == ql.int4(group=64, symmetric=False, scale=scale)
  assert spec['scale'] == {'rule': 'mse', 'p': 2.4}  # left as it was


@pytest.mark.parametrize('name', variants.FORMATS)
def test_every_format_can_be_named(name):
  assert variants.quantizer({'format': name}) == getattr(ql, name)()


@pytest.mark.parametrize('name', variants.SCALES)
def test_every_range_rule_can_be_named(name):
  # The means are for values that stand for a sign.
  fmt = 'ternary' if name.startswith('abs') and name != 'absmax' else 'int8'
  spec = {'format': fmt, 'scale': {'rule': name}}
  if name == 'kl':  # of what calibration counts
    spec |= {'per': 'tensor', 'static': True}
  assert variants.quantizer(spec).scale == getattr(ql.scales, name)()


def test_an_argument_of_one_format_only():
  spec = {'format': 'mxfp8', 'element': 'e5m2', 'ragged': True}
  assert variants.quantizer(spec) == ql.mxfp8(element='e5m2', ragged=True)


def test_rules_become_a_recipe():
  spec = {
    'name': 'mixed',
    'rules': (
      ('/embed/', None),
      ('/head/', {'weight': W4, 'optional': True}),
      ('/kernel$', {'weight': W4, 'input': {'format': 'int8'}, 'fold': False}),
    ),
  }
  expected = ql.recipe(
    {
      '/embed/': None,
      '/head/': ql.optional(ql.rule(weight=ql.int4(group=32))),
      '/kernel$': ql.rule(
        weight=ql.int4(group=32), input=ql.int8(), fold=False
      ),
    }
  )
  assert variants.recipe(spec) == expected


def test_transforms_by_name():
  specs = [
    'gptq',
    {'name': 'smooth', 'alpha': 0.8},
    ({'name': 'rotate'}, 'rtn'),
  ]
  found = variants.resolve(
    [variant()]
    + [variant(name=str(i), transform=t) for i, t in enumerate(specs)]
  )
  assert [[m.name for m in v.transform] for v in found] == [
    ['rtn'],
    ['gptq'],
    ['smooth'],
    ['rotate', 'rtn'],
  ]


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    (ruled({'weight': {'format': 'itn4'}}), "'itn4'.*Did you mean 'int4'"),
    (ruled({'weight': {}}), 'unknown format None'),
    (
      ruled({'weight': {'format': 'int4', 'gropu': 32}}),
      "argument of int4 'gropu'.*Did you mean 'group'",
    ),
    (
      ruled({'weight': {'format': 'int4', 'scale': {'rule': 'msee'}}}),
      "range rule 'msee'.*Did you mean 'mse'",
    ),
    (
      ruled({'weight': {'format': 'int4', 'scale': {'rule': 'mse', 'q': 2}}}),
      "argument of mse 'q'",
    ),
    (ruled({'wieght': W4}), "argument of rule 'wieght'.*mean 'weight'"),
    (ruled({'weight': 'int4'}), "takes a quantizer such as .*'int4'"),
    (ruled({'fold': False}), 'needs at least one quantizer'),
    (
      ruled({'weight': {'format': 'int4', 'group': 32, 'per': 'channel'}}),
      'exactly one of per, group',
    ),
    (variant(transform='gtpq'), "transform 'gtpq'.*Did you mean 'gptq'"),
    (variant(transform={'name': 'gptq', 'dump': 1}), "'dump'.*mean 'damp'"),
    (variant(transform=('gptq', 'smooth')), 'cannot follow gptq'),
    (variant(transfrom='gptq'), "field 'transfrom'.*mean 'transform'"),
    (variant(rules=()), 'no rules'),
  ],
)
def test_what_is_unknown_is_named_with_what_was_meant(spec, message):
  with pytest.raises(variants.ConfigError, match=message) as caught:
    variants.resolve([spec])
  assert str(caught.value).startswith("variant 'a': ")


@pytest.mark.parametrize('name', [None, '', 'a/b', '../a', 'a b'])
def test_a_name_must_do_for_a_folder(name):
  with pytest.raises(variants.ConfigError, match='names a folder'):
    variants.resolve([variant(name=name)])


@pytest.mark.parametrize('name', ['a', 'float'])
def test_a_name_is_given_once(name):
  with pytest.raises(variants.ConfigError, match='is taken'):
    variants.resolve([variant(), variant(name=name)])
