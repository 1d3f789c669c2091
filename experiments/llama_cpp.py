r"""llama.cpp at the shape of a run of `experiments.generate`: the peer.

  python -m experiments.llama_cpp RUN prepare TYPE
  python -m experiments.llama_cpp RUN decode TYPE RESULT.json

`prepare` writes random weights as GGUF: the matrices of the blocks as TYPE
(F32, BF16, Q8_0, Q4_0, TQ2_0), the embedding as Q8_0 unless TYPE is a float.
`decode` measures what `experiments.decoding` does, with as many threads as
there are cores. Needs the extra `llama`.
"""

import ctypes
import importlib.metadata
import os
import pathlib
import resource
import sys
import time
from typing import Any

import numpy as np

from quantlab.runtime import files

EPSILON = 1e-5


def file_of(folder: Any, kind: str) -> Any:
  return folder / 'gguf' / f'{kind}.gguf'


def prepare(config: Any, folder: pathlib.Path, kind: str) -> None:
  """Writes the model; the numbers are random, the shapes are the run's."""
  import gguf

  path, s = file_of(folder, kind), config['model']['sizes']
  if path.exists():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix('.part')
  writer = gguf.GGUFWriter(partial, 'llama')
  head = s['dim'] // s['heads']
  writer.add_context_length(4096)
  writer.add_embedding_length(s['dim'])
  writer.add_block_count(s['blocks'])
  writer.add_feed_forward_length(s['hidden'])
  writer.add_head_count(s['heads'])
  writer.add_head_count_kv(s['kv_heads'])
  writer.add_layer_norm_rms_eps(EPSILON)
  writer.add_rope_freq_base(s.get('theta', 10000.0))
  writer.add_rope_dimension_count(head)
  writer.add_vocab_size(s['vocab'])
  writer.add_tokenizer_model('no_vocab')
  rng = np.random.default_rng(config['seed'])
  wanted = gguf.GGMLQuantizationType[kind]
  small = kind if kind in ('F32', 'BF16') else 'Q8_0'

  def matrix(name: str, out: int, size: int, as_kind=wanted) -> None:
    values = rng.standard_normal((out, size), np.float32) * size**-0.5
    coded = gguf.quants.quantize(values, as_kind)
    writer.add_tensor(f'{name}.weight', coded, raw_dtype=as_kind)

  def ones(name: str) -> None:
    writer.add_tensor(f'{name}.weight', np.ones(s['dim'], np.float32))

  d, kv, hidden = s['dim'], head * s['kv_heads'], s['hidden']
  matrix('token_embd', s['vocab'], d, gguf.GGMLQuantizationType[small])
  ones('output_norm')
  for i in range(s['blocks']):
    ones(f'blk.{i}.attn_norm')
    ones(f'blk.{i}.ffn_norm')
    for name, out, size in (
      ('attn_q', d, d),
      ('attn_k', kv, d),
      ('attn_v', kv, d),
      ('attn_output', d, d),
      ('ffn_gate', hidden, d),
      ('ffn_up', hidden, d),
      ('ffn_down', d, hidden),
    ):
      matrix(f'blk.{i}.{name}', out, size)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  partial.rename(path)


def measure(config: Any, folder: pathlib.Path, kind: str) -> dict[str, Any]:
  """Seconds of the prompt and of the tokens after it."""
  import llama_cpp as lc

  silent = lc.llama_log_callback(lambda *_: None)  # alive as long as it is set
  lc.llama_log_set(silent, ctypes.c_void_p(0))
  path = file_of(folder, kind)
  model = lc.llama_model_load_from_file(
    os.fsencode(path), lc.llama_model_default_params()
  )
  if not model:
    raise RuntimeError(f'llama.cpp cannot load {path}')
  length, count = config['prompt']['length'], config['tokens']
  options = lc.llama_context_default_params()
  options.n_ctx = length + count
  options.n_batch = options.n_ubatch = max(length, 32)
  options.n_threads = options.n_threads_batch = os.cpu_count() or 1
  context = lc.llama_init_from_model(model, options)
  vocab = config['model']['sizes']['vocab']
  rng = np.random.default_rng(config['seed'])
  prompt = [int(t) for t in rng.integers(0, vocab, length)]

  def step(tokens: list[int]) -> int:
    array = (lc.llama_token * len(tokens))(*tokens)
    if lc.llama_decode(context, lc.llama_batch_get_one(array, len(tokens))):
      raise RuntimeError('llama_decode failed')
    logits = lc.llama_get_logits_ith(context, -1)
    return int(np.argmax(np.ctypeslib.as_array(logits, (vocab,))))

  seconds: dict[str, list[float]] = {'prefill': [], 'decode': []}
  tokens: list[int] = []
  for _ in range(1 + config['repeats']):
    lc.llama_memory_clear(lc.llama_get_memory(context), True)
    clock = time.perf_counter()
    tokens = [step(prompt)]
    middle = time.perf_counter()
    while len(tokens) <= count:
      tokens.append(step(tokens[-1:]))
    seconds['prefill'].append(middle - clock)
    seconds['decode'].append(time.perf_counter() - middle)
  return {
    'prompt': length,
    'count': count,
    'tokens': tokens[:count],
    'seconds': {k: v[1:] for k, v in seconds.items()},
    'nbytes': path.stat().st_size,
    'peak_bytes': 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    'version': importlib.metadata.version('llama-cpp-python'),
  }


def main(argv: list[str]) -> None:
  folder, stage, kind = pathlib.Path(argv[1]), argv[2], argv[3]
  config = files.read_json(folder / 'config.json')
  if stage == 'prepare':
    prepare(config, folder, kind)
  else:
    files.write_json(argv[4], measure(config, folder, kind))


if __name__ == '__main__':
  main(sys.argv)
