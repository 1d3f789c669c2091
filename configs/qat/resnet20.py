r"""CIFAR-10 ResNet-20 from the pretrained net: LSQ with distillation.

  QUANTLAB_DATA=... python -m experiments.qat \
    --config=configs/qat/resnet20.py --workdir=runs/qat_resnet20

5,000 training images, shifted and mirrored; the float net teaches. Weights
have a range a channel, first and last layer stay at 8 bits. `:w4a4` and
`:w2a2` train one of the two. Float 87.52 %.
"""

import ml_collections

MSE = {'scale': {'rule': 'mse'}}
W8A8 = {
  'weight': {'format': 'int8'},
  'input': {
    'format': 'int8',
    'per': 'tensor',
    'static': True,
    'symmetric': False,
  },
}


def _variant(bits, steps, rate, live):
  rule = {
    'weight': {'format': f'int{bits}'} | MSE,
    'input': {'format': f'uint{bits}', 'per': 'tensor', 'static': True} | MSE,
    'fold': not live,
  }
  ends = W8A8 | {'fold': not live}
  return {
    'name': f'w{bits}a{bits}_lsq',
    'rules': (('/(stem|head)/', ends), ('/kernel$', rule)),
    'estimator': {'weight': 'lsq', 'input': 'lsq'},
    'steps': steps,
    'optimizer': {
      'name': 'adamw',
      'learning_rate': rate,
      'schedule': 'cosine',
      'weight_decay': 1e-4,
      'freeze_ranges': 0.9,
    },
    'distill': {'weight': 0.9, 'temperature': 4.0},
    'batch_norm': live,
  }


def get_config(which=''):
  config = ml_collections.ConfigDict()
  config.task = 'resnet20'
  config.model = ml_collections.ConfigDict()
  config.seeds = (0,)
  config.vmap = False
  config.mesh = False
  config.batch_size = 128
  config.check_every = 250
  config.checked_batches = 8
  config.log_every = 25
  config.tokens = 0
  optimizer = {'name': 'adam', 'learning_rate': 1e-3}
  config.float = ml_collections.ConfigDict({'steps': 0, 'optimizer': optimizer})
  found = {
    'w4a4': _variant(4, 600, 5e-4, 0.0),
    'w2a2': _variant(2, 1100, 2e-3, 0.9),
  }
  config.variants = tuple(v for k, v in found.items() if which in ('', k))
  return config
