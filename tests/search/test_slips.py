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
  for off in (1, -1):  # -1 would index the last class
    with pytest.raises(ValueError, match='batch 2 has labels that are none of'):
      run([*LABELLED[:2], (XS[2], YS[2] + off)])
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
  refused(
    ValueError, 'and no input .* first axis', apply=lambda p, x: mlp(p, x[:2])
  )
  refused(ValueError, 'returns int32', apply=lambda p, x: mlp(p, x).astype(int))
  for wrong in (0, True, 2.5):
    refused(ValueError, 'probes is a positive', metric='trace', probes=wrong)
  for wrong in (0, -1.0, np.nan, 2, None):
    refused(ValueError, 'tolerance is between', tolerance=wrong)
  for wrong in (0, jax.random.split(jax.random.key(0))):
    refused(TypeError, r'one random key', metric='trace', key=wrong)
  refused(TypeError, 'a name or several', metric=None)
  refused(ValueError, 'there is no batch', calibration=[])
  for wrong in (None, 3, {'x': XS[0]}, XS[0]):
    refused(TypeError, r'batches are given as a list', batches=wrong)
  refused(ValueError, 'there is no batch', batches=[])
  refused(
    ValueError, 'iterations is a positive', metric='eigenvalue', iterations=0
  )
  refused(ValueError, 'names at least one of', metric=())
  refused(ValueError, 'an empty group', ties=[()])
  refused(ValueError, 'not a regular expression', ties=['('])
  refused(TypeError, "rule for '/a' must be", choices={'/a': ['int4']})
  refused(ValueError, "row 'a' has no option", base='int3')
  refused(ValueError, "row 'a' has no option", base='int3', encode=ql.gptq())
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


def test_what_goes_wrong_within_a_model_is_not_laid_to_labels():
  def broken(params, x):
    return mlp(params, x) + None

  with pytest.raises(TypeError, match='cannot be called') as found:
    measure(apply=broken)
  assert 'Labels' not in str(found.value)


def test_labels_that_no_mask_counts_may_be_anything():
  """As language models have them; those that count are classes."""
  mask = np.ones(6, bool)
  mask[0] = False
  labels = np.where(mask, YS[0], -100)

  def of(labels):
    batches = [(x[None], labels[None], mask[None]) for x in XS]
    return measure(batches, metric='loss', task=quality.language_model)

  zeros = np.where(mask, YS[0], 0)
  np.testing.assert_array_equal(of(labels).values, of(zeros).values)
  labels[1] = -1
  with pytest.raises(ValueError, match='batch 0 has labels'):
    of(labels)


def test_parameters_may_hold_random_keys():
  """As the state of an nnx model with Dropout does."""
  params = {**PARAMS, 'rng': jax.random.key(3)}
  table = measure(params=params)
  found = ql.allocate(table, 1e6)
  assert ql.ptq(mlp, params, found, XS).plan.quantized
  with pytest.raises(ValueError, match='another model'):
    ql.ptq(mlp, {**params, 'rng': jax.random.key(4)}, found, XS)


def test_the_same_numbers_in_float64_are_the_same_model():
  double = jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS)
  found = ql.allocate(measure(params=double), 1e6)
  assert ql.ptq(mlp, PARAMS, found, XS).plan.quantized


def test_inputs_that_are_no_examples_stay_whole():
  """A scalar among the inputs, where batches are taken in parts."""

  def scaled(params, x, factor):
    return mlp(params, x) * factor

  batches = [(x, jnp.float32(1)) for x in XS]
  ours = measure(batches, apply=scaled, interactions=True)
  np.testing.assert_allclose(
    ours.interactions, measure(interactions=True).interactions, atol=1e-7
  )


@pytest.mark.parametrize(
  'metric', ['loss', 'hessian', 'trace', 'eigenvalue', 'lrp']
)
def test_batches_count_by_what_they_hold(metric):
  """Parts of other sizes, and a batch of which nothing counts."""
  none = np.zeros((6, 1), bool)
  x, y = jnp.concatenate([XS[0], 3 * XS[1], XS[2]])[:, None], np.concatenate(YS)

  def of(*parts):
    batches = [
      (x[a:b], y[a:b, None], np.ones((b - a, 1), bool)) for a, b in parts
    ]
    if len(parts) > 1:
      batches.append((x[:6], y[:6, None], none))
    more = {'key': jax.random.key(1), 'probes': 400, 'iterations': 200}
    return measure(
      batches,
      metric=metric,
      task=quality.language_model,
      tolerance=1e-6,
      **more,
    )

  whole, parts = of((0, 18)), of((0, 12), (12, 18))
  tolerance = 0.15 if metric == 'trace' else 1e-3  # of other probes
  np.testing.assert_allclose(parts.values, whole.values, rtol=tolerance)


def test_labels_are_integers():
  for kind in (np.float32, bool):
    batches = [(x, y.astype(kind)) for x, y in LABELLED]
    with pytest.raises(TypeError, match='Labels are integers'):
      measure(batches, metric='loss', task=quality.classification)
