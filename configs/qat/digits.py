r"""A perceptron on scikit-learn's digits: estimators at two bits, eight seeds.

  python -m experiments.qat --config=configs/qat/digits.py \
    --workdir=runs/qat_digits

64-32-32-32-10; all layers but the first have two-bit weights and activations,
ranges per tensor. Expect LSQ and EWGS over PACT with DoReFa over plain
straight-through with min-max ranges, as the papers have it.
"""

import ml_collections

ADAM = {'name': 'adam', 'learning_rate': 3e-3, 'schedule': 'cosine'}
INNER = '/layer_[123]/kernel$'


def get_config():
  config = ml_collections.ConfigDict()
  config.task = 'digits_mlp'
  config.model = ml_collections.ConfigDict({'hidden': (32, 32, 32)})
  config.seeds = tuple(range(8))
  config.vmap = True  # all seeds as one program
  config.mesh = False
  config.batch_size = 128
  config.check_every = 100
  config.checked_batches = 2
  config.log_every = 20
  config.tokens = 0
  config.float = ml_collections.ConfigDict({'steps': 600, 'optimizer': ADAM})

  def variant(name, estimator, weight, inputs):
    return {
      'name': name,
      'rules': ((INNER, {'weight': weight, 'input': inputs}),),
      'estimator': estimator,
      'steps': 600,
      'optimizer': ADAM,
    }

  def both(bits):
    weight = {'format': f'int{bits}', 'per': 'tensor'}
    static = {'format': f'uint{bits}', 'per': 'tensor', 'static': True}
    dynamic = {'format': f'uint{bits}', 'per': 'tensor'}
    mse = {'scale': {'rule': 'mse'}}
    odd = {'format': 'odd', 'bits': bits, 'per': 'tensor'}
    pact = {'weight': 'dorefa', 'input': 'pact'}
    return (
      variant(f'w{bits}a{bits}_minmax', 'clipped_ste', weight, dynamic),
      variant(f'w{bits}a{bits}_pact_dorefa', pact, odd, static),
      variant(f'w{bits}a{bits}_lsq', 'lsq', weight | mse, static | mse),
      variant(
        f'w{bits}a{bits}_ewgs',
        {'name': 'ewgs', 'delta': 0.2},
        weight | mse,
        static | mse,
      ),
    )

  config.variants = (*both(2), *both(4))
  return config
