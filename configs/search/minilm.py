r"""Mixed precision of MiniLM: weights of 2 to 8 bits in groups of 64.

  QUANTLAB_DATA=... python -m experiments.sensitivity \
    --config=configs/search/minilm.py --workdir=runs/search_minilm
  QUANTLAB_DATA=... python -m experiments.search \
    --config=configs/search/minilm.py --workdir=runs/search_minilm

Tables on 200 pairs of sentences (derivatives on 10), choices judged on 200
others; pairs are ordered by length, so measured and judged batches alternate.
A pair is one number: few of them say little about interactions of 185 options.
"""

from configs.search import common


def get_config():
  config = common.base('minilm')
  config.calibration = 256
  config.evaluation = 400
  config.batch_size = 50
  config.batches = 4
  config.alternate = True
  config.around = ()
  config.curved = 10
  config.choices = (('/embed/', None), ('/kernel$', common.options(group=64)))
  config.iterations = 4
  config.budgets = ('int3(group=64)', 'int4(group=64)')
  config.seeds = 3
  config.show = ('spearman', 'similarity_error')
  return config
