r"""Greedy text of a Llama: what it writes, how fast, in how much memory.

  python -m experiments.generate --config=configs/generate/llama.py \
    --workdir=runs/generate_stories
  pip install -e '.[llama]'
  python -m experiments.generate --config=configs/generate/llama.py:1b \
    --workdir=runs/generate_1b

stories260K (the files of `QUANTLAB_DATA`), its text by the kernels and by their
definitions; or the shape of Llama 3.2 1B with random weights, beside llama.cpp
at the same shape, bits and threads: 12 GB of disk, 10 GB of memory while the
weights are made.
"""

from ml_collections import config_dict

A8 = {'format': 'int8', 'per': 'token'}


def _variant(name, **weight):
  """Activations of 8 bits; the embedding, which is also the head, too."""
  return {
    'name': name,
    'rules': (
      ('/embed/', {'weight': {'format': 'int8'}, 'input': A8}),
      ('.*', {'weight': weight, 'input': A8}),
    ),
  }


STORIES = {
  'model': {
    'weights': 'stories260k/stories260k.npz',
    'vocabulary': 'stories260k/tokenizer.json',
    'sizes': {
      'vocab': 512,
      'dim': 64,
      'hidden': 172,
      'blocks': 5,
      'heads': 8,
      'kv_heads': 4,
    },
  },
  'prompt': {'tokens': (1,), 'length': 0},
  'tokens': 200,
  'rounds': 1,
  'floats': ('float32',),
  'variants': (
    _variant('w8a8', format='int8'),
    # A scale for each channel: sums of groups are rounded in the order of the
    # backend, and one flipped code may turn a sentence.
    _variant('w4a8', format='int4', symmetric=False),
  ),
  'check': True,  # the text by the definitions, too
  'llama_cpp': (),
}
LLAMA_1B = {
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
  'rounds': 1,
  'floats': ('float32', 'bfloat16'),
  'variants': (
    _variant('w8a8', format='int8'),
    _variant('w4a8', format='int4', group=32),
    _variant('ternary', format='ternary'),
  ),
  'check': False,
  # Types of the matrices of blocks; the embedding is Q8_0 beside them.
  'llama_cpp': ('F32', 'BF16', 'Q8_0', 'Q4_0', 'TQ2_0'),
}
MODELS = {'stories': STORIES, '1b': LLAMA_1B}


def get_config(model: str = 'stories') -> config_dict.ConfigDict:
  """One of the two models."""
  if model not in MODELS:
    raise ValueError(f'unknown model {model!r}; known: {sorted(MODELS)}')
  return config_dict.ConfigDict({'seed': 0, 'repeats': 3} | MODELS[model])
