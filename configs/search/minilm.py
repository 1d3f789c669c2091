r"""Mixed precision of MiniLM: weights of 2 to 8 bits in groups of 64.

  QUANTLAB_DATA=... python -m experiments.sensitivity \
    --config=configs/search/minilm.py --workdir=runs/search_minilm
  QUANTLAB_DATA=... python -m experiments.search \
    --config=configs/search/minilm.py --workdir=runs/search_minilm

Tables on 100 pairs of sentences (derivatives on 50), choices judged on 200
others. The exact Hessian's interactions are left out for their time.
"""

from configs.search import common


def get_config():
  config = common.base('minilm')
  config.calibration = 256
  config.curved = 1
  config.judged = 6
  config.choices = (('/embed/', None), ('/kernel$', common.options(group=64)))
  config.interactions = ('similarity',)
  config.iterations = 4
  config.budgets = ('int3(group=64)', 'int4(group=64)')
  config.seeds = 3
  config.show = ('spearman', 'similarity_error')
  return config
