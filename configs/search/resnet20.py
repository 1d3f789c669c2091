r"""Mixed precision of CIFAR-10 ResNet-20: weights of 2 to 8 bits, per channel.

  QUANTLAB_DATA=... python -m experiments.sensitivity \
    --config=configs/search/resnet20.py --workdir=runs/search_resnet20
  QUANTLAB_DATA=... python -m experiments.search \
    --config=configs/search/resnet20.py --workdir=runs/search_resnet20

Hours on two cores, minutes on an accelerator.
"""

import ml_collections

WIDTHS = (2, 3, 4, 6, 8)


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.calibration = 512
  config.evaluation = 0  # 0: all
  config.model = 'resnet20_jpeg'
  config.batches = 2  # labelled, to measure the tables on
  config.judged = 12  # batches up to which choices are judged; 0: all
  config.choices = (
    ('/kernel$', tuple({'weight': {'format': f'int{b}'}} for b in WIDTHS)),
  )
  config.metrics = (
    'loss',
    'similarity',
    'kl',
    'output_mse',
    'weight_error',
    'fisher',
    'hessian',
    'trace',
    'eigenvalue',
    'lrp',
  )
  config.interactions = True
  config.probes = 16
  config.iterations = 10
  config.random_plans = 100
  config.budgets = ('int3', 'int4')
  config.allocations = (
    ('kl', 'dp'),
    ('loss', 'dp'),
    ('similarity', 'dp'),
    ('output_mse', 'dp'),
    ('fisher', 'dp'),
    ('hessian', 'dp'),
    ('hessian', 'quadratic'),
    ('trace', 'dp'),
    ('eigenvalue', 'dp'),
    ('lrp', 'dp'),
    ('weight_error', 'dp'),
    ('output_mse', 'greedy'),
    ('output_mse', 'random'),
  )
  config.encoders = ('rtn', 'gptq')
  config.seeds = 5
  config.show = ('accuracy', 'cross_entropy', 'kl_mean')
  return config
