r"""Mixed precision of stories260K: weights of 2 to 8 bits in groups of 32.

  QUANTLAB_DATA=... python -m experiments.sensitivity \
    --config=configs/search/stories.py --workdir=runs/search_stories
  QUANTLAB_DATA=... python -m experiments.search \
    --config=configs/search/stories.py --workdir=runs/search_stories

Tables on 4 stories (derivatives on 1), choices judged on 12 others.
"""

from configs.search import common


def get_config():
  config = common.base('stories')
  config.calibration = 48
  config.batch_size = 4
  config.batches = 1
  config.curved = 1
  config.judged = 4
  config.choices = (
    ('/embed/', {'weight': {'format': 'int8'}}),
    ('.*', common.options(group=32, ragged=True)),
  )
  config.iterations = 4
  config.budgets = (
    'int3(group=32, ragged=True)',
    'int4(group=32, ragged=True)',
  )
  config.show = ('perplexity', 'kl_mean')
  return config
