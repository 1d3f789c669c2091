r"""Mixed precision of stories260K: weights of 2 to 8 bits in groups of 32.

  QUANTLAB_DATA=... python -m experiments.sensitivity \
    --config=configs/search/stories.py --workdir=runs/search_stories
  QUANTLAB_DATA=... python -m experiments.search \
    --config=configs/search/stories.py --workdir=runs/search_stories

Hours on two cores, minutes on an accelerator.
"""

import ml_collections

WIDTHS = (2, 3, 4, 6, 8)


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.calibration = 48
  config.evaluation = 0  # 0: all
  config.model = 'stories'
  config.batches = 2  # labelled, to measure the tables on
  config.judged = 10  # batches up to which choices are judged; 0: all
  config.choices = (
    ('/embed/', {'weight': {'format': 'int8'}}),
    (
      '.*',
      tuple(
        {'weight': {'format': f'int{b}', 'group': 32, 'ragged': True}}
        for b in WIDTHS
      ),
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
  config.budgets = (
    'int3(group=32, ragged=True)',
    'int4(group=32, ragged=True)',
  )
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
  config.show = ('perplexity', 'kl_mean')
  return config
