"""Cuts the programs of the tests and compares the pieces with the whole."""

import functools

import jax
from graph import programs

from quantlab.graph.blocks import blocks, layers, run


@functools.cache
def cut(name):
  program = programs.MODELS[name]()
  return program, blocks(program.apply, program.params, *program.args)


def both(program, parts):
  """Results of the function and of its blocks in order, each compiled."""
  want = jax.jit(program.apply)(program.params, *program.args)
  got = jax.jit(functools.partial(run, parts))(program.params, *program.args)
  return got, jax.tree.leaves(want)


def check(apply, params, *args, tolerance=1e-6):
  """Cuts a function, compares whole and layer by layer; gives the blocks."""
  program = programs.Program(apply, params, args)
  parts = blocks(apply, params, *args)
  for chain in (parts, layers(parts)):
    got, want = both(program, chain)
    assert programs.error(got, want) <= tolerance
  return parts
