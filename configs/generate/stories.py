r"""Text of stories260K, and the same text by the kernels' definitions.

python -m experiments.generate --config=configs/generate/stories.py \
    --workdir=runs/generate_stories
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
      'repeats': 3,
      'rounds': 1,
      'floats': ('float32',),
      'variants': (
        variant('w8a8', format='int8'),
        # A scale for each channel: sums of groups are rounded in the order of
        # the backend, and one flipped code may turn a sentence.
        variant('w4a8', format='int4', symmetric=False),
      ),
      'check': True,  # the text by the definitions, too
      'llama_cpp': (),
    }
  )
