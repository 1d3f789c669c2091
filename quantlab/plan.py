"""Plans: every site with its resolved quantizers, validated from shapes.

A plan is made from a function, shapes and a recipe, before any number is
computed. It says where each parameter's codes are stored and how each product
will be computed, and it is checked by evaluating the quantized function on
abstract arrays, so that nothing fails later.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from quantlab import core, ops, summary
from quantlab.core import Layout, QParams, QTensor, Quantizer
from quantlab.graph import _jaxpr, segments
from quantlab.graph import sites as sites_lib
from quantlab.recipe import Recipe, Rule, by_layer


@dataclasses.dataclass(frozen=True)
class Storage:
  """How one weight is stored: a QTensor of this quantizer and layout.

  Attributes:
    quantizer, layout: static fields of the QTensor.
    shape, dtype: of the logical array, loops included.
  """

  quantizer: Quantizer
  layout: Layout
  shape: tuple[int, ...]
  dtype: str

  def quantize(
    self,
    w: jax.Array,
    key: jax.Array | None = None,
    qparams: QParams | None = None,
  ) -> Any:
    return core.quantize(w, self.quantizer, self.layout, qparams, key)

  def on_matrix(
    self, w: jax.Array, f: Callable[[jax.Array], jax.Array]
  ) -> jax.Array:
    """The logical array with `f` applied to it as (loops..., K, N)."""
    return self.layout.to_logical(f(self.layout.to_canonical(w)))

  def abstract(self) -> Any:
    """The QTensor as shapes."""
    w = jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype))
    return _nearest.eval_shape(w, self)


@functools.partial(jax.jit, static_argnums=1)
def _nearest(w: jax.Array, storage: Storage) -> Any:
  """Codes rounded to nearest, which needs no key; traced once a storage."""
  quantizer = dataclasses.replace(storage.quantizer, rounding='nearest')
  return core.quantize(w, quantizer, storage.layout)


@dataclasses.dataclass(frozen=True)
class SitePlan:
  """One site's decisions.

  Attributes:
    id, kind, paths, derivation, loops, weight_loops, macs: as in `Site`.
    matrix: (loops..., K, N) of the weight, () without one.
    rule: the quantizers, or None for float.
    compute: how the product is computed (see `ops.route`).
    fold: whether the affine map that follows is folded into the weight.
    tensors: shapes of lhs, rhs and out inside the loops.
  """

  id: str
  kind: str
  paths: tuple[str, ...]
  derivation: str
  loops: tuple[int, ...]
  weight_loops: tuple[int, ...]
  matrix: tuple[int, ...]
  macs: int
  rule: Rule | None
  compute: str
  fold: bool
  tensors: tuple[tuple[int, ...], ...]

  def to_json(self) -> dict[str, Any]:
    data = dataclasses.asdict(self)
    data['rule'] = None if self.rule is None else self.rule.to_json()
    return data

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> SitePlan:
    fields = {k: _tuples(v) for k, v in data.items()}
    found = data['rule']
    fields['rule'] = None if found is None else Rule.from_json(found)
    return cls(**fields)


VARIABLES = frozenset({'weights', 'sites', 'effective'})


def is_variables(tree: Any) -> bool:
  """Whether a tree is a variables tree rather than plain parameters."""
  keys = set(tree) if isinstance(tree, Mapping) else set()
  return {'weights', 'sites'} <= keys <= VARIABLES


def check_variables(tree: Any, taker: str) -> None:
  """Refuses what is no variables tree.

  Raises:
    TypeError: says what was found.
  """
  if is_variables(tree):
    return
  found = list(tree)[:5] if isinstance(tree, Mapping) else type(tree).__name__
  raise TypeError(
    f"{taker} takes the variables that init gave, {{'weights': ..., 'sites': "
    f'...}}, found {found}'
  )


# Leaves of sites that training learns, and their label (see `Plan.labels`).
TRAINABLE = {
  **dict.fromkeys(('step', 'offset', 'alpha', 'points'), 'step'),
  **dict.fromkeys(('a', 'b'), 'adapter'),
}
LEARNED = tuple(k for k, label in TRAINABLE.items() if label == 'step')
ADAPTER = ('a', 'b', 'scale')
# What the state of a site may hold: fields by role, None where it is no dict.
_FIELDS = ('bits', *QParams._fields, 'lo', 'hi', 'strength', *LEARNED)
STATE: dict[str, tuple[str, ...] | None] = {
  **dict.fromkeys(('weight', 'input', 'output', 'lhs', 'rhs'), _FIELDS),
  **dict.fromkeys(('effective', 'fold', 'transform', 'bias', 'probe')),
  'adapter': ADAPTER,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """What is quantized, how it is stored and how it is computed.

  Attributes:
    sites: every site of the program by id, in program order.
    leaves: parameters stored as codes, by path.
    effective: effective weights stored as codes, by site id.
    dropped: parameters that only effective weights used.
    captured: fingerprints of parameters that the function closed over.
    parameters: (bytes, elements) of every parameter, by path.
    notes: what a reader should know.
    strict: False dequantizes codes where an operation has no rule for them.
    scans: those whose layers have rules of their own: sites and leaves are
      those of the program in segments, see `graph.segments`.
  """

  sites: dict[str, SitePlan]
  leaves: dict[str, Storage]
  effective: dict[str, Storage]
  dropped: tuple[str, ...] = ()
  captured: dict[str, str] = dataclasses.field(default_factory=dict)
  parameters: dict[str, tuple[int, int]] = dataclasses.field(
    default_factory=dict
  )
  notes: tuple[str, ...] = ()
  strict: bool = True
  scans: tuple[segments.Scan, ...] = ()

  @property
  def quantized(self) -> dict[str, SitePlan]:
    """The sites that are not left in float."""
    return {k: s for k, s in self.sites.items() if s.rule is not None}

  @property
  def recipe(self) -> Recipe:
    """A rule for each site, by its id: `ql.ptq` takes a plan as it is."""
    return self.keep_float(())

  def inside(self, apply: Callable) -> tuple[Callable, Plan]:
    """The program in segments, of parameters that `split` gave, and its plan.

    As they are where no scan has rules by layer.
    """
    if not self.scans:
      return apply, self
    inner = segments.segmented(apply, self.scans)
    return inner, dataclasses.replace(self, scans=())

  def split(self, params: Any) -> Any:
    """Parameters or variables with their stacks in parts, if there are any."""
    if not self.scans:
      return params
    if is_variables(params):
      return {**params, 'weights': self.split(params['weights'])}
    return segments.split(params, self.scans)

  @property
  def slower(self) -> dict[str, str]:
    """Sites that float would compute faster on this CPU, and why."""
    return summary.slower(self)

  def keep_float(self, sites: Iterable[str]) -> Recipe:
    """The plan's recipe with these sites, by id, left in float.

    Raises:
      ValueError: an unknown site.
    """
    named = set(sites)
    if unknown := sorted(named - set(self.sites)):
      raise ValueError(f'unknown sites {unknown}; known: {list(self.sites)}')
    rules: dict[str, Any] = {
      k: None if k in named else s.rule for k, s in self.sites.items()
    }
    parts = {n for scan in self.scans for v in scan.sites.values() for n in v}
    found = {k: v for k, v in rules.items() if k not in parts}
    for scan in self.scans:
      for site, names in scan.sites.items():
        found[site] = by_layer(
          [
            rules[name]
            for name, n in zip(names, scan.lengths, strict=True)
            for _ in range(n)
          ]
        )
    return Recipe.of_sites(found, self.strict)

  @property
  def folded(self) -> frozenset[str]:
    return frozenset(k for k, s in self.sites.items() if s.fold)

  @property
  def owners(self) -> dict[str, str]:
    """For every parameter stored as codes, the first site that uses it."""
    found: dict[str, str] = {}
    for name, site in self.quantized.items():
      for path in site.paths if name not in self.effective else ():
        if path in self.leaves:
          found.setdefault(path, name)
    return found

  @property
  def weight_roles(self) -> dict[str, tuple[str, str]]:
    """Where the state of each stored parameter lies: (site id, role).

    The role is 'weight', and 'weight:1', ... for the further parameters of a
    site whose weight joins several.
    """
    found: dict[str, tuple[str, str]] = {}
    counts: collections.Counter[str] = collections.Counter()
    for path, owner in self.owners.items():
      k = counts[owner]
      counts[owner] += 1
      found[path] = owner, f'weight:{k}' if k else 'weight'
    return found

  def labels(self, variables: Mapping[str, Any]) -> dict[str, Any]:
    """What each leaf of the variables is to training.

    'weight' for floating-point parameters, 'step' for the ranges and tables
    that sites learn, 'adapter' for the matrices of `ql.lora` (`TRAINABLE`),
    'state' for everything else, codes and their scales included; of the
    structure of the variables, for `optax.multi_transform`.

    Raises:
      TypeError: no variables.
    """
    check_variables(variables, 'labels')

    def weight(leaf):
      if isinstance(leaf, QTensor):
        return jax.tree.map(lambda _: 'state', leaf)
      floating = hasattr(leaf, 'dtype') and jnp.issubdtype(
        leaf.dtype, jnp.floating
      )
      return 'weight' if floating else 'state'

    def site(path, _):
      named = str(getattr(path[-1], 'key', None))
      return TRAINABLE.get(named, 'state')

    rest = {
      k: jax.tree.map(lambda _: 'state', v)
      for k, v in variables.items()
      if k not in ('weights', 'sites')
    }
    return {
      'weights': jax.tree.map(
        weight, variables['weights'], is_leaf=core.is_qtensor
      ),
      'sites': jax.tree_util.tree_map_with_path(site, variables['sites']),
      **rest,
    }

  @property
  def static(self) -> dict[str, dict[str, Quantizer]]:
    """Roles whose ranges come from calibration, by site."""
    found = {
      k: {
        r: q for r, q in s.rule.quantizers.items() if q.static and r != 'weight'
      }
      for k, s in self.quantized.items()
      if s.rule is not None
    }
    return {k: v for k, v in found.items() if v}

  def abstract_state(self) -> dict[str, dict[str, Any]]:
    """State of the sites as shapes: ranges, folded shifts, loops in front."""
    state: dict[str, dict[str, Any]] = {}
    for name, site in self.sites.items():
      if site.fold:
        shape = (*site.loops, site.matrix[-1])
        shift = jax.ShapeDtypeStruct(shape, jnp.float32)
        state[name] = {'fold': {'shift': shift}}
    for name, roles in self.static.items():
      loops = self.sites[name].loops
      for role, q in roles.items():
        state.setdefault(name, {})[role] = ops.abstract_range(q, loops)
    return state

  def summary(self, params: Any = None) -> str:
    """A table of the sites, sizes, coverage and notes."""
    return summary.text(self, params)

  def totals(self) -> dict[str, float]:
    """Sizes and coverage, from shapes; see `summary.totals`."""
    return summary.totals(self)

  def memory(self) -> dict[str, int]:
    """Estimated bytes that quantizing needs; see `summary.memory`."""
    return summary.memory(self)

  def to_json(self) -> dict[str, Any]:
    return {
      'sites': [s.to_json() for s in self.sites.values()],
      'leaves': {k: _storage_json(s) for k, s in self.leaves.items()},
      'effective': {k: _storage_json(s) for k, s in self.effective.items()},
      'dropped': list(self.dropped),
      'captured': self.captured,
      'parameters': {k: list(v) for k, v in self.parameters.items()},
      'notes': list(self.notes),
      'strict': self.strict,
      **({'scans': [s.to_json() for s in self.scans]} if self.scans else {}),
    }

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> Plan:
    """A plan that `to_json` wrote.

    Raises:
      ValueError: it is none; such as a file that holds several by name.
    """
    if 'sites' not in data:
      several = [k for k, v in data.items() if 'sites' in (v or ())]
      hint = ''
      if several:
        hint = f'; of the plans in it pass one: data[{several[0]!r}]'
      raise ValueError(
        f'this is no plan, which has sites; it has {sorted(data)[:5]}{hint}'
      )
    found = [SitePlan.from_json(s) for s in data['sites']]
    return cls(
      sites={s.id: s for s in found},
      leaves={k: _storage(v) for k, v in data['leaves'].items()},
      effective={k: _storage(v) for k, v in data['effective'].items()},
      dropped=tuple(data['dropped']),
      captured=dict(data['captured']),
      parameters={k: _tuples(v) for k, v in data['parameters'].items()},
      notes=tuple(data['notes']),
      strict=data['strict'],
      scans=tuple(map(segments.Scan.from_json, data.get('scans', ()))),
    )

  def check_known(self, analysis: sites_lib.Analysis) -> None:
    """Refuses a trace with sites that the plan does not know.

    Raises:
      ValueError: lists them.
    """
    unknown = [s.id for s in analysis.sites if s.id not in self.sites]
    if unknown:
      raise ValueError(
        'this call of the function has products that the plan does not know: '
        f'{", ".join(unknown)}. A plan holds for the program it was made '
        'from; make a plan for this call (another mode, such as decoding '
        'beside prefill, is another program).'
      )

  def check_weights(self, leaves: Mapping[str, Any]) -> None:
    """Refuses parameters, by path, that are not stored as planned.

    Raises:
      TypeError: a float array where the plan has codes.
      ValueError: codes of another quantizer.
    """
    for path, storage in self.leaves.items():
      leaf, planned = leaves.get(path), storage.quantizer
      if leaf is not None and not isinstance(leaf, QTensor):
        raise TypeError(
          f'parameter {path!r} is planned as {planned!r}, got a float array: '
          'pass the params of the quantized model, or simulate the plan on '
          'float parameters with ql.fake_quantized(apply, plan)'
        )
      if leaf is not None and leaf.quantizer != planned:
        raise ValueError(
          f'parameter {path!r} is planned as {planned!r}, got codes of '
          f'{leaf.quantizer!r}: these are the params of another model'
        )

  def check_finite(self, params: Mapping[str, Any]) -> None:
    """Refuses weights that hold NaN or infinity.

    Args:
      params: by path; those of quantized products are looked at, if their
        values are known (within a trace they are not).

    Raises:
      ValueError: names them.
    """
    used = {p for s in self.quantized.values() for p in s.paths}
    values = {
      k: v for k, v in params.items() if k in used and not _jaxpr.is_tracer(v)
    }
    if bad := core.nonfinite(values):
      raise ValueError(
        f'parameters hold NaN or infinity: {", ".join(bad)}; quantization '
        'needs finite weights'
      )

  def check_state(self, state: Mapping[str, Any]) -> None:
    """Refuses state of sites that has no meaning: a slip in a name.

    Raises:
      ValueError: says which site, role or field is unknown.
    """
    unknown = [k for k in state if k not in self.sites]
    if unknown:
      raise ValueError(
        f'state for unknown sites {unknown}; known: {list(self.sites)}'
      )
    for site, roles in state.items():
      for role, value in roles.items():
        kind = role.partition(':')[0]  # 'weight:1' is of a second parameter
        fields = STATE.get(kind)
        if kind not in STATE:
          raise ValueError(
            f'state of site {site!r} for {role!r}; known: {list(STATE)}'
          )
        if fields and (wrong := sorted({*value} - {*fields})):
          raise ValueError(
            f'state of site {site!r} gives the {role} {wrong}; known: '
            f'{list(fields)}'
          )


def _storage_json(s: Storage) -> dict[str, Any]:
  return {
    'quantizer': s.quantizer.to_json(),
    'layout': dataclasses.asdict(s.layout),
    'shape': list(s.shape),
    'dtype': s.dtype,
  }


def _storage(data: Mapping[str, Any]) -> Storage:
  layout = Layout(**{k: _tuples(v) for k, v in data['layout'].items()})
  return Storage(
    Quantizer.from_json(data['quantizer']),
    layout,
    tuple(data['shape']),
    data['dtype'],
  )


def _tuples(value: Any) -> Any:
  if isinstance(value, list | tuple):
    return tuple(_tuples(v) for v in value)
  return value
