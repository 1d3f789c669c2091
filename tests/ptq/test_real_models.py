"""What 8 and 4 bits cost real pretrained models (floors with a margin).

The full tables are made by `configs/ptq/*.py` and kept in
`experiments/results/`; these are the models that take seconds.
"""

import pytest

import quantlab as ql
from quantlab import data, models, quality

STATIC = {'per': 'tensor', 'static': True, 'symmetric': False}
W8A8 = ql.rule(weight=ql.int8(), input=ql.int8(**STATIC))
W4A4 = ql.rule(
  weight=ql.int4(scale=ql.scales.mse()),
  input=ql.int4(**STATIC, scale=ql.scales.mse()),
)

pytestmark = [
  pytest.mark.shared,
  pytest.mark.skipif(
    data.shared_dir() is None,
    reason='the folder of real models is absent (QUANTLAB_DATA)',
  ),
]


def accuracy(work, rule):
  model = ql.ptq(work.apply, work.params, {'/kernel$': rule}, work.calibration)
  found = quality.evaluate(
    model.apply, model.params, work.evaluation, work.metric
  )
  return found['accuracy'].value


@pytest.fixture(scope='module')
def lenet():
  return models.workload('mnist_lenet', calibration=512)


def test_lenet_at_8_bits_loses_nothing(lenet):
  assert accuracy(lenet, W8A8) >= 0.9885


def test_lenet_at_4_bits_in_all_layers(lenet):
  assert accuracy(lenet, W4A4) >= 0.982


def test_resnet8_at_8_bits_with_folded_batch_norms():
  work = models.workload('resnet8')
  assert accuracy(work, W8A8) >= 0.750
