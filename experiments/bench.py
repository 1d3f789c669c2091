r"""Benchmarks: ratios measured in one run, with their spread.

  python -m experiments.bench --config=configs/bench/trace.py \
    --workdir=runs/trace

Runs the benchmark that the config names, writes `bench.json` (seconds, ratios,
limits, peers, versions, device, the machine's load), `metrics.json` and
`speed.png`, and prints one table. Contestants are interleaved, so that a ratio
survives a busy machine better than seconds do; `cpu` columns count this process
alone. Any field of the config is set as `--config.rounds.trace=21`.
"""

import os
from typing import Any

import rich
from absl import app, flags
from ml_collections import config_flags
from rich import box
from rich import table as rich_table

from experiments import command_line
from experiments.benchmarks import (
  conv,
  latency,
  matmul,
  search,
  second_order,
  trace,
  training,
)
from quantlab import runtime
from quantlab.report import plots

# By name; a new one is a file in experiments/benchmarks and a line here.
BENCHMARKS = {
  'conv': conv.run,
  'latency': latency.run,
  'matmul': matmul.run,
  'search': search.run,
  'second_order': second_order.run,
  'trace': trace.run,
  'training': training.run,
}


def _load() -> float | None:
  """Processes that wanted to run in the last minute, ours included."""
  return os.getloadavg()[0] if hasattr(os, 'getloadavg') else None


def run(config: Any, workdir: str) -> dict[str, Any]:
  """Runs a benchmark; returns what `bench.json` holds.

  Raises:
    ValueError: the config names no benchmark, or the folder cannot be used
      (see `runtime.Workdir`).
  """
  if config.benchmark not in BENCHMARKS:
    raise ValueError(
      f'unknown benchmark {config.benchmark!r}; known: {sorted(BENCHMARKS)}'
    )
  with runtime.Workdir(workdir, config.to_dict(), seed=config.seed) as folder:
    before = _load()
    with runtime.timed() as timer:
      found = BENCHMARKS[config.benchmark](config)
    result = {
      'benchmark': config.benchmark,
      'config': config.to_dict(),
      **runtime.environment(),
      'cores': os.cpu_count(),
      'load': {'before': before, 'after': _load()},
      'seconds': timer.seconds,
      **found,
    }
    folder.write_json('bench.json', result)
    for name, case in result['cases'].items():
      for contestant, clocks in case['ratios'].items():
        folder.metrics.record(
          f'{config.benchmark}/{name}/{contestant}',
          {clock: ratio['median'] for clock, ratio in clocks.items()},
        )
    folder.write_bytes('speed.png', plots.to_png(picture(result)))
    rich.print(table(result))
    for name, peer in result['peers'].items():
      rich.print(f'{name} {peer["version"]}: {peer["why"]}')
  return result


def table(result: dict[str, Any]) -> rich_table.Table:
  """One line a case and contestant: seconds, ratios to the baseline, limit."""
  out = rich_table.Table(
    box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
  )
  for header in ('case', 'contestant'):
    out.add_column(header, no_wrap=True)
  for header in ('seconds', 'ratio (q1-q3)', 'cpu', 'limit'):
    out.add_column(header, justify='right', no_wrap=True)
  for name, case in result['cases'].items():
    for i, (contestant, seconds) in enumerate(case['seconds'].items()):
      ratios = case['ratios'].get(contestant)
      limit, met = (case[k].get(contestant) for k in ('limits', 'met'))
      out.add_row(
        '' if i else name,
        contestant,
        f'{seconds["wall"]["total"]["median"]:.3g}',
        *(_ratio(ratios) if ratios else ('1', '1')),
        '' if limit is None else f'{limit:.3g} {"met" if met else "missed"}',
        style='red' if met is False else None,
      )
    out.add_section()
  return out


def picture(result: dict[str, Any]) -> plots.Figure:
  """Every case: how many times as fast as its baseline the others are."""
  cases = {
    f'{name}\nbeside {case["baseline"]}': {
      contestant: tuple(1 / clocks['wall'][k] for k in ('q3', 'median', 'q1'))
      for contestant, clocks in case['ratios'].items()
    }
    for name, case in result['cases'].items()
    if case['ratios']
  }
  fig = plots.figure(8, 1 + 0.09 * plots.speedup_lines(cases))
  ax = plots.speedups(fig.subplots(), cases)
  ax.set_xlabel('times as fast (median and quartiles)')
  return fig


def _ratio(ratios: dict[str, dict[str, float]]) -> tuple[str, str]:
  wall, cpu = ratios['wall'], ratios['cpu']
  quartiles = f'{wall["q1"]:.2f}-{wall["q3"]:.2f}'
  return f'{wall["median"]:.2f} ({quartiles})', f'{cpu["median"]:.2f}'


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  workdir = flags.FLAGS.workdir
  if not workdir:
    raise app.UsageError('--workdir is needed: a folder for the results')
  run(flags.FLAGS.config, workdir)
  print(f'written to {workdir}: bench.json, metrics.json, speed.png')


if __name__ == '__main__':
  config_flags.DEFINE_config_file('config', None, 'What to measure.')
  flags.DEFINE_string('workdir', None, 'Where results go.')
  flags.mark_flag_as_required('config')
  app.run(main, flags_parser=command_line.parse)
