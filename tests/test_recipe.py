"""Recipes: which rule decides which site, and what is refused."""

import jax
import jax.numpy as jnp
import pytest

import quantlab as ql
from quantlab.graph import tracing

W8, W4 = ql.int8(), ql.int4()
X = jax.ShapeDtypeStruct((4, 8), jnp.float32)
W = jax.ShapeDtypeStruct((8, 8), jnp.float32)
PARAMS = {'embed': {'w': W}, 'block': {'up': W, 'down': W}, 'head': W}


def apply(p, x):
  x = x @ p['embed']['w']
  h = jnp.tanh(x @ p['block']['up']) @ p['block']['down']
  scores = jax.nn.softmax(jnp.einsum('td,sd->ts', h, x))
  return (scores @ x) @ p['head']


def resolve(rules):
  traced, _, _ = tracing.Tracer(apply)(PARAMS, (X,), {})
  return ql.recipe(rules).resolve(traced.analysis.sites)


def test_sites_have_readable_names():
  plan = ql.plan(apply, PARAMS, {'head': W8}, X)
  assert list(plan.sites) == [
    'embed/w',
    'block/up',
    'block/down',
    'block/down/dot_0',
    'block/down/dot_1',
    'head',
  ]


def test_first_match_wins():
  found = resolve({'/(embed|head)': None, '/block/up$': W4, '/': W8})
  weights = {k: r and r.weight for k, r in found.items()}
  assert weights == {
    'embed/w': None,
    'block/up': W4,
    'block/down': W8,
    'head': None,
  }


def test_patterns_are_searched_in_the_path_after_a_slash():
  assert set(resolve({'^/head$': W8})) == {'head'}
  assert set(resolve({'w$': W8})) == {'embed/w'}
  assert set(resolve({'block': W8})) == {'block/up', 'block/down'}


def test_site_patterns_reach_products_of_activations():
  rule = ql.rule(lhs=ql.int8(per='token'), rhs=ql.int8(per='token'))
  found = resolve({'site:dot_': rule, '/head': W8})
  assert set(found) == {'block/down/dot_0', 'block/down/dot_1', 'head'}
  assert set(resolve({'site:^block/up$': W8})) == {'block/up'}
  # A path pattern never reaches them, however broad.
  assert set(resolve({'': W8})) == {'embed/w', 'block/up', 'block/down', 'head'}


@pytest.mark.parametrize(
  ('rules', 'message'),
  [
    ({'nothing': W8}, r"no rule of the recipe matches any site.*'nothing'"),
    ({'head': W8, 'heda': W4}, r"rule 'heda' decides no site: it matches"),
    ({'': W8, 'head': W4}, r"rule 'head' decides no site.*earlier rule"),
    ({}, 'the recipe is empty'),
    ({'(': W8}, r"pattern '\(' is not a regular expression"),
    ({'head': W8, 'site:dot_9': None}, r"rule 'site:dot_9' decides no site"),
  ],
)
def test_value_errors(rules, message):
  with pytest.raises(ValueError, match=message):
    resolve(rules)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: ql.recipe({'head': 'int8'}), r"rule for 'head' must be a quant"),
    (lambda: ql.recipe({'head': 8}), r"rule for 'head' must be a quantizer"),
    (lambda: ql.recipe({1: W8}), r'patterns are strings, got 1'),
    (lambda: ql.recipe([W8]), r'a recipe is a dict of pattern: rule'),
    (
      lambda: ql.rule(weight='int8'),
      r'rule\(weight=\.\.\.\) takes a quantizer',
    ),
    (lambda: ql.optional('int8'), 'must be a quantizer'),
    (lambda: ql.rule(weight=W8, fold='no'), "fold takes True or False.*'no'"),
    (lambda: ql.recipe({'': W8}, strict=0), 'strict takes True or False.*0'),
  ],
)
def test_type_errors(make, message):
  with pytest.raises(TypeError, match=message):
    make()


def test_rules_of_two_kinds_do_not_mix():
  with pytest.raises(ValueError, match='is for a product of two activations'):
    ql.rule(weight=W8, lhs=W8)
  with pytest.raises(ValueError, match='at least one quantizer'):
    ql.rule()


def test_optional_rules_may_match_nothing():
  found = resolve({'head': W8, 'nothing': ql.optional(W4)})
  assert set(found) == {'head'}
  assert set(resolve({'head': W8, 'up': ql.optional(W4)})) == {
    'head',
    'block/up',
  }


def test_errors_list_the_sites():
  with pytest.raises(ValueError, match='Sites: embed/w, block/up, block/down'):
    resolve({'nothing': W8})


def test_no_site_has_a_weight():
  closed, params = jnp.ones((8, 8)), {'w': W}
  with pytest.raises(ValueError, match=r'Sites: dot_0: no product reads a par'):
    ql.plan(lambda p, x: x @ closed, params, {'': W8}, X)
  with pytest.raises(ValueError, match=r'Sites: none: no product reads a par'):
    ql.plan(lambda p, x: x + 1, params, {'': W8}, X)


def test_strict_of_a_recipe_that_is_made_again():
  lax = ql.recipe({'': W8}, strict=False)
  assert not ql.recipe(lax).strict
  assert ql.recipe(lax, strict=True) == ql.recipe({'': W8})


def test_a_recipe_is_a_value():
  rules = {'head': W8, 'up': ql.optional(ql.rule(weight=W4, fold=False))}
  assert ql.recipe(rules) == ql.recipe(ql.recipe(rules))
  assert hash(ql.recipe(rules)) == hash(ql.recipe(rules))
  assert ql.recipe(rules).to_json() == [
    {'pattern': 'head', 'rule': {'weight': W8.to_json()}},
    {
      'pattern': 'up',
      'rule': {'weight': W4.to_json(), 'fold': False},
      'optional': True,
    },
  ]
