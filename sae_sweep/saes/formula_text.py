"""Reads a penalty's formula as people type it, and writes it back in one canonical way.

`a/(a+s)`, `(a+eps)**p - eps**p` and `log(1 + a / s)` are formulas. The text is read by hand, one token at a time: only
the names and functions below exist, so no text is ever run as code. Reading needs neither SymPy nor PyTorch.

Texts that differ in spaces, redundant brackets, `**` or `^`, `eps` or `ε`, the order of summands and factors, or the
arithmetic of plain numbers (0.5 or 1/2, a + a or 2*a, sqrt(x) or x^0.5, log1p(x) or log(1+x)) become the same text.
Algebra beyond that is not done: (a+1)*s and a*s + s remain two texts, and so two settings. The canonical text is part
of the identity of trained SAEs: it must never change for a formula that could be written before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NoReturn

from sae_sweep.config.keys import nearest, show, split_at_commas
from sae_sweep.errors import UserError

LONGEST, DEEPEST = 300, 30
# Beyond these a number or an exponent is a slip, and exact arithmetic on it would take for ever.
LARGEST_NUMBER, LARGEST_EXPONENT, MOST_DIGITS = 10**12, 32, 20

# What a formula of one latent may name, and what a formula of the whole input may name.
TERM_NAMES, OUTER_NAMES = ("a", "s", "p", "ε"), ("T", "s", "p", "ε")
FUNCTIONS = ("exp", "log", "sqrt", "tanh", "atan", "erf", "log1p", "expm1", "min", "max", "where")
_OTHER_SPELLINGS = {"eps": "ε", "epsilon": "ε", "ϵ": "ε", "logpi": "logπ", "log_pi": "logπ"}
_OTHER_SIGNS = str.maketrans({"−": "-", "·": "*", "×": "*", "⋅": "*"})
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[^\W\d]\w*)|(?P<sign>\*\*|<=|>=|[-+*/^(),<>≤≥]))"
)
_MIRRORED = {"<=": ">=", ">=": "<=", "<": ">", ">": "<"}


@dataclass(frozen=True)
class Node:
    """A part of a formula.

    kind: "number" (args: a Fraction), "name" (args: the name), "+", "*", "^", a function's name, "where" (args:
    comparison, its left side, its right side, the value where it holds, the value elsewhere), or, over latents, "sum"
    and "largest"
    """

    kind: str
    args: tuple[Any, ...]

    def parts(self) -> Iterable[Node]:
        """This node and every node below it."""
        yield self
        for each in self.args:
            if isinstance(each, Node):
                yield from each.parts()

    def names(self) -> set[str]:
        """The names that occur."""
        return {node.args[0] for node in self.parts() if node.kind == "name"}

    @property
    def varies(self) -> bool:
        """Whether it changes with the activations, not with settings alone."""
        return any(node.kind in ("sum", "largest") or node.args[:1] in (("a",), ("T",)) for node in self.parts())

    def __str__(self) -> str:
        """The canonical text."""
        return _write(self)[0]


def number(value: int | Fraction) -> Node:
    return Node("number", (Fraction(value),))


ZERO, ONE = number(0), number(1)


def read(text: str, where: str, over_latents: bool = False) -> Node:
    """The canonical form of a formula: of one latent, or, `over_latents`, of the sums and the largest over latents.

    where: the setting that the formula is given for, which errors begin with. UserError in one line if it is none.
    """
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where} must be a formula such as {'exp(T) - 1' if over_latents else 'a/(a+s)'}")
    if len(text) > LONGEST:
        raise UserError(f"{where} has {len(text)} characters, more than {LONGEST}")
    return _Reader(text.translate(_OTHER_SIGNS), where, over_latents).whole()


class _Reader:
    """Precedence as in mathematics and Python: comparison, then sums, products, signs, and powers from the right."""

    def __init__(self, text: str, where: str, over_latents: bool) -> None:
        self.text, self.where = text, where
        # Inside sum() and max() of an outer formula the names of one latent hold.
        self.over_latents = over_latents
        self.names: tuple[str, ...] = OUTER_NAMES if over_latents else TERM_NAMES
        self.at = self.depth = 0
        self.kind, self.token, self.begin = "", "", 0
        self.advance()

    def fail(self, problem: str) -> NoReturn:
        raise UserError(f"{self.where}={show(self.text.strip())}: {problem}")

    def advance(self) -> None:
        if not self.text[self.at :].strip():
            self.kind, self.token, self.begin = "end", "", len(self.text)
            return
        match = _TOKEN.match(self.text, self.at)
        if not match:
            rest = self.text[self.at :].lstrip()
            hint = " (a is never negative: no |a|)" if rest[0] == "|" else ""
            self.fail(f"{rest[0]!r} at character {len(self.text) - len(rest) + 1} means nothing here{hint}")
        self.kind, self.begin, self.at = str(match.lastgroup), match.start(str(match.lastgroup)), match.end()
        self.token = match[self.kind]

    def take(self, *signs: str) -> str | None:
        if self.kind != "sign" or self.token not in signs:
            return None
        token = self.token
        self.advance()
        return token

    def expect(self, sign: str, after: str) -> None:
        if not self.take(sign):
            self.fail(f"{show(sign)} is missing {after}, before {self.here()}")

    def here(self) -> str:
        return "the end" if self.kind == "end" else f"{self.token!r} at character {self.begin + 1}"

    def whole(self) -> Node:
        node = self.sum()
        if self.kind in ("name", "number") or self.token == "(":
            self.fail(f"a sign is missing before {self.here()} (a product is written 2*a)")
        if self.kind != "end":
            self.fail(f"{self.here()} is out of place")
        for part in node.parts():
            if part.kind == "number" and not _sensible(part.args[0]):
                self.fail(f"the number {part} is out of bounds")
            if part.kind == "^" and part.args[1].kind == "number" and abs(part.args[1].args[0]) > LARGEST_EXPONENT:
                self.fail(f"the exponent {part.args[1]} is above {LARGEST_EXPONENT}")
        return node

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > DEEPEST:
            self.fail(f"brackets and signs lie more than {DEEPEST} deep")
        summands = [self.product()]
        while sign := self.take("+", "-"):
            summand = self.product()
            summands.append(summand if sign == "+" else multiply([number(-1), summand]))
        self.depth -= 1
        return add(summands)

    def product(self) -> Node:
        factors = [self.signed()]
        while sign := self.take("*", "/"):
            begin, factor = self.here(), self.signed()
            if sign == "/" and factor == ZERO:
                self.fail(f"division by zero at {begin}")
            factors.append(factor if sign == "*" else self.power(factor, number(-1)))
        return multiply(factors)

    def signed(self) -> Node:
        sign = 1
        while token := self.take("+", "-"):
            sign = -sign if token == "-" else sign
        base = self.atom()
        if self.take("^", "**"):
            self.depth += 1
            if self.depth > DEEPEST:
                self.fail(f"brackets and signs lie more than {DEEPEST} deep")
            base = self.power(base, self.signed())
            self.depth -= 1
        return base if sign == 1 else multiply([number(-1), base])

    def power(self, base: Node, exponent: Node) -> Node:
        if exponent.kind == "number" and abs(exponent.args[0]) > LARGEST_EXPONENT:
            self.fail(f"the exponent {exponent} is above {LARGEST_EXPONENT}")
        if base == ZERO and exponent.kind == "number" and exponent.args[0] <= 0:
            self.fail("division by zero")
        made = raise_to(base, exponent)
        if made.kind == "number" and not _sensible(made.args[0]):
            self.fail(f"the number {base}^{exponent} is out of bounds")
        return made

    def atom(self) -> Node:
        kind, token, here = self.kind, self.token, self.here()
        if kind == "number":
            self.advance()
            return self.literal(token)
        if kind == "name":
            self.advance()
            return self.call(token) if self.take("(") else self.name(_OTHER_SPELLINGS.get(token, token), here)
        if self.take("("):
            node = self.sum()
            self.expect(")", "to close a bracket")
            return node
        return self.fail(f"a number, a name or a bracket is missing before {here}")

    def literal(self, token: str) -> Node:
        mantissa, _, exponent = token.lower().partition("e")
        if len(mantissa) > MOST_DIGITS or abs(int(exponent or 0)) > MOST_DIGITS or not _sensible(Fraction(token)):
            self.fail(f"the number {show(token)} is out of bounds")
        return number(Fraction(token))

    def name(self, name: str, here: str) -> Node:
        if name in FUNCTIONS:
            self.fail(f"{name} at character {here.rpartition(' ')[2]} takes an argument in brackets: {name}(…)")
        if name not in self.names:
            self.fail(f"there is no {name!r} here{nearest(name, [*self.names, *FUNCTIONS])}")
        return Node("name", (name,))

    def call(self, name: str) -> Node:
        functions = (*FUNCTIONS, "sum") if self.over_latents else FUNCTIONS
        if name not in functions:
            self.fail(f"there is no function {name!r}{nearest(name, functions)}")
        if self.over_latents and name in ("sum", "max"):
            return self.over(name)
        if name == "where":
            return self.conditional()
        arguments = [self.sum()]
        while self.take(","):
            arguments.append(self.sum())
        self.expect(")", f"to close {name}(")
        wanted = 2 if name in ("min", "max") else 1
        if len(arguments) != wanted:
            self.fail(f"{name}() takes {wanted} argument{'s' * (wanted > 1)}, got {len(arguments)}")
        if wanted == 2:
            return self.bounded(name, *arguments)
        (argument,) = arguments
        if name == "sqrt":
            return raise_to(argument, number(Fraction(1, 2)))
        if name == "log1p":
            return apply("log", add([ONE, argument]))
        if name == "expm1":
            return add([apply("exp", argument), number(-1)])
        return apply(name, argument)

    def over(self, name: str) -> Node:
        """sum(…) or max(…) over latents, whose argument is of one latent; max(…, …) is the larger of two numbers."""
        of_latent = name == "sum" or not self.top_level_comma()
        if of_latent:
            self.names, self.over_latents = (*TERM_NAMES, "logπ") if name == "max" else TERM_NAMES, False
        argument = self.sum()
        if not of_latent:
            self.expect(",", "between the arguments of max(…, …)")
            argument = self.bounded(name, argument, self.sum())
        self.expect(")", f"to close {name}(")
        if of_latent:
            self.names, self.over_latents = OUTER_NAMES, True
            if not argument.varies:
                self.fail(f"{name}({argument}) is over latents: it needs a")
            return Node("sum" if name == "sum" else "largest", (argument,))
        return argument

    def top_level_comma(self) -> bool:
        """Whether the bracket that has just been opened holds two arguments."""
        return len(split_at_commas(self.text[self.begin :], closing=True)) > 1

    def conditional(self) -> Node:
        """where(a <= bound, value there, value elsewhere)"""
        left = self.sum()
        sign = self.take("<=", ">=", "<", ">", "≤", "≥")
        if not sign:
            self.fail(f"where() begins with a comparison, as where(a <= s, a, s), got {left} before {self.here()}")
        sign = {"≤": "<=", "≥": ">="}.get(sign, sign)
        right = self.sum()
        self.expect(",", "after the comparison of where()")
        holds = self.sum()
        self.expect(",", "between the two values of where()")
        otherwise = self.sum()
        self.expect(")", "to close where(")
        if not left.varies:
            left, right, sign = right, left, _MIRRORED[sign]
        if sign in (">", ">="):
            sign, holds, otherwise = ("<=" if sign == ">" else "<"), otherwise, holds
        self.check_comparison("where", left, right)
        if any(node.kind == "where" for node in holds.parts()):
            self.fail("where() in where() can only be its last value, so that the cases follow one another from below")
        return Node("where", (sign, left, right, holds, otherwise))

    def bounded(self, name: str, first: Node, second: Node) -> Node:
        """min(a, bound) and max(a, bound) are where() in short."""
        if not first.varies:
            first, second = second, first
        self.check_comparison(name, first, second)
        smaller_first = (first, second) if name == "min" else (second, first)
        return Node("where", ("<=", first, second, *smaller_first))

    def check_comparison(self, name: str, left: Node, right: Node) -> None:
        variables = "T, sum(…) or max(…)" if self.over_latents else "a"
        if left.kind not in ("name", "sum", "largest") or not left.varies or right.varies:
            self.fail(f"{name}() compares {variables} with numbers and settings (s, p, ε), got {left} and {right}")


def _sensible(value: Fraction) -> bool:
    return value == 0 or Fraction(1, LARGEST_NUMBER) <= abs(value) <= LARGEST_NUMBER


def add(summands: Iterable[Node]) -> Node:
    """The canonical sum: flat, like summands and numbers added up, in a fixed order."""
    flat = [each for node in summands for each in (node.args if node.kind == "+" else (node,))]
    coefficients: dict[Node, Fraction] = {}
    for node in flat:
        size, rest = _coefficient(node)
        coefficients[rest] = coefficients.get(rest, Fraction(0)) + size
    kept = [multiply([number(size), rest]) for rest, size in coefficients.items() if size]
    kept.sort(key=lambda node: (_sign(node) < 0, node.kind != "number", str(node)))
    return Node("+", tuple(kept)) if len(kept) > 1 else kept[0] if kept else ZERO


def _coefficient(node: Node) -> tuple[Fraction, Node]:
    """A summand as a number times the rest of it."""
    if node.kind == "number":
        return node.args[0], ONE
    if node.kind == "*" and node.args[0].kind == "number":
        return node.args[0].args[0], multiply(node.args[1:])
    return Fraction(1), node


def multiply(factors: Iterable[Node]) -> Node:
    """The canonical product: flat, numbers multiplied out in front, like factors as one power, in a fixed order."""
    flat = [each for node in factors for each in (node.args if node.kind == "*" else (node,))]
    coefficient = Fraction(1)
    exponents: dict[Node, Fraction] = {}
    for node in flat:
        if node.kind == "number":
            coefficient *= node.args[0]
            continue
        power = node.kind == "^" and node.args[1].kind == "number"
        base, exponent = (node.args[0], node.args[1].args[0]) if power else (node, Fraction(1))
        exponents[base] = exponents.get(base, Fraction(0)) + exponent
    if coefficient == 0:
        return ZERO
    kept = [raise_to(base, number(exponent)) for base, exponent in exponents.items() if exponent]
    if any(node.kind in ("*", "number") for node in kept):  # roots that have come together
        return multiply([number(coefficient), *kept])
    kept.sort(key=lambda node: (node.kind == "+", str(node)))
    if coefficient != 1 or not kept:
        kept.insert(0, number(coefficient))
    return kept[0] if len(kept) == 1 else Node("*", tuple(kept))


def raise_to(base: Node, exponent: Node) -> Node:
    """The canonical power: of numbers worked out, and a quotient's denominator factor by factor."""
    if exponent == ONE:
        return base
    inverse = exponent == number(-1)
    if base.kind == "number" and exponent.kind == "number" and exponent.args[0].denominator == 1:
        return number(base.args[0] ** int(exponent.args[0]))
    if inverse and base.kind == "*":
        return multiply(raise_to(factor, exponent) for factor in base.args)
    if inverse and base.kind == "^":
        return raise_to(base.args[0], multiply([exponent, base.args[1]]))
    return Node("^", (base, exponent))


def substitute(node: Node, old: Node, new: Node) -> Node:
    """The canonical form of a formula with a part of it put in another's place."""
    if node == old:
        return new
    args = [substitute(each, old, new) if isinstance(each, Node) else each for each in node.args]
    if node.kind in ("+", "*"):
        return add(args) if node.kind == "+" else multiply(args)
    if node.kind == "^":
        return raise_to(*args)
    if node.kind == "where":
        _, left, right, holds, _ = args
        # Settings are above 0.
        return holds if left == ZERO and _is_positive(right) else Node("where", tuple(args))
    return apply(node.kind, args[0]) if node.kind in FUNCTIONS else Node(node.kind, tuple(args))


def _is_positive(node: Node) -> bool:
    return all(part.kind in ("name", "+", "*", "^", "number") and _sign(part) > 0 for part in node.parts())


def apply(function: str, argument: Node) -> Node:
    """The canonical function of an argument: worked out where the result is a whole number."""
    known = _AT.get((function, argument))
    return Node(function, (argument,)) if known is None else known


_AT = {("log", ONE): ZERO, ("exp", ZERO): ONE} | {(name, ZERO): ZERO for name in ("tanh", "atan", "erf")}


def derivative(node: Node, by: Node) -> Node:
    """The derivative of a formula by one of its names; of where(), case by case."""
    if node == by:
        return ONE
    if node.kind in ("number", "name"):
        return ZERO
    if node.kind == "where":
        *condition, holds, otherwise = node.args
        return Node("where", (*condition, derivative(holds, by), derivative(otherwise, by)))
    slopes = [derivative(each, by) for each in node.args]
    if node.kind == "+":
        return add(slopes)
    if node.kind == "*":
        return add(
            multiply([slope, *node.args[:i], *node.args[i + 1 :]]) for i, slope in enumerate(slopes) if slope != ZERO
        )
    if node.kind == "^":
        base, exponent = node.args
        of_base = multiply([exponent, raise_to(base, add([exponent, number(-1)])), slopes[0]])
        return of_base if slopes[1] == ZERO else add([of_base, multiply([node, apply("log", base), slopes[1]])])
    (argument,) = node.args
    square = raise_to(argument, number(2))
    factor = {
        "exp": lambda: node,
        "log": lambda: raise_to(argument, number(-1)),
        "tanh": lambda: add([ONE, multiply([number(-1), raise_to(node, number(2))])]),
        "atan": lambda: raise_to(add([ONE, square]), number(-1)),
        "erf": lambda: multiply([number(2), Node("exp", (multiply([number(-1), square]),)), _ONE_OVER_ROOT_PI]),
    }[node.kind]()
    return multiply([factor, slopes[0]])


_ONE_OVER_ROOT_PI = number(Fraction("0.564189583548"))


def _sign(node: Node) -> int:
    first = node.args[0] if node.kind == "*" else node
    return -1 if first.kind == "number" and first.args[0] < 0 else 1


# How tightly each kind of text holds together: a part that holds less tightly than asked is bracketed.
_SUM, _PRODUCT, _POWER, _ATOM = range(4)


def _write(node: Node) -> tuple[str, int]:
    """The text of a node and how tightly it holds together."""
    if node.kind == "number":
        return _write_number(node.args[0])
    if node.kind == "name":
        return node.args[0], _ATOM
    if node.kind == "+":
        first, *rest = node.args
        text = _at_least(first, _PRODUCT)
        for each in rest:
            negative = _sign(each) < 0
            size = _at_least(multiply([number(-1), each]) if negative else each, _PRODUCT)
            text += f" {'-' if negative else '+'} {size}"
        return text, _SUM
    if node.kind == "*" or (node.kind == "^" and _is_divisor(node)):
        return _write_quotient(node)
    if node.kind == "^":
        base, exponent = node.args
        if exponent == number(Fraction(1, 2)):
            return f"sqrt({base})", _ATOM
        return f"{_at_least(base, _ATOM)}^{_at_least(exponent, _ATOM)}", _POWER
    if node.kind == "where":
        sign, left, right, holds, otherwise = node.args
        return f"where({left} {sign} {right}, {holds}, {otherwise})", _ATOM
    name = "max" if node.kind == "largest" else node.kind
    return f"{name}({', '.join(map(str, node.args))})", _ATOM


def _write_number(value: Fraction) -> tuple[str, int]:
    decimal = f"{float(value):.12g}"
    if value.denominator == 1 and len(str(value)) <= 13:
        decimal = str(value)
    if "e" not in decimal and Fraction(decimal) == value and (value.denominator == 1 or len(decimal) <= 8):
        return decimal, _ATOM if value >= 0 else _SUM
    return f"{value.numerator}/{value.denominator}" if value.denominator != 1 else str(value), _SUM


def _write_quotient(node: Node) -> tuple[str, int]:
    factors = node.args if node.kind == "*" else (node,)
    coefficient = factors[0].args[0] if factors[0].kind == "number" else Fraction(1)
    others = factors[1:] if factors[0].kind == "number" else factors
    above = [_at_least(each, _POWER) for each in others if not _is_divisor(each)]
    below = [
        _at_least(raise_to(each.args[0], multiply([number(-1), each.args[1]])), _POWER)
        for each in others
        if _is_divisor(each)
    ]
    size = abs(coefficient)
    if size.numerator != 1 or not above:
        above.insert(0, str(size.numerator))
    if size.denominator != 1:
        below.insert(0, str(size.denominator))
    sign = "-" if coefficient < 0 else ""
    text = sign + "*".join(above)
    if below:
        text += "/" + (below[0] if len(below) == 1 else f"({'*'.join(below)})")
    return text, _SUM if sign else _PRODUCT


def _is_divisor(node: Node) -> bool:
    """Whether a factor is written below the line: x^-2 as 1/x^2."""
    return node.kind == "^" and _sign(node.args[1]) < 0 and node.args[1].kind == "number"


def _at_least(node: Node, tightness: int) -> str:
    text, own = _write(node)
    return text if own >= tightness else f"({text})"
