r"""BitNet b1.58 Reloaded on digits: width, scale and learning rate.

  python -m experiments.qat --config=configs/qat/bitnet_vision.py \
    --workdir=runs/qat_bitnet_vision

A perceptron with a norm in every layer, 64-w-w-10, all of it ternary with
8-bit activations; eight seeds. `:vit` is a small vision transformer, its
patches and head in float; `:rates` sweeps learning rate and weight decay.
"""

import ml_collections

INT8_TOKEN = {'format': 'int8', 'per': 'token'}
PERCEPTRON = '/layer_\\d+/kernel$'
TRANSFORMER = '/blocks/.*/(w[qkvo]|gate|up|down)$'


def _optimizer(rate, decay=0.0):
  return {
    'name': 'adamw',
    'learning_rate': rate,
    'schedule': 'cosine',
    'weight_decay': decay,
  }


def _ternary(name, inside, measure='absmean', rate=1e-2, decay=0.0, **fields):
  weight = {'format': 'ternary', 'per': 'tensor', 'scale': {'rule': measure}}
  return {
    'name': name,
    'rules': ((inside, {'weight': weight, 'input': INT8_TOKEN}),),
    'estimator': 'ste',
    'start': 'scratch',
    'warm_up': 0.1,
    'steps': 800,
    'optimizer': _optimizer(rate, decay),
  } | fields


def _float(name, rate, decay=0.0, **fields):
  return {
    'name': name,
    'start': 'scratch',
    'steps': 800,
    'optimizer': _optimizer(rate, decay),
  } | fields


def _perceptrons():
  found = []
  for width in (16, 32, 64):
    model = {'model': {'hidden': (width, width), 'norm': True}}
    found += [
      _float(f'float_{width}', 1e-2, **model),
      _ternary(f'mean_{width}', PERCEPTRON, **model),
      _ternary(f'median_{width}', PERCEPTRON, 'absmedian', **model),
    ]
  return tuple(found)


def _rates():
  found = []
  for rate in (1e-4, 1e-3, 1e-2):
    for decay in (0.0, 0.01, 0.1):
      name = f'lr{rate:g}_wd{decay:g}'
      found += [
        _float(f'float_{name}', rate, decay),
        _ternary(f'mean_{name}', PERCEPTRON, rate=rate, decay=decay),
      ]
  return tuple(found)


def _transformers():
  wide = {'model': {'dim': 64}}
  return (
    _ternary('mean', TRANSFORMER, rate=5e-3),
    _ternary('median', TRANSFORMER, 'absmedian', rate=5e-3),
    _ternary('mean_wide', TRANSFORMER, rate=5e-3, **wide),
  )


def get_config(which=''):
  config = ml_collections.ConfigDict()
  vit = which == 'vit'
  config.task = 'bitnet_vit' if vit else 'digits_mlp'
  config.model = ml_collections.ConfigDict(
    {'dim': 32, 'blocks': 2} if vit else {'hidden': (32, 32), 'norm': True}
  )
  config.seeds = tuple(range(3 if vit else 8))
  config.vmap = True
  config.mesh = False
  config.batch_size = 128
  config.check_every = 200
  config.checked_batches = 2
  config.log_every = 40
  config.tokens = 0
  rate = 5e-3 if vit else 1e-2
  config.float = ml_collections.ConfigDict(
    {'steps': 800, 'optimizer': _optimizer(rate)}
  )
  config.variants = {
    '': _perceptrons,
    'vit': _transformers,
    'rates': _rates,
  }[which]()
  return config
