r"""Mixed precision of MiniLM by layer-wise relevance (LRP-QViT).

  QUANTLAB_DATA=... python -m experiments.search \
    --config=configs/search/lrp_qvit.py --workdir=runs/search_lrp_qvit

The paper's objective, the sum of relevance times bits, maximal within a budget
(arXiv 2401.11243, which scores vision transformers); linear in bits, so that
sites get 2 or 8. `lrp` in its place is the noise that relevance falls on.
"""

from configs.search import minilm


def get_config():
  config = minilm.get_config()
  config.metrics = ('lrp_bits',)
  config.interactions = ()
  config.around = ()
  config.allocations = (('lrp_bits', 'dp'), ('lrp_bits', 'random'))
  config.measured = ()
  return config
