r"""LeNet-5 on MNIST: estimators at two bits from the pretrained net.

  QUANTLAB_DATA=... python -m experiments.qat \
    --config=configs/qat/mnist.py --workdir=runs/qat_mnist

All layers but the first and the last have two-bit weights and activations,
ranges per tensor; 10,000 training images. `:seeds` seeds, eight by default.
"""

import ml_collections

ADAM = {'name': 'adam', 'learning_rate': 1e-3, 'schedule': 'cosine'}
INNER = '/(conv1|fc0|fc1)/kernel$'
MSE = {'scale': {'rule': 'mse'}}
WEIGHT = {'format': 'int2', 'per': 'tensor'}
STATIC = {'format': 'uint2', 'per': 'tensor', 'static': True}
DYNAMIC = {'format': 'uint2', 'per': 'tensor'}
ODD = {'format': 'odd', 'bits': 2, 'per': 'tensor'}


def _variant(name, estimator, weight, inputs):
  return {
    'name': name,
    'rules': ((INNER, {'weight': weight, 'input': inputs}),),
    'estimator': estimator,
    'steps': 400,
    'optimizer': ADAM,
  }


def get_config(seeds='8'):
  config = ml_collections.ConfigDict()
  config.task = 'mnist_lenet'
  config.model = ml_collections.ConfigDict()
  config.seeds = tuple(range(int(seeds)))
  config.vmap = False  # convolutions of one seed at a time are faster
  config.mesh = False
  config.batch_size = 128
  config.check_every = 100
  config.checked_batches = 8
  config.log_every = 20
  config.tokens = 0
  config.float = ml_collections.ConfigDict({'steps': 0, 'optimizer': ADAM})
  config.variants = (
    _variant('w2a2_minmax', 'clipped_ste', WEIGHT, DYNAMIC),
    _variant(
      'w2a2_pact_dorefa', {'weight': 'dorefa', 'input': 'pact'}, ODD, STATIC
    ),
    _variant('w2a2_lsq', 'lsq', WEIGHT | MSE, STATIC | MSE),
    _variant(
      'w2a2_ewgs',
      {'name': 'ewgs', 'delta': 0.2},
      WEIGHT | MSE,
      STATIC | MSE,
    ),
  )
  return config
