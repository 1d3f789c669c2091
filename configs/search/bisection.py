r"""Mixed precision by bisection to a quality, in augmented-Hessian order.

  python -m experiments.search --config=configs/search/bisection.py \
    --workdir=runs/search_bisection
  QUANTLAB_DATA=... python -m experiments.search \
    --config=configs/search/bisection.py:resnet20 --workdir=runs/bisection20

No budget is given but a quality: rows are lowered in the order of their own and
half of their joint second-order terms (arXiv 2306.04879), and bisection finds
how many at each width keep 99 % of the float model's accuracy on the batches of
the tables; beside it in the order of traces, which know no pairs. The folder
gets bisection.json with what was measured. `:MODEL` is 'digits' (by default,
downloads nothing), 'resnet8', 'resnet20', 'minilm' or 'stories' (of their own
qualities).
"""

from configs.search import common, digits, minilm, resnet8, resnet20, stories

MODELS = {
  'digits': digits,
  'resnet8': resnet8,
  'resnet20': resnet20,
  'minilm': minilm,
  'stories': stories,
}
LOST = 0.01  # of the float model's quality


def get_config(model: str = 'digits'):
  config = common.by(MODELS[model].get_config(), 'hessian', 'quadratic')
  config.metrics = ('hessian', 'trace')
  config.interactions = ('hessian',)
  config.bisected = (('hessian', LOST), ('trace', LOST))
  config.encoders = ('rtn',)
  return config
