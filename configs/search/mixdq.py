r"""Mixed precision of stories260K with a metric for each kind of site (MixDQ).

  QUANTLAB_DATA=... python -m experiments.search \
    --config=configs/search/mixdq.py --workdir=runs/search_mixdq

Attention is scored by the divergence of the next token's distribution, the
feed-forward layers by the noise in the outputs; each group is an integer
program of its own, and how the bytes are divided between them is measured
(arXiv 2405.17873, which scores images). Beside it the same tables pooled.
"""

from configs.search import stories

GROUPS = (('/attention/', 'kl'), ('/mlp/', 'output_mse'))


def get_config():
  config = stories.get_config()
  config.metrics = ('kl', 'output_mse')
  config.interactions = ()
  config.around = ()
  config.groups = GROUPS
  config.allocations = (('kl', 'dp'), ('output_mse', 'dp'))
  config.measured = ()
  config.encoders = ('rtn',)
  return config
