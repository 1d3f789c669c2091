r"""Mixed precision of MiniLM by layer-wise relevance (LRP-QViT).

  QUANTLAB_DATA=... python -m experiments.search \
    --config=configs/search/lrp_qvit.py --workdir=runs/search_lrp_qvit

The paper's objective, the sum of relevance times bits, maximal within a budget
(arXiv 2401.11243, which scores vision transformers); linear in bits, so that
sites get 2 or 8. `lrp` in its place is the noise that relevance falls on.
"""

from configs.search import common, minilm


def get_config():
  return common.by(minilm.get_config(), 'lrp_bits', 'dp')
