"""The two digit networks: trained in seconds, well, and always the same."""

import jax
import numpy as np
import pytest

from quantlab import data, models, quality
from quantlab.models import digits


@pytest.mark.parametrize(
  ('name', 'least'), [('digits_cnn', 0.98), ('digits_vit', 0.95)]
)
def test_learns_the_digits(name, least):
  load = models.workload(name)
  found = quality.evaluate(
    load.apply, load.params, load.evaluation, load.metric
  )
  assert found['accuracy'].n == 500
  assert found['accuracy'].value >= least == load.expected['accuracy']
  inputs = [x for (x,) in load.calibration]
  assert [len(x) for x in inputs] == [125, 125]
  # Calibration sees training images only.
  test = {x.tobytes() for x, _ in load.evaluation for x in x}
  assert not test & {x.tobytes() for batch in inputs for x in batch}


@pytest.mark.parametrize(
  'model', [digits.Cnn((4, 4)), digits.Vit(dim=8, blocks=1)]
)
def test_the_seed_decides_every_bit(model):
  first, second, other = (
    digits.train_digits(model, seed, epochs=1) for seed in (3, 3, 4)
  )
  same = jax.tree.map(np.array_equal, first, second)
  assert all(jax.tree.leaves(same))
  differs = jax.tree.map(np.array_equal, first, other)
  assert not all(jax.tree.leaves(differs))


def test_inference_leaves_the_statistics_alone():
  model = digits.Cnn((4, 4))
  x = digits.preprocess(data.digits().test_x[:8])
  variables = jax.jit(model.init)(jax.random.key(0), x)
  together = model.apply(variables, x)
  alone = np.concatenate(
    [model.apply(variables, x[i : i + 1]) for i in range(8)]
  )
  np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


def test_preprocessing_normalises():
  x = digits.preprocess(data.digits().train_x)
  assert x.dtype == np.float32
  assert abs(x.mean()) < 1e-3
  assert abs(x.std() - 1) < 1e-3


def test_unknown_workloads_get_a_hint():
  with pytest.raises(ValueError, match="Did you mean 'resnet20_jpeg'"):
    models.workload('resnet20_jpg')


def test_a_workload_without_its_folder_says_so(monkeypatch):
  monkeypatch.setenv('QUANTLAB_DATA', '')
  with pytest.raises(FileNotFoundError, match='QUANTLAB_DATA'):
    models.workload('resnet8')
