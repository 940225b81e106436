"""Functions handed to compiled ones as addresses: unboxing one takes numba a fifth of a small step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic


@functools.cache
def address_of(function: Callable[..., Any], signature: Any) -> int:
    """Where a function compiled for that signature begins. What fails in it fails in its caller too."""
    compiled: Any = function.get_compile_result(signature)  # type: ignore[attr-defined]
    address: int = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    return address


def function_at(kind: types.FunctionType) -> Any:
    """An intrinsic from an address, int64, to a function of that kind."""

    @intrinsic
    def at(typingctx, address):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            function = cgutils.create_struct_proxy(kind)(context, builder)
            function.c_addr = cgutils.get_null_value(cgutils.voidptr_t)
            function.py_addr = cgutils.get_null_value(function.py_addr.type)
            function.jit_addr = builder.inttoptr(arguments[0], cgutils.voidptr_t)
            return function._getvalue()

        return kind(types.int64), codegen

    return at
