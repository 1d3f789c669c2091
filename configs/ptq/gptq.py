r"""GPTQ beside round to nearest, on a real pretrained model.

  QUANTLAB_DATA=... python -m experiments.ptq \
    --config=configs/ptq/gptq.py:resnet20 --workdir=runs/gptq_resnet20_0

Also `resnet8`, `minilm` and `stories`. `--config.seed=1` draws another
calibration set. Each method stands beside the plain grid and the best one that
round to nearest has.
"""

import ml_collections

MSE = {'rule': 'mse', 'p': 2.4}
INT8 = {'weight': {'format': 'int8'}}
A8_TOKEN = {'format': 'int8', 'per': 'token'}
A8 = {'format': 'int8', 'per': 'tensor', 'static': True, 'symmetric': False}
A4 = {
  'format': 'int4',
  'per': 'tensor',
  'static': True,
  'symmetric': False,
  'scale': {'rule': 'mse'},
}
A4_TOKEN = {'format': 'int4', 'per': 'token', 'symmetric': False}


def cnn(model: str):
  """First and last layer at 8 bits, the others with 4-bit weights."""

  def rules(weight, given):
    return (
      ('(stem|head)/', INT8 | {'input': A8}),
      ('/kernel$', {'weight': weight, 'input': given}),
    )

  w4, w4_mse = {'format': 'int4'}, {'format': 'int4', 'scale': MSE}
  variants = []
  for name, given in (('w4a8', A8), ('w4a4', A4)):
    variants += [
      {'name': f'{name}_rtn_absmax', 'rules': rules(w4, given)},
      {'name': f'{name}_rtn_mse', 'rules': rules(w4_mse, given)},
      {
        'name': f'{name}_gptq',
        'rules': rules(w4_mse, given),
        'transform': 'gptq',
      },
      {
        'name': f'{name}_gptq_bias',
        'rules': rules(w4_mse, given),
        'transform': ('gptq', 'bias_correction'),
      },
    ]
  return (model,), 512, variants


def minilm():
  """Weights in groups of 64; the embedding stays in float."""
  plain = {'format': 'int4', 'group': 64, 'symmetric': False}
  best = plain | {'scale': MSE}

  def rules(weight, given=None):
    roles = {'weight': weight} | ({'input': given} if given else {})
    return (('/embed/', None), ('/kernel$', roles))

  rotated = ('rotate', 'gptq')
  variants = [
    {'name': 'w4_rtn', 'rules': rules(plain)},
    {'name': 'w4_rtn_mse', 'rules': rules(best)},
    {'name': 'w4_gptq', 'rules': rules(best), 'transform': 'gptq'},
    {'name': 'w4a8_rtn_mse', 'rules': rules(best, A8_TOKEN)},
    {
      'name': 'w4a8_gptq',
      'rules': rules(best, A8_TOKEN),
      'transform': 'gptq',
    },
    {'name': 'w4a4_rtn_mse', 'rules': rules(best, A4_TOKEN)},
    {
      'name': 'w4a4_rotate_gptq',
      'rules': rules(best, A4_TOKEN),
      'transform': rotated,
    },
  ]
  return ('minilm',), 256, variants


def stories():
  """Weights in groups of 32, the embedding at 8 bits."""
  variants = []
  # At three bits second order likes ranges that clip more than rounding does.
  for bits, p in ((4, 2.4), (3, 2.0)):
    plain = {'format': f'int{bits}', 'group': 32, 'ragged': True}
    best = plain | {'symmetric': False, 'scale': MSE}
    clipped = best | {'scale': {'rule': 'mse', 'p': p}}

    def rules(weight):
      return (('/embed/', INT8), ('.*', {'weight': weight}))

    variants += [
      {'name': f'w{bits}_rtn', 'rules': rules(plain)},
      {'name': f'w{bits}_rtn_mse', 'rules': rules(best)},
      {'name': f'w{bits}_gptq', 'rules': rules(clipped), 'transform': 'gptq'},
    ]
  return ('stories',), 48, variants


MODELS = {
  'resnet20': lambda: cnn('resnet20_jpeg'),
  'resnet8': lambda: cnn('resnet8'),
  'minilm': minilm,
  'stories': stories,
}


def get_config(model: str = 'resnet20'):
  """The variants of one model."""
  if model not in MODELS:
    raise ValueError(f'unknown model {model!r}; known: {sorted(MODELS)}')
  names, calibration, variants = MODELS[model]()
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.calibration = calibration
  config.evaluation = 0  # 0: all
  config.models = names
  config.variants = tuple(variants)
  return config
