"""What `experiments.bench` measures: one file a benchmark, with `run(config)`.

`run` returns `{'cases': {name: timing.case(...)}, 'peers': {name: {...}}}`.
"""
