"""The package's formulas as source text: traced where they are written for speed, quoted where they are plain."""

import ast
import inspect
import re
import textwrap
import types
from pathlib import Path
from unittest import mock

import sympy
from sympy.printing.str import StrPrinter

from dystress_plugin.temperature import dystress

_COSINE = sympy.Symbol("cosine", real=True)
_DETACHED = sympy.Symbol("detached", real=True)
_LOW, _DELTA = sympy.symbols("low delta", positive=True)

# What the curves may call, as a function of torch or, with an underscore behind it, in place.
_OPERATIONS = {
    "abs": sympy.Abs,
    "add": lambda x, y, alpha=1: x + alpha * y,
    "cos": sympy.cos,
    "div": lambda x, y: x / y,
    "exp": sympy.exp,
    "mul": lambda x, y: x * y,
    "neg": lambda x: -x,
    "sub": lambda x, y, alpha=1: x - alpha * y,
    "tensor": lambda x, dtype, device: x,  # noqa: ARG005
}


class _Traced:
    """A tensor that is an expression: what our code does to it can be read afterwards."""

    def __init__(self, expression):
        self.expression = expression

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *arguments, **settings: _operation(name.rstrip("_"))(self, *arguments, **settings)

    def detach(self):
        return _Traced(self.expression.subs(_COSINE, _DETACHED))

    def __mul__(self, other):
        return _operation("mul")(self, other)

    def __truediv__(self, other):
        return _operation("div")(self, other)


class _Torch:
    """Stands for the module torch while a formula is traced."""

    def __getattr__(self, name):
        return _operation(name)


def _operation(name):
    if name not in _OPERATIONS:
        raise ValueError(f"The curve of DySTreSS now calls {name}(), which upstream/formulas.py cannot trace: add it.")

    def apply(*arguments, out=None, **settings):  # noqa: ARG001 - where the result lies is no part of a formula
        plain = [a.expression if isinstance(a, _Traced) else a for a in arguments]
        return _Traced(_OPERATIONS[name](*plain, **settings))

    return apply


class _Source(StrPrinter):
    """Expressions as Python that calls torch."""

    def _print_Function(self, expression):
        return f"torch.{expression.func.__name__.lower()}({self.stringify(expression.args, ', ')})"

    _print_Abs = _print_Function

    def _print_Pi(self, _):
        return "math.pi"


def dystress_temperature(cosine, low, high):
    """DySTreSS's tau(s) as a line of torch, traced through `ProfiledMap.logit` as `DySTreSS()` uses it.

    Args:
        cosine: what stands for the cosine without gradient.
        low: what stands for tau_min.
        high: what stands for tau_max.

    Raises:
        ValueError: where the curve does what cannot be traced, or depends on a cosine with gradient.
    """
    default = {name: p.default for name, p in inspect.signature(dystress.DySTreSS).parameters.items()}
    defaults = dystress.PROFILES[default["profile"]].defaults
    constants = types.SimpleNamespace(pi=sympy.pi)
    eager = types.SimpleNamespace(compiled=lambda _: False)
    with mock.patch.multiple(dystress, torch=_Torch(), math=constants, tracing=eager):
        map_ = dystress.ProfiledMap(default["profile"], _LOW, _DELTA, defaults, default["detach"])
        logit = map_.logit(_Traced(_COSINE)).expression
    tau = sympy.nsimplify(_COSINE / logit, rational=True)
    shape = sympy.factor_terms(sympy.simplify((tau - _LOW) / _DELTA))
    if shape.free_symbols != {_DETACHED}:
        raise ValueError(f"(tau - tau_min) / (tau_max - tau_min) = {shape}: expected a function of the cosine alone.")
    text = f"{low} + ({high} - {low}) * {_Source().doprint(shape)}"
    return spaced(re.sub(r"\bdetached\b", cosine, text))


def spaced(expression):
    """A Python expression with the usual spaces."""
    return ast.unparse(ast.parse(expression, mode="eval"))


def as_mathematics(expression):
    """A line of torch as a docstring shows it."""
    return re.sub(r"\b(torch|math|self)\.", "", expression)


def objective(function, *, result, indent, width):
    """The body of a function of `dystress_plugin.objectives`, comments and all, ending in `{result} = ...`.

    It reads `positive` and `negative`, each (rows,).
    """
    statements = ast.parse(_source(function)).body[0].body
    returns = [node for statement in statements for node in ast.walk(statement) if isinstance(node, ast.Return)]
    if returns != statements[-1:]:
        raise ValueError(f"{function.__name__} must end in its only return statement to be exported.")
    body = _body(function).replace("stats.", "")
    body = re.sub(r"^return ", f"{result} = ", body, flags=re.MULTILINE)
    lines = []
    for line in body.splitlines():
        room = width - indent
        lines += textwrap.wrap(line, room, subsequent_indent="# ") if line.startswith("#") else [line]
    return textwrap.indent("\n".join(lines), " " * indent)


def assigned(function, name, names=None):
    """The expression that a function assigns to `name`.

    Args:
        function: to be read.
        name: of the variable.
        names: from attribute or variable to what it is called instead, such as {"self.tau": "self.temperature"}.

    Raises:
        ValueError: if there is not exactly one such assignment.
    """
    found = [
        ast.unparse(node.value)
        for node in ast.walk(ast.parse(_source(function)))
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]
    ]
    if len(found) != 1:
        raise ValueError(f"{function.__qualname__} must assign {name} once to be exported, not {len(found)} times.")
    return _renamed(found[0], names or {})


def first_argument(call):
    """The first argument of an expression that is a call."""
    return ast.unparse(ast.parse(call, mode="eval").body.args[0])


def oracle_temperature():
    """DySTreSS's tau(s) as our tests have it, in plain numbers: `s`, `low` and `high`."""
    oracle = Path(__file__).parents[2] / "tests" / "oracle.py"
    tree = ast.parse(oracle.read_text(encoding="utf-8"))
    (curve,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "cosine")
    tau, _ = curve.body[0].value.elts
    return ast.unparse(tau.body)


def default(cls, name):
    """The default of a parameter of a class."""
    return inspect.signature(cls).parameters[name].default


def plain_python(function):
    """A function's source for the Pythons that the hosts support: zip() knows `strict` only since 3.10."""
    return _source(function).replace(", strict=True", "")


def _source(function):
    return textwrap.dedent(inspect.getsource(function))


def _body(function):
    """The statements of a function behind its docstring, as written."""
    source = _source(function)
    (tree,) = ast.parse(source).body
    start = tree.body[0].end_lineno  # the docstring's
    return textwrap.dedent("\n".join(source.splitlines()[start:]))


def _renamed(text, names):
    for old, new in names.items():
        text = re.sub(rf"(?<![\w.]){re.escape(old)}\b", new, text)
    return text
