r"""Mixed precision of the small CNN on digits.

  python -m experiments.sensitivity \
    --config=configs/search/digits.py --workdir=runs/search_digits
  python -m experiments.search \
    --config=configs/search/digits.py --workdir=runs/search_digits

Downloads nothing. A few minutes on two cores.
"""

import ml_collections

WIDTHS = (2, 3, 4, 6, 8)


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.calibration = 0  # 0: the workload's own choice
  config.evaluation = 0  # 0: all
  config.model = 'digits_cnn'
  config.batches = 2  # labelled, to measure the tables on
  config.judged = 0  # batches up to which choices are judged; 0: all
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
  config.random_plans = 40
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
  config.seeds = 1
  config.show = ('accuracy', 'cross_entropy', 'kl_mean')
  return config
