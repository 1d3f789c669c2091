r"""A perceptron on scikit-learn's digits: estimators at two bits, eight seeds.

  python -m experiments.qat --config=configs/qat/digits.py \
    --workdir=runs/qat_digits

64-32-32-32-10; all layers but the first have two-bit weights and activations,
ranges per tensor. Expect LSQ and EWGS over PACT with DoReFa over plain
straight-through with min-max ranges, as the papers have it. `:states` trains
a wider net in float with the states of Adam in 32 and in 8 bits.
"""

import ml_collections

ADAM = {'name': 'adam', 'learning_rate': 3e-3, 'schedule': 'cosine'}
INNER = '/layer_[123]/kernel$'


def _variant(name, estimator, weight, inputs):
  return {
    'name': name,
    'rules': ((INNER, {'weight': weight, 'input': inputs}),),
    'estimator': estimator,
    'steps': 600,
    'optimizer': ADAM,
  }


def _both(bits):
  """Weights and activations of so many bits, by four estimators."""
  weight = {'format': f'int{bits}', 'per': 'tensor'}
  static = {'format': f'uint{bits}', 'per': 'tensor', 'static': True}
  dynamic = {'format': f'uint{bits}', 'per': 'tensor'}
  mse = {'scale': {'rule': 'mse'}}
  odd = {'format': 'odd', 'bits': bits, 'per': 'tensor'}
  pact = {'weight': 'dorefa', 'input': 'pact'}
  ewgs = {'name': 'ewgs', 'delta': 0.2}
  return (
    _variant(f'w{bits}a{bits}_minmax', 'clipped_ste', weight, dynamic),
    _variant(f'w{bits}a{bits}_pact_dorefa', pact, odd, static),
    _variant(f'w{bits}a{bits}_lsq', 'lsq', weight | mse, static | mse),
    _variant(f'w{bits}a{bits}_ewgs', ewgs, weight | mse, static | mse),
  )


def get_config(which=''):
  states = which == 'states'
  config = ml_collections.ConfigDict()
  config.task = 'digits_mlp'
  hidden = (512, 512) if states else (32, 32, 32)
  config.model = ml_collections.ConfigDict({'hidden': hidden})
  config.seeds = tuple(range(8))
  config.vmap = True  # all seeds as one program
  config.mesh = False
  config.batch_size = 128
  config.check_every = 100
  config.checked_batches = 2
  config.log_every = 20
  config.tokens = 0
  adam = ADAM | {'learning_rate': 1e-3} if states else ADAM
  config.float = ml_collections.ConfigDict({'steps': 600, 'optimizer': adam})
  config.variants = (*_both(2), *_both(4))
  if states:
    eight = {'name': 'adam_8bit', 'start': 'scratch', 'steps': 600}
    config.variants = (eight | {'optimizer': adam | {'state_bits': 8}},)
  return config
