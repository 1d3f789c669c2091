r"""Small character models on the sources of Python's standard library.

  python -m experiments.testbed --config=configs/testbeds/text.py \
    --out=tests/data/text_model.npz
  python -m experiments.testbed --config=configs/testbeds/text.py:llama \
    --out=tests/data/llama_model.npz

The first has LayerNorms with biases and learned positions, the second RMSNorm,
RoPE and SwiGLU. Three minutes each on two cores; 1.7 to 2.0 nats a character on
held-out files. The committed fixtures were made by it; another Python's library
gives other text.
"""

import ml_collections

MODELS = {
  'transformer': {'vocab': 96, 'dim': 64, 'heads': 4, 'blocks': 3},
  'llama': {
    'vocab': 96,
    'dim': 64,
    'hidden': 160,
    'blocks': 3,
    'heads': 4,
    'kv_heads': 4,
    'tied': False,  # a tied output matrix takes no rotation (recipes B7)
  },
}


def get_config(bed: str = 'transformer'):
  return ml_collections.ConfigDict(
    {
      'bed': bed,
      'seed': 0,
      'model': MODELS[bed],
      'context': 96,
      'files': 80,  # of the standard library, the last tenth held out
      'steps': 1000,
      'batch': 24,
      'learning_rate': 3e-3,
      'keep': 64,  # held-out sequences in the fixture; as many for calibration
    }
  )
