r"""A character language model: float, W4A8, and BitNet b1.58 four ways.

  QUANTLAB_DATA=... python -m experiments.qat \
    --config=configs/qat/bitnet_lm.py --workdir=runs/qat_lm

One million parameters, tinyshakespeare, the last tenth held out; three seeds.
Embedding, head and norms stay in float. `:large` is for a GPU: 25 million
parameters, longer contexts.
"""

import ml_collections

INT8_TOKEN = {'format': 'int8', 'per': 'token'}
INSIDE = '/blocks/.*/(w[qkvo]|gate|up|down)$'
TWO_STAGE = {
  'name': 'adamw',
  'schedule': 'two_stage',
  'warm_up': 0.05,
  'weight_decay': 0.1,
  'clip': 1.0,
  'options': {'b2': 0.95},
}
COSINE = TWO_STAGE | {'schedule': 'cosine', 'learning_rate': 4e-3}


def _ternary(measure):
  weight = {'format': 'ternary', 'per': 'tensor', 'scale': {'rule': measure}}
  return ((INSIDE, {'weight': weight, 'input': INT8_TOKEN}),)


def _bitnet(name, measure='absmean', **fields):
  return {
    'name': name,
    'rules': _ternary(measure),
    'estimator': 'ste',
    'start': 'scratch',
    'warm_up': 0.1,
    'optimizer': TWO_STAGE | {'learning_rate': 8e-3},
  } | fields


def get_config(size=''):
  large = size == 'large'
  config = ml_collections.ConfigDict()
  config.task = 'character_lm'
  sizes = {'dim': 512, 'blocks': 8, 'heads': 8, 'context': 256, 'scanned': True}
  config.model = ml_collections.ConfigDict(
    sizes if large else {'dim': 128, 'blocks': 5, 'heads': 4, 'context': 128}
  )
  config.seeds = (0, 1, 2)
  config.vmap = False
  config.mesh = False
  config.batch_size = 64 if large else 16
  config.check_every = 125
  config.checked_batches = 1
  config.log_every = 20
  config.tokens = 256
  steps = {'steps': 4000 if large else 250}
  config.float = ml_collections.ConfigDict({'optimizer': COSINE} | steps)
  w4a8 = {
    'weight': {'format': 'int4', 'scale': {'rule': 'mse'}},
    'input': INT8_TOKEN,
  }
  config.variants = (
    {
      'name': 'w4a8',
      'rules': ((INSIDE, w4a8),),
      'estimator': {'weight': 'lsq', 'input': 'clipped_ste'},
      'start': 'scratch',
      'optimizer': COSINE,
    }
    | steps,
    _bitnet('bitnet_mean', **steps),
    _bitnet('bitnet_median', 'absmedian', **steps),
    _bitnet('bitnet_wide', model={'dim': 1024 if large else 256}, **steps),
  )
  return config
