"""The ternary notebook at a tiny size: it learns, freezes and writes."""

import pathlib
import re

import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / 'colab'


@pytest.fixture(scope='module')
def executed(execute):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('QUANTLAB_STEPS', '60')
    patch.setenv('QUANTLAB_WIDTH', '32')
    return execute('bitnet')


def test_is_what_its_source_gives(generated):
  committed = nbformat.read(FOLDER / 'bitnet.ipynb', as_version=4)
  assert committed == generated('bitnet'), 'run: python colab/generate.py'


def number(pattern, words):
  return float(re.search(pattern, words)[1].replace(',', ''))


def test_it_learns_and_stays_what_was_trained(executed, printed):
  """Guessing evenly costs log 96 = 4.56 nats, by frequency about 3.3."""
  words = printed(executed)
  trained = number(r'held-out loss ([\d.]+) nats', words)
  assert trained < 3.2
  assert number(r'frozen held-out loss ([\d.]+)', words) == pytest.approx(
    trained, abs=2e-3
  )


def test_its_weights_are_ternary_and_small(executed, printed):
  words = printed(executed)
  # Of a normal distribution 31.0 % lie within half its mean magnitude.
  assert number(r'zeros before ([\d.]+)', words) == pytest.approx(
    0.31, abs=0.01
  )
  assert 0.2 < number(r'after ([\d.]+)', words) < 0.5
  dense = number(r'([\d,]+) bytes of float', words)
  assert number(r'float, ([\d,]+) frozen', words) < 0.45 * dense


def test_it_writes_and_draws(executed, printed, pictures):
  words = printed(executed)
  written = words[words.index('\ndef ') + 1 :].split('\n\n')[0]
  assert len(written) > 20
  assert number(r'(\d+) characters a second', words) > 0
  assert len(pictures(executed)) == 1
