"""What the CPU step does to vectors, spelled in LLVM's own: they become AVX-512, AVX2 or NEON as the machine has them.

Numba's loops keep the sums of a product in memory and check for overlapping arrays at every turn, which costs half the
speed. Each sum here has one order, by its operands alone: the bits of a pre-activation depend on its input and its
latent, not on where in a tile they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

# Inputs and latents of a tile: eight vectors of sixteen float32, and room for the operands.
ROWS, LANES = 8, 16

_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
# Columns that `axpy` and `dot` take at a time.
_MASK = _INT64(~(LANES - 1))


@intrinsic
def tile(typingctx, x, row, panels, at, bias, weights, floors, floor, out, masks):  # type: ignore[no-untyped-def]
    """out[r] = bias[LANES·at :][:LANES] + x[row + r] @ panels[at] for r < ROWS: pre-activations, and which count.

    Bit l of masks[r] is set where out[r, l] · weights[LANES·at + l] > floors[floor + r].
    x [b, d], panels [panels, d, LANES], bias and weights [panels · LANES], floors [at least floor + ROWS],
    out [ROWS, LANES] float32; masks [ROWS] int32. Rows beyond the last are computed from the last row: the caller
    ignores them.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        x, row, panels, at, bias, weights, floors, floor, out, masks = _arrays(context, builder, signature, arguments)
        b, d = cgutils.unpack_tuple(builder, x.shape)
        last = builder.sub(b, _INT64(1))
        inputs = []
        for r in range(ROWS):
            wanted = builder.add(row, _INT64(r))
            wanted = builder.select(builder.icmp_signed("<", wanted, last), wanted, last)
            inputs.append(builder.gep(x.data, [builder.mul(wanted, d)]))
        offset = builder.mul(at, _INT64(LANES))
        panel = builder.gep(panels.data, [builder.mul(offset, d)])
        start = _load(builder, builder.gep(bias.data, [offset]))
        sums = [cgutils.alloca_once_value(builder, start) for _ in range(ROWS)]
        with cgutils.for_range(builder, d) as loop:
            weight = _load(builder, builder.gep(panel, [builder.mul(loop.index, _INT64(LANES))]))
            for pointer, total in zip(inputs, sums, strict=True):
                scalar = builder.load(builder.gep(pointer, [loop.index]))
                builder.store(_fma(builder, _splat(builder, scalar), weight, builder.load(total)), total)
        scale = _load(builder, builder.gep(weights.data, [offset]))
        for r, total in enumerate(sums):
            value = builder.load(total)
            _store(builder, value, builder.gep(out.data, [_INT64(r * LANES)]))
            bound = builder.load(builder.gep(floors.data, [builder.add(floor, _INT64(r))]))
            above = builder.fcmp_ordered(">", builder.fmul(value, scale), _splat(builder, bound))
            bits = builder.zext(builder.bitcast(above, ir.IntType(LANES)), _INT32)
            builder.store(bits, builder.gep(masks.data, [_INT64(r)]))
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(x, i64, panels, i64, bias, weights, floors, i64, out, masks), codegen


@intrinsic
def axpy(typingctx, y, i, scale, x, j):  # type: ignore[no-untyped-def]
    """y[i] += scale · x[j]: rows of float32 matrices of as many columns."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        y, i, scale, x, j = _arrays(context, builder, signature, arguments)
        d = cgutils.unpack_tuple(builder, y.shape)[1]
        target = builder.gep(y.data, [builder.mul(i, d)])
        source = builder.gep(x.data, [builder.mul(j, d)])
        whole = builder.and_(d, _MASK)
        factor = _splat(builder, scale)
        with cgutils.for_range_slice(builder, _INT64(0), whole, _INT64(LANES)) as (at, _):
            place = builder.gep(target, [at])
            added = _fma(builder, factor, _load(builder, builder.gep(source, [at])), _load(builder, place))
            _store(builder, added, place)
        with cgutils.for_range_slice(builder, whole, d, _INT64(1)) as (at, _):
            place = builder.gep(target, [at])
            builder.store(_fma(builder, scale, builder.load(builder.gep(source, [at])), builder.load(place)), place)
        return context.get_dummy_value()

    return types.void(y, types.int64, types.float32, x, types.int64), codegen


@intrinsic
def dot(typingctx, y, i, x, j):  # type: ignore[no-untyped-def]
    """y[i] · x[j]: rows of float32 matrices of as many columns."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        y, i, x, j = _arrays(context, builder, signature, arguments)
        d = cgutils.unpack_tuple(builder, y.shape)[1]
        one, other = builder.gep(y.data, [builder.mul(i, d)]), builder.gep(x.data, [builder.mul(j, d)])
        whole = builder.and_(d, _MASK)
        sums = cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, [0.0] * LANES))
        with cgutils.for_range_slice(builder, _INT64(0), whole, _INT64(LANES)) as (at, _):
            factors = [_load(builder, builder.gep(pointer, [at])) for pointer in (one, other)]
            builder.store(_fma(builder, *factors, builder.load(sums)), sums)
        total = cgutils.alloca_once_value(builder, _sum(builder, builder.load(sums)))
        with cgutils.for_range_slice(builder, whole, d, _INT64(1)) as (at, _):
            factors = [builder.load(builder.gep(pointer, [at])) for pointer in (one, other)]
            builder.store(_fma(builder, *factors, builder.load(total)), total)
        return builder.load(total)

    return types.float32(y, types.int64, x, types.int64), codegen


@intrinsic
def lowest_bit(typingctx, mask):  # type: ignore[no-untyped-def]
    """The position of the lowest set bit of a non-zero int32."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        count = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_INT32, [_INT32, ir.IntType(1)]), "llvm.cttz.i32"
        )
        return builder.zext(builder.call(count, [arguments[0], ir.IntType(1)(1)]), _INT64)

    return types.int64(types.int32), codegen


def _arrays(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> list[Any]:
    """The arguments, arrays as structures with their data and shape."""
    return [
        context.make_array(kind)(context, builder, value) if isinstance(kind, types.Array) else value
        for kind, value in zip(signature.args, arguments, strict=True)
    ]


def _load(builder: ir.IRBuilder, pointer: Any) -> Any:
    loaded = builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()))
    loaded.align = 4
    return loaded


def _store(builder: ir.IRBuilder, value: Any, pointer: Any) -> None:
    builder.store(value, builder.bitcast(pointer, _VECTOR.as_pointer())).align = 4


def _fma(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    """a·b + c, of vectors or of scalars."""
    name = "llvm.fmuladd.v16f32" if a.type == _VECTOR else "llvm.fmuladd.f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(function, [a, b, c])


def _splat(builder: ir.IRBuilder, scalar: Any) -> Any:
    first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), scalar, _INT32(0))
    return _shuffle(builder, first, [0] * LANES)


def _sum(builder: ir.IRBuilder, vector: Any) -> Any:
    """The sum of a vector's lanes: halves onto each other."""
    half = LANES // 2
    while half:
        vector = builder.fadd(vector, _shuffle(builder, vector, [(lane + half) % LANES for lane in range(LANES)]))
        half //= 2
    return builder.extract_element(vector, _INT32(0))


def _shuffle(builder: ir.IRBuilder, vector: Any, lanes: Sequence[int]) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    return builder.shuffle_vector(vector, undefined, ir.Constant(ir.VectorType(_INT32, LANES), list(lanes)))
