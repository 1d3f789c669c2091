r"""Mixed precision of weights and activations together, of 4, 6 or 8 bits.

  python -m experiments.sensitivity \
    --config=configs/search/activations.py --workdir=runs/search_activations
  QUANTLAB_DATA=... python -m experiments.search \
    --config=configs/search/activations.py:resnet8 --workdir=runs/search_act8

The activations of a site are quantized with a static range for all of its input
(asymmetric, of least error), its weight by channel. `:MODEL` is 'digits' (by
default, downloads nothing), 'resnet8' or 'resnet20'. Budgets are bit operations
(BOPs, arXiv 2011.10680): bytes do not see an activation.
"""

from configs.search import digits, resnet8, resnet20

MODELS = {'digits': digits, 'resnet8': resnet8, 'resnet20': resnet20}
BITS = ((4, 4), (4, 8), (6, 6), (8, 8))  # of the weight, and of its input


def option(weight, given):
  """A rule of a site, as a config has it."""
  return {
    'weight': {'format': f'int{weight}', 'scale': {'rule': 'mse'}},
    'input': {
      'format': f'uint{given}',
      'per': 'tensor',
      'static': True,
      'symmetric': False,
      'scale': {'rule': 'mse'},
    },
  }


def label(weight, given):
  """What such an option is called."""
  scale = 'scale=mse()'
  return (
    f"int{weight}({scale}), input uint{given}(per='tensor', symmetric=False, "
    f'static=True, {scale})'
  )


def get_config(model: str = 'digits'):
  config = MODELS[model].get_config()
  config.choices = (('/kernel$', tuple(option(*bits) for bits in BITS)),)
  config.metrics = ('loss', 'kl', 'output_mse', 'fisher', 'hessian')
  config.interactions = ('loss', 'kl', 'hessian')
  config.around = ()
  config.kinds = (('4 to 8 bits', 0),)
  config.budgets = (label(4, 8), label(6, 6))
  config.cost = 'bops'
  config.allocations = (
    ('kl', 'dp'),
    ('kl', 'quadratic'),
    ('loss', 'dp'),
    ('output_mse', 'dp'),
    ('fisher', 'dp'),
    ('hessian', 'dp'),
    ('output_mse', 'random'),
  )
  config.measured = ('kl',)
  config.encoders = ('rtn',)
  return config
