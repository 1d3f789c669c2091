"""A config of seconds: two seeds of a small perceptron."""

import ml_collections

ADAM = {'name': 'adam', 'learning_rate': 1e-2, 'schedule': 'cosine'}
W2 = {'format': 'int2', 'per': 'tensor', 'scale': {'rule': 'mse'}}
A4 = {'format': 'uint4', 'per': 'tensor', 'static': True}
LSQ = {
  'name': 'w2a4',
  'rules': (('/layer_1/kernel$', {'weight': W2, 'input': A4}),),
  'estimator': 'lsq',
  'steps': 60,
  'optimizer': ADAM | {'freeze_ranges': 0.5},
  'distill': {'weight': 0.5, 'temperature': 2.0},
}
TERNARY = {
  'format': 'ternary',
  'per': 'tensor',
  'scale': {'rule': 'absmean'},
}
WIDE = {
  'name': 'ternary_wide',
  'rules': (
    (
      '/kernel$',
      {'weight': TERNARY, 'input': {'format': 'int8', 'per': 'token'}},
    ),
  ),
  'estimator': 'ste',
  'start': 'scratch',
  'warm_up': 0.2,
  'model': {'hidden': (48,), 'norm': True},
  'steps': 60,
  'optimizer': ADAM,
}

ADAPTED = {
  'name': 'ternary_lora',
  'rules': (('/layer_0/kernel$', {'weight': TERNARY}),),
  'lora': {'pattern': '/kernel$', 'rank': 4},
  'steps': 60,
  'optimizer': ADAM,
}


def get_config(which='all'):
  """All variants, 'short' without the last, or 'mesh': over all devices."""
  mesh = which == 'mesh'
  config = ml_collections.ConfigDict()
  config.task = 'digits_mlp'
  config.model = ml_collections.ConfigDict({'hidden': (24,)})
  config.seeds = (0,) if mesh else (0, 1)
  config.vmap = not mesh
  config.mesh = mesh
  config.batch_size = 64
  config.check_every = 20
  config.checked_batches = 1
  config.log_every = 5
  config.tokens = 0
  steps = 0 if mesh else 60
  config.float = ml_collections.ConfigDict({'steps': steps, 'optimizer': ADAM})
  config.variants = (LSQ, WIDE, ADAPTED) if which == 'all' else (LSQ,)
  return config
