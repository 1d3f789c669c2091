"""The bare-JAX models against the evaluation code that came with the weights.

Each forward pass must equal the published one, and each float metric must be
the published number; long sets are measured in part, against the same part.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from quantlab import data, models, quality
from quantlab.models import (
  bert,
  lenet,
  llama,
  mobilenet_v1,
  resnet8,
  resnet_cifar,
)

pytestmark = pytest.mark.shared


def flat(path):
  """A flat checkpoint as the published code takes it: float32 arrays."""
  arrays = data.load_npz(path)
  return {k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()}


IMAGES = {
  'resnet20_jpeg': (resnet_cifar, 'cifar10', 'resnet20_jpeg.npz'),
  'resnet20': (resnet_cifar, 'cifar10', 'resnet20.npz'),
  'resnet32': (resnet_cifar, 'cifar10', 'resnet32.npz'),
  'resnet8': (resnet8, 'cifar10_resnet8', 'resnet8.npz'),
  'mobilenet': (mobilenet_v1, 'vww_mobilenet', 'vww_mobilenet_v1_025.npz'),
  'mnist_lenet': (lenet, 'mnist', 'mnist_lenet.npz'),
}


@pytest.mark.parametrize('name', IMAGES)
def test_image_models_equal_the_published_code(name, shared, published):
  module, folder, file = IMAGES[name]
  theirs, weights = published(folder), flat(shared / folder / file)
  images = 'mnist/test.npz' if folder == 'mnist' else 'cifar10/test_jpeg.npz'
  if name == 'mobilenet':
    raw = data.load_npz(shared / 'cifar10/calib_train_lossless.npz')['x'][:8]
    x = theirs.images(8)
  else:
    raw = data.load_npz(shared / images)['x'][:16]
    normalise = getattr(theirs, 'normalise', lambda x: x.astype(np.float32))
    x = normalise(raw)
  expected = jax.jit(theirs.forward)(weights, x)
  params = module.from_flat(weights)
  found = jax.jit(module.apply)(params, module.preprocess(raw))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  sizes = [sum(a.size for a in jax.tree.leaves(t)) for t in (params, weights)]
  assert sizes[0] == sizes[1]  # every stored value has its place


def test_llama_equals_the_published_code(shared, published):
  weights = flat(shared / 'stories260k/stories260k.npz')
  ids = data.load_npz(shared / 'stories260k/stories_tokens.npz')['ids'][:2]
  ids = ids[:, :100].astype(np.int32)
  expected = jax.jit(published('stories260k').forward)(weights, ids)
  found = jax.jit(llama.apply)(llama.from_flat(weights), ids)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_bert_equals_the_published_code_and_needs_no_padding(shared, published):
  weights = flat(shared / 'minilm_sts/minilm_fp16.npz')
  stored = data.load_npz(shared / 'minilm_sts/stsb_dev.npz')
  ids, length = stored['ids_a'][:6].astype(np.int32), stored['len_a'][:6]
  mask = np.arange(ids.shape[1]) < length[:, None]
  expected = jax.jit(published('minilm_sts').encode)(weights, ids, mask)
  params, apply = bert.from_flat(weights), jax.jit(bert.apply)
  np.testing.assert_allclose(
    apply(params, ids, mask), expected, rtol=1e-5, atol=1e-5
  )
  t = int(length.max())
  trimmed = apply(params, ids[:, :t], mask[:, :t])
  np.testing.assert_allclose(trimmed, expected, rtol=1e-4, atol=1e-5)
  # Pairs go through as a leading axis.
  pairs = apply(params, ids.reshape(3, 2, -1), mask.reshape(3, 2, -1))
  np.testing.assert_allclose(pairs.reshape(6, -1), expected, 1e-5, 1e-5)


@pytest.mark.parametrize('name', ['resnet8', 'mnist_lenet'])
def test_float_accuracy_is_the_published_one(name, shared, prepared_sets):
  load = models.workload(name, data_dir=prepared_sets)
  found = quality.evaluate(
    load.apply, load.params, load.evaluation, load.metric
  )
  assert found['accuracy'].n == 5000
  assert found['accuracy'].value == pytest.approx(
    load.expected['accuracy'], abs=0.00005
  )


def test_part_of_cifar_as_the_published_code_has_it(
  shared, published, prepared_sets
):
  load = models.workload(
    'resnet20_jpeg', evaluation=500, data_dir=prepared_sets
  )
  found = quality.evaluate(
    load.apply, load.params, load.evaluation, load.metric
  )
  forward = jax.jit(published('cifar10').forward)
  weights = flat(shared / 'cifar10/resnet20_jpeg.npz')
  hits = [
    np.asarray(forward(weights, x)).argmax(1) == y for x, y in load.evaluation
  ]
  assert found['accuracy'].value == pytest.approx(np.concatenate(hits).mean())
  assert found['accuracy'].low < load.expected['accuracy']
  assert found['accuracy'].high > load.expected['accuracy']


def test_part_of_the_stories_as_the_published_code_has_it(
  shared, published, prepared_sets
):
  load = models.workload('stories', evaluation=16, data_dir=prepared_sets)
  found = quality.evaluate(
    load.apply, load.params, load.evaluation, load.metric
  )
  forward = jax.jit(published('stories260k').forward)
  weights = flat(shared / 'stories260k/stories260k.npz')
  ((tokens, following, mask),) = load.evaluation
  log_p = np.asarray(jax.nn.log_softmax(forward(weights, tokens)))
  picked = np.take_along_axis(log_p, following[..., None], -1)[..., 0]
  loss, right = -picked[mask].mean(), log_p.argmax(-1)[mask] == following[mask]
  assert found['loss'].value == pytest.approx(loss, rel=1e-5)
  assert found['accuracy'].value == pytest.approx(right.mean(), abs=1e-4)
  assert found['perplexity'].low < load.expected['perplexity']
  assert found['perplexity'].high > load.expected['perplexity']


def test_part_of_the_pairs_as_the_published_code_has_it(
  shared, published, prepared_sets
):
  load = models.workload('minilm', evaluation=50, data_dir=prepared_sets)
  found = quality.evaluate(
    load.apply, load.params, load.evaluation, load.metric
  )
  theirs = published('minilm_sts')
  encode = jax.jit(theirs.encode)
  weights = flat(shared / 'minilm_sts/minilm_fp16.npz')
  ((ids, mask, score),) = load.evaluation
  a, b = (encode(weights, ids[:, side], mask[:, side]) for side in (0, 1))
  expected = theirs.spearman(np.asarray((a * b).sum(1)), score)
  # Neighbours may change places where cosines differ in the last bit.
  assert found['spearman'].value == pytest.approx(expected, abs=1e-3)
  assert stats.spearmanr((a * b).sum(1), score).statistic == pytest.approx(
    expected
  )


def test_short_sentences_share_narrow_batches(shared, prepared_sets):
  load = models.workload('minilm', data_dir=prepared_sets)
  widths = [ids.shape[-1] for ids, _, _ in load.evaluation]
  assert widths == sorted(widths)
  assert set(widths) == {24, 56}
  score = np.concatenate([score for _, _, score in load.evaluation])
  stored = data.load_npz(shared / 'minilm_sts/stsb_dev.npz')
  np.testing.assert_array_equal(np.sort(score), np.sort(stored['score']))
  tokens = sum(int(mask.sum()) for _, mask, _ in load.evaluation)
  assert tokens == int(stored['len_a'].sum() + stored['len_b'].sum())


def test_mobilenet_is_compared_without_labels(shared, prepared_sets):
  load = models.workload('mobilenet', evaluation=40, data_dir=prepared_sets)
  noisy = jax.tree.map(lambda p: p * 1.001, load.params)
  found = quality.compare(
    load.apply, load.params, load.apply, noisy, load.evaluation, load.metric
  )
  assert 20 < found['sqnr_db'].value < 80
  assert load.evaluation[0][0].shape == (40, 96, 96, 3)
  assert not load.expected


@pytest.mark.parametrize(
  'name', [name for name in models.WORKLOADS if not name.startswith('digits')]
)
def test_calibration_feeds_the_model(name, shared, prepared_sets):
  load = models.workload(
    name,
    calibration=12,
    evaluation=8,
    batch_size=8,
    data_dir=prepared_sets,
  )
  batches = list(load.calibration)
  assert [len(batch[0]) for batch in batches] == [6, 6]  # all of one shape
  for a, b in zip(batches, load.calibration, strict=True):
    np.testing.assert_array_equal(a[0], b[0])
  outputs = jax.eval_shape(load.apply, load.params, *load.example)
  assert outputs.shape[0] == 6
  (*inputs,) = load.evaluation[0][: len(load.example)]
  targets = load.evaluation[0][len(load.example) :]
  assert len(targets) == load.metric.targets
  for ours, theirs in zip(inputs, load.example, strict=True):
    assert ours.dtype == theirs.dtype
