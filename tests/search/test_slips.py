"""What `sensitivity` and its tables refuse, and what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph import programs

import quantlab as ql
from quantlab import quality, search

W = programs.Random(7)
PARAMS = {'a': W(4, 5, scale=0.9), 'b': W(5, 3, scale=0.9)}
XS = [W(6, 4, scale=1.0) for _ in range(3)]
YS = [np.arange(6) % 3 for _ in XS]
LABELLED = list(zip(XS, YS, strict=True))
CHOICES = {'': [ql.int2(), ql.int4()]}


def mlp(params, x):
  return jnp.tanh(x @ params['a']) @ params['b']


def measure(batches=XS, choices=CHOICES, metric='kl', apply=mlp, **more):
  params = more.pop('params', PARAMS)
  return ql.sensitivity(apply, params, choices, batches, metric, **more)


def test_a_table_is_of_one_model():
  found = ql.allocate(measure(), 1e6)
  other = jax.tree.map(lambda x: 1.5 * x, PARAMS)
  with pytest.raises(ValueError, match=r'another model.*allocation\.recipe'):
    ql.ptq(mlp, other, found, XS)
  assert ql.ptq(mlp, other, found.recipe, XS).plan.quantized
  assert ql.ptq(mlp, PARAMS, found, XS).plan.quantized


@pytest.mark.parametrize('metric', ['kl', 'loss', 'hessian', 'lrp', 'trace'])
def test_a_batch_the_float_model_fails_on_is_named(metric):
  def run(batches, params=PARAMS):
    measure(batches, metric=metric, task=quality.classification, params=params)

  broken = XS[1].at[0, 0].set(np.nan)
  with pytest.raises(
    ValueError, match='outputs that are not finite on batch 1'
  ):
    run([LABELLED[0], (broken, YS[1]), LABELLED[2]])
  with pytest.raises(ValueError, match=r'loss .* not finite on batch 2'):
    run([*LABELLED[:2], (XS[2], YS[2] + 1)])
  with pytest.raises(ValueError, match='batch 1 is empty'):
    run([LABELLED[0], (XS[0][:0], YS[0][:0])])
  with pytest.raises(ValueError, match='hold NaN or infinity: b'):
    run(LABELLED, {**PARAMS, 'b': PARAMS['b'].at[0].set(np.nan)})


def test_slips_are_told_from_each_other():
  def refused(error, match, **more):
    with pytest.raises(error, match=match):
      measure(**more)

  refused(TypeError, 'task= takes a metric', task='classification')
  refused(TypeError, 'Labels are no inputs', batches=LABELLED)
  tuples = {'apply': lambda p, x: (mlp(p, x), x)}
  refused(ValueError, 'one array', **tuples)
  refused(ValueError, 'one array', apply=lambda p, x: {'y': mlp(p, x)})
  refused(ValueError, 'one array', apply=lambda p, x: mlp(p, x).sum())
  refused(ValueError, 'one array', apply=lambda p, x: mlp(p, x)[:, 0])
  refused(ValueError, 'probes is a positive', metric='trace', probes=0)
  refused(
    ValueError, 'iterations is a positive', metric='eigenvalue', iterations=0
  )
  refused(ValueError, 'names at least one of', metric=())
  refused(ValueError, 'an empty group', ties=[()])
  refused(ValueError, 'no regular expression', ties=['('])
  refused(TypeError, "rule for '/a' must be", choices={'/a': ['int4']})
  refused(ValueError, "is no option of 'a'", base='int3')
  refused(ValueError, "is no option of 'a'", base='int3', encode=ql.gptq())
  refused(ValueError, 'says nothing of', costs={'mine': lambda plan: {}})
  refused(TypeError, 'it returned 3', costs={'mine': lambda plan: 3})
  memory = {'peak': ql.cost.peak_memory}
  refused(TypeError, "the cost 'peak' must be a function plan", costs=memory)


def test_tables_that_would_be_all_zero_are_refused():
  def one(p, x):
    return mlp(p, x)[:, :1]

  with pytest.raises(ValueError, match='over one class'):
    measure(apply=one)
  with pytest.raises(ValueError, match='over one class'):
    measure(apply=one, metric='hessian')
  table = measure(apply=one, metric='output_mse')
  assert all(v[0] > v[1] > 0 for v in table.values)
  for more in ({}, {'of': 'output_mse'}):
    with pytest.raises(ValueError, match='is zero at the float model'):
      measure(metric='fisher', **more)


def test_the_name_of_one_metric_has_interactions_too():
  table = measure(interactions='kl')
  assert table.interactions.shape == (4, 4)
  assert search.additive(table).interactions is None
