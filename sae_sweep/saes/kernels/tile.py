"""The inner product of the CPU encoder: a tile of inputs × latents held in registers, and which of it is positive.

Numba's loops keep sums in memory, which halves the speed of a product; this one is spelled in LLVM's vectors, which
become AVX-512, AVX2 or NEON as the machine has them. Each sum runs over k in order: the bits of a pre-activation
depend on its input and its latent alone, not on where in a tile they lie.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

# Inputs and latents of a tile: eight vectors of sixteen float32, and room for the operands.
ROWS, LANES = 8, 16

_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)


@intrinsic
def tile(typingctx, x, row, panel, at, bias, out, masks):  # type: ignore[no-untyped-def]
    """out[r] = bias[LANES·at :][:LANES] + x[row + r] @ panel[at] for r < ROWS; bit l of masks[r]: out[r, l] > 0.

    x [b, d], panel [panels, d, LANES], bias [panels · LANES], out [ROWS, LANES] float32; masks [ROWS] int32.
    Rows beyond the last are computed from the last row: the caller ignores them.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        arrays = [
            context.make_array(kind)(context, builder, value) if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args, arguments, strict=True)
        ]
        x, row, panel, at, bias, out, masks = arrays
        b, d = cgutils.unpack_tuple(builder, x.shape)
        fused = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), "llvm.fmuladd.v16f32"
        )
        last = builder.sub(b, _INT64(1))
        inputs = []
        for r in range(ROWS):
            wanted = builder.add(row, _INT64(r))
            wanted = builder.select(builder.icmp_signed("<", wanted, last), wanted, last)
            inputs.append(builder.gep(x.data, [builder.mul(wanted, d)]))
        weights = builder.gep(panel.data, [builder.mul(builder.mul(at, d), _INT64(LANES))])
        start = _load(builder, builder.gep(bias.data, [builder.mul(at, _INT64(LANES))]))
        sums = [cgutils.alloca_once_value(builder, start) for _ in range(ROWS)]
        with cgutils.for_range(builder, d) as loop:
            weight = _load(builder, builder.gep(weights, [builder.mul(loop.index, _INT64(LANES))]))
            for pointer, total in zip(inputs, sums, strict=True):
                scalar = builder.load(builder.gep(pointer, [loop.index]))
                builder.store(builder.call(fused, [_splat(builder, scalar), weight, builder.load(total)]), total)
        zero = ir.Constant(_VECTOR, [0.0] * LANES)
        for r, total in enumerate(sums):
            value = builder.load(total)
            place = builder.gep(out.data, [_INT64(r * LANES)])
            builder.store(value, builder.bitcast(place, _VECTOR.as_pointer())).align = 4
            bits = builder.bitcast(builder.fcmp_ordered(">", value, zero), ir.IntType(LANES))
            builder.store(builder.zext(bits, _INT32), builder.gep(masks.data, [_INT64(r)]))
        return context.get_dummy_value()

    return types.void(x, types.int64, panel, types.int64, bias, out, masks), codegen


@intrinsic
def lowest_bit(typingctx, mask):  # type: ignore[no-untyped-def]
    """The position of the lowest set bit of a non-zero int32."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        count = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_INT32, [_INT32, ir.IntType(1)]), "llvm.cttz.i32"
        )
        return builder.zext(builder.call(count, [arguments[0], ir.IntType(1)(1)]), _INT64)

    return types.int64(types.int32), codegen


def _load(builder: ir.IRBuilder, pointer: Any) -> Any:
    loaded = builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()))
    loaded.align = 4
    return loaded


def _splat(builder: ir.IRBuilder, scalar: Any) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, scalar, _INT32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT32, LANES), [0] * LANES))
