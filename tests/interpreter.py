"""Triton's interpreter in half the time and stricter: three of its functions, the slowest, replaced."""

import functools
import inspect
import operator

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def check_overflow(lhs, rhs, binary_op) -> None:
    """In numpy what `TritonSemantic.binary_op_sanitize_overflow_impl` interprets eight operations for, and then only
    tells where kernels are debugged."""
    integer = lhs.type.scalar
    if integer.int_bitwidth >= 64:
        return
    result = getattr(operator, binary_op.__name__)(*(side.handle.data.astype(np.int64) for side in (lhs, rhs)))
    fits = (result >= integer.get_int_min_value()) & (result <= integer.get_int_max_value())
    assert fits.all(), f"int{integer.int_bitwidth} overflow detected for operation {binary_op.__name__}"


@functools.cache
def builtins_of(package) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def patch_builtins(package, builder, *scope) -> None:
    """`interpreter._patch_builtin`, which lists the package's members anew at every call of a device function."""
    for name in builtins_of(package):
        if tl.core.is_builtin(member := getattr(package, name)):
            interpreter._patch_attr(package, name, member, builder, *scope)


def without_table(dtype_in_numpy):
    """`interpreter._get_np_dtype`, which writes a table of all types at every call."""
    of_scalar = functools.cache(dtype_in_numpy)

    def of_any(dtype) -> np.dtype:
        return dtype_in_numpy(dtype) if isinstance(dtype.scalar, tl.pointer_type) else of_scalar(dtype.scalar)

    return of_any


def make_faster() -> None:
    """Once a process, before the first kernel. Another version of Triton, without these functions, stays as it is."""
    replaced = ("interpreter_semantic", "_patch_builtin", "_patch_attr", "_get_np_dtype")
    if not all(hasattr(interpreter, name) for name in replaced):
        return
    interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = check_overflow
    interpreter._patch_builtin = patch_builtins
    interpreter._get_np_dtype = without_table(interpreter._get_np_dtype)
