"""Names in the pictures of a search."""

from quantlab.report import plots, search_plots


def test_names_lose_what_they_need_not_say():
  long = [
    f"int{w}(scale=mse()), input uint{x}(per='tensor', scale=mse(p=2.4))"
    for w, x in ((4, 8), (8, 8))
  ]
  short = search_plots.short(long)
  assert [*short] == long
  assert [*short.values()] == ['int4, input uint8', 'int8, input uint8']
  # What differs in brackets alone keeps them.
  apart = ['int4(group=32)', 'int4(group=64)', 'int8']
  assert search_plots.short(apart) == dict(zip(apart, apart, strict=True))


def test_a_cell_of_the_bit_map_has_a_line_for_each_role():
  figure = plots.figure(4, 3)
  ax = search_plots.bit_map(
    figure.subplots(),
    ['conv', 'head'],
    {'kl-dp': ['int4(group=4), input int8()', 'int8(group=4), input int4()']},
  )
  assert [t.get_text() for t in ax.texts] == [
    'int4\ninput int8',
    'int8\ninput int4',
  ]
