r"""Tokens per second of a Llama of the 1B class, with random weights.

  pip install -e '.[llama]'
  python -m experiments.generate --config=configs/generate/llama1b.py \
    --workdir=runs/generate_llama1b

The shape of Llama 3.2 1B. Beside it llama.cpp, at the same shape and the same
number of threads. 12 GB of disk, 10 GB of memory while the weights are made.
"""

from ml_collections import config_dict

A8 = {'format': 'int8', 'per': 'token'}


def get_config() -> config_dict.ConfigDict:
  embedding = ('/embed/', {'weight': {'format': 'int8'}, 'input': A8})

  def variant(name, **weight):
    return {
      'name': name,
      'rules': (embedding, ('.*', {'weight': weight, 'input': A8})),
    }

  return config_dict.ConfigDict(
    {
      'seed': 0,
      'model': {
        'weights': 'random',
        'sizes': {
          'vocab': 128256,
          'dim': 2048,
          'hidden': 8192,
          'blocks': 16,
          'heads': 32,
          'kv_heads': 8,
          'theta': 500000.0,
        },
      },
      'prompt': {'tokens': (), 'length': 64},
      'tokens': 32,
      'repeats': 3,
      'rounds': 2,
      'floats': ('float32', 'bfloat16'),
      'variants': (
        variant('w8a8', format='int8'),
        variant('w4a8', format='int4', group=32),
        variant('ternary', format='ternary'),
      ),
      'check': False,
      # Types of the matrices of blocks; the embedding is Q8_0 beside them.
      'llama_cpp': ('F32', 'BF16', 'Q8_0', 'Q4_0', 'TQ2_0'),
    }
  )
