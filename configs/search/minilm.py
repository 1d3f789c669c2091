r"""Mixed precision of MiniLM: weights of 2 to 8 bits in groups of 64.

  QUANTLAB_DATA=... python -m experiments.sensitivity \
    --config=configs/search/minilm.py --workdir=runs/search_minilm
  QUANTLAB_DATA=... python -m experiments.search \
    --config=configs/search/minilm.py --workdir=runs/search_minilm

Hours on two cores, minutes on an accelerator.
"""

import ml_collections

WIDTHS = (2, 3, 4, 6, 8)


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.calibration = 256
  config.evaluation = 0  # 0: all
  config.model = 'minilm'
  config.batches = 2  # labelled, to measure the tables on
  config.judged = 8  # batches up to which choices are judged; 0: all
  config.choices = (
    ('/embed/', None),
    (
      '/kernel$',
      tuple({'weight': {'format': f'int{b}', 'group': 64}} for b in WIDTHS),
    ),
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
  config.budgets = ('int3(group=64)', 'int4(group=64)')
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
  config.show = ('spearman', 'similarity_error')
  return config
