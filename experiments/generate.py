r"""Greedy generation: tokens per second, memory, and the text.

  python -m experiments.generate --config=configs/generate/llama.py \
    --workdir=runs/generate_stories

Quantizes a Llama in every variant of the config, then decodes with each in
processes of their own, in turn, and writes `generate.json`: seconds, tokens per
second with their spread, bytes of the parameters, peak memory of a process that
loads and decodes. Where the config asks for it, every text is made again by the
definitions of the kernels and must be the same; and llama.cpp stands beside, at
the same shape. The same command again goes on where it was stopped.
"""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import rich
from absl import app, flags
from ml_collections import config_flags
from rich import box
from rich import table as rich_table

from experiments import command_line, decoding, llama_cpp, variants
from experiments.benchmarks import timing
from quantlab import data, runtime
from quantlab.runtime import files

OURS, PEER = 'experiments.decoding', 'experiments.llama_cpp'


def run(config: Any, workdir: str) -> dict[str, Any]:
  """Runs a config in a folder; returns what `generate.json` holds.

  Raises:
    ConfigError: a variant cannot be understood.
    RuntimeError: a process failed, or a text is not that of the definitions.
  """
  names = [*config.floats, *(v.name for v in variants.resolve(config.variants))]
  if unknown := set(config.floats) - set(decoding.FLOATS):
    raise variants.ConfigError(
      f'unknown floats {sorted(unknown)}; known: {decoding.FLOATS}'
    )
  if config.model.weights != 'random':
    data.require(config.model.weights)  # says what is missing
  jobs = [(OURS, n) for n in names] + [(PEER, k) for k in config.llama_cpp]
  with runtime.Workdir(workdir, config.to_dict(), seed=config.seed) as folder:
    for module, name in runtime.track(jobs, 'preparing'):
      if not _prepared(folder.path, module, name).exists():
        _start(module, folder.path, 'prepare', name)
    rounds = [(i, *job) for i in range(config.rounds) for job in jobs]
    for i, module, name in runtime.track(rounds, 'decoding'):
      _measure(folder, module, name, 'decode', f'{i}_{name}.json')
    if config.check:
      for name in names[len(config.floats) :]:
        _measure(folder, OURS, name, 'reference', f'reference_{name}.json')
    found = {
      ('llama.cpp ' if module == PEER else '') + name: _summary(
        [
          folder.read_json(f'measured/{i}_{name}.json')
          for i in range(config.rounds)
        ]
      )
      for module, name in jobs
    }
    if config.check:
      _same_texts(folder, names[len(config.floats) :])
    result = {
      'config': config.to_dict(),
      **runtime.environment(),
      'cores': os.cpu_count(),
      'checked': bool(config.check),
      'contestants': found,
    }
    folder.write_json('generate.json', result)
    for name, values in found.items():
      rate = values['tokens_per_second']['median']
      folder.metrics.record(f'generate/{name}', {'tokens_per_second': rate})
    rich.print(table(result))
    if vocabulary := config.model.get('vocabulary'):
      for name in names:
        print(f'\n{name}: {_text(vocabulary, found[name]["tokens"])}')
  return result


def _prepared(folder, module: str, name: str):
  return (
    llama_cpp.file_of(folder, name)
    if module == PEER
    else folder / 'checkpoints' / name
  )


def _measure(folder, module: str, name: str, stage: str, result: str) -> None:
  """One stage whose result is a file; nothing where it is there."""
  out = folder.path / 'measured' / result
  if not out.exists():
    out.parent.mkdir(parents=True, exist_ok=True)
    _start(module, folder.path, stage, name, os.fspath(out))


def _start(module: str, folder, stage: str, name: str, *rest: str) -> None:
  """Runs a stage in a process of its own, to its end."""
  done = subprocess.run(
    [sys.executable, '-m', module, os.fspath(folder), stage, name, *rest],
    stderr=subprocess.PIPE,
    text=True,
    check=False,
  )
  if done.returncode:
    tail = '\n'.join(done.stderr.splitlines()[-8:])
    raise RuntimeError(
      f'{stage} of {name!r} ended with {done.returncode}:\n{tail}'
    )


def _summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
  """What the processes of one contestant measured, together."""
  first = rounds[0]
  decode = [s for r in rounds for s in r['seconds']['decode']]
  prefill = [s for r in rounds for s in r['seconds']['prefill']]
  return {
    'tokens_per_second': timing.spread([first['count'] / s for s in decode]),
    'prompt_tokens_per_second': timing.spread(
      [first['prompt'] / s for s in prefill]
    ),
    'nbytes': first['nbytes'],
    'peak_bytes': max(r['peak_bytes'] for r in rounds),
    'tokens': first['tokens'],
    **({'version': first['version']} if 'version' in first else {}),
  }


def _same_texts(folder, names: list[str]) -> None:
  for name in names:
    ours, defined = (
      np.asarray(folder.read_json(f'measured/{i}_{name}.json')['tokens'])
      for i in ('0', 'reference')
    )
    if not np.array_equal(ours, defined):
      at = int(np.argmax(ours != defined))
      raise RuntimeError(
        f'{name!r} writes another text than the definitions of its kernels, '
        f'from token {at} on'
      )


def _text(vocabulary: str, tokens: list[int]) -> str:
  """The pieces of a SentencePiece vocabulary, joined."""
  pieces = files.read_json(data.require(vocabulary))['pieces']
  spelled = (
    chr(int(p[1:-1], 16)) if p.startswith('<0x') else p
    for p in (pieces[t] for t in tokens if t > 2)
  )
  return ''.join(spelled).replace('\N{LOWER ONE EIGHTH BLOCK}', ' ')


def table(result: dict[str, Any]) -> rich_table.Table:
  """One line a contestant."""
  out = rich_table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
  out.add_column('', no_wrap=True)
  for header in ('tokens/s (q1-q3)', 'prompt tokens/s', 'parameters', 'peak'):
    out.add_column(header, justify='right', no_wrap=True)
  for name, row in result['contestants'].items():
    rate, prompt = row['tokens_per_second'], row['prompt_tokens_per_second']
    out.add_row(
      name,
      f'{rate["median"]:.1f} ({rate["q1"]:.1f}-{rate["q3"]:.1f})',
      f'{prompt["median"]:.0f}',
      f'{row["nbytes"] / 1e6:,.1f} MB',
      f'{row["peak_bytes"] / 1e6:,.0f} MB',
    )
  return out


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  workdir = flags.FLAGS.workdir
  if not workdir:
    raise app.UsageError('--workdir is needed: a folder for the results')
  run(flags.FLAGS.config, workdir)
  print(f'written to {workdir}: generate.json, metrics.json')


if __name__ == '__main__':
  config_flags.DEFINE_config_file('config', None, 'What to generate.')
  flags.DEFINE_string('workdir', None, 'Where results go.')
  flags.mark_flag_as_required('config')
  app.run(main, flags_parser=command_line.parse)
