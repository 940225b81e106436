"""What compiled code does to vectors, spelled in LLVM's own: they become AVX-512, AVX2 or NEON as the machine has them.

Numba's loops keep the sums of a product in memory and check for overlapping arrays at every turn, which costs half the
speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba.core import cgutils, config, types
from numba.core.codegen import get_host_cpu_features


def forget_older(folder: Path) -> None:
    """Drop the compiled functions that numba keeps in `folder`, if a file there is not what it was.

    Numba looks at a function's own file alone; but what it compiled holds what other files say.
    """
    files = ((path.name, path.stat()) for path in sorted(folder.glob("*.py")))
    now = "\n".join(f"{name} {stat.st_mtime_ns} {stat.st_size}" for name, stat in files)
    kept = folder / "__pycache__"
    of_these = kept / "compiled-from.txt"
    with suppress(OSError):  # where nothing can be written nothing older is kept
        if not of_these.exists() or of_these.read_text() != now:
            for index in kept.glob("*.nbi"):
                index.unlink(missing_ok=True)
            kept.mkdir(exist_ok=True)
            of_these.write_text(now)


# Before any other file of this folder asks for what it once compiled.
forget_older(Path(__file__).parent)

LANES = 16
FLOAT = ir.FloatType()
VECTOR = ir.VectorType(FLOAT, LANES)
INT32, INT64 = ir.IntType(32), ir.IntType(64)
INTS = ir.VectorType(INT32, LANES)


def has(feature: str) -> bool:
    """Whether compiled code may use a feature of the processor, by LLVM's name for it."""
    features = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    return f"+{feature}" in features.split(",")


def arrays(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> list[Any]:
    """The arguments, arrays as structures with their data and shape, tuples and records with their members so."""

    def opened(kind: Any, value: Any) -> Any:
        if isinstance(kind, types.Array):
            return context.make_array(kind)(context, builder, value)
        if isinstance(kind, types.BaseTuple):  # type: ignore[attr-defined]
            members = [opened(each, builder.extract_value(value, i)) for i, each in enumerate(kind.types)]
            return getattr(kind, "instance_class", lambda *them: them)(*members)
        return value

    return [opened(kind, value) for kind, value in zip(signature.args, arguments, strict=True)]


def load(builder: ir.IRBuilder, pointer: Any, vector: Any = VECTOR) -> Any:
    """The vector at an address that is a multiple of 4."""
    loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    loaded.align = 4
    return loaded


def store(builder: ir.IRBuilder, value: Any, pointer: Any, align: int = 4) -> None:
    """Put a vector at an address that is a multiple of `align`."""
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = align


def fma(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    """a·b + c, of vectors or of scalars."""
    name = "llvm.fmuladd.v16f32" if a.type == VECTOR else "llvm.fmuladd.f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(function, [a, b, c])


def splat(builder: ir.IRBuilder, scalar: Any) -> Any:
    """A vector of one number."""
    first = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined), scalar, INT32(0))
    return _shuffle(builder, first, [0] * LANES)


def sum_lanes(builder: ir.IRBuilder, vector: Any) -> Any:
    """The sum of a vector's lanes: halves onto each other."""
    half = LANES // 2
    while half:
        add = builder.fadd if vector.type == VECTOR else builder.add
        vector = add(vector, _shuffle(builder, vector, [(lane + half) % LANES for lane in range(LANES)]))
        half //= 2
    return builder.extract_element(vector, INT32(0))


def _shuffle(builder: ir.IRBuilder, vector: Any, lanes: Sequence[int]) -> Any:
    undefined = ir.Constant(vector.type, ir.Undefined)
    return builder.shuffle_vector(vector, undefined, ir.Constant(ir.VectorType(INT32, LANES), list(lanes)))


def add_to(builder: Any, array: Any, at: Any, value: Any) -> None:
    """array[at] += value, of numbers."""
    place = builder.gep(array.data, [at])
    builder.store(builder.fadd(builder.load(place), value), place)
