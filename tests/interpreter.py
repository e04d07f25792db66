"""Triton's interpreter in a third of the time and stricter: the functions that take most of it replaced."""

import functools
import inspect

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def check_overflow(lhs, rhs, binary_op) -> None:
    """In numpy what `TritonSemantic.binary_op_sanitize_overflow_impl` interprets eight operations for, and then only
    tells where kernels are debugged."""
    integer = lhs.type.scalar
    if integer.int_bitwidth >= 64:
        return
    in_numpy = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[binary_op.__name__]
    result = in_numpy(lhs.handle.data, rhs.handle.data, dtype=np.int64)
    fits = result == result.astype(lhs.handle.data.dtype)
    assert fits.all(), f"int{integer.int_bitwidth} overflow detected for operation {binary_op.__name__}"


@functools.cache
def builtins_of(package) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def patch_builtins(package, builder, *scope) -> None:
    """`interpreter._patch_builtin`, which looks at all of the package's members at every call of a device function,
    where its caller's call has replaced all builtins."""
    names = builtins_of(package)
    if names and tl.core.is_builtin(getattr(package, names[0])):
        for name in names:
            interpreter._patch_attr(package, name, getattr(package, name), builder, *scope)


@functools.cache
def checked(shape: tuple[int, ...]) -> tuple[tl.core.tuple, int, tl.core.tuple, tl.core.constexpr]:
    """A shape and its number of elements as a type of blocks has them, and as a block."""
    if not shape:
        raise TypeError("0d block_type is forbidden")
    numel = tl.core.validate_block_shape(shape)
    return tl.core.tuple(shape), numel, tl.core.tuple([tl.constexpr(n) for n in shape]), tl.constexpr(numel)


def init_block_type(self, element_ty, shape) -> None:
    """`block_type.__init__`, which checks the shape and writes the name of each type anew."""
    self.element_ty = element_ty
    self.shape, self.numel, *_ = checked(tuple(map(tl.core._unwrap_if_constexpr, shape)))


def init_tensor(self, handle, type) -> None:
    """`tensor.__init__`, which wraps the numbers of the shape anew."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    *_, self.shape, self.numel = checked(tuple(type.shape)) if type.is_block() else NO_SHAPE


NO_SHAPE = tl.core.tuple([]), tl.constexpr(1)


def at_once_where_shapes_agree(broadcast):
    """`TritonSemantic.broadcast_impl_value`, which compares shapes number by number."""

    def of_two(self, lhs, rhs):
        one, other = (side.type.shape if side.type.is_block() else None for side in (lhs, rhs))
        return (lhs, rhs) if one is other else broadcast(self, lhs, rhs)

    return of_two


def without_table(dtype_in_numpy):
    """`interpreter._get_np_dtype`, which writes a table of all types at every call."""
    of_scalar = functools.cache(dtype_in_numpy)

    def of_any(dtype) -> np.dtype:
        return dtype_in_numpy(dtype) if isinstance(dtype.scalar, tl.pointer_type) else of_scalar(dtype.scalar)

    return of_any


def make_faster() -> None:
    """Once a process, before the first kernel. Another version of Triton, without these functions, stays as it is."""
    semantic = type(getattr(interpreter, "interpreter_semantic", None))
    replaced = {
        interpreter: ("_patch_builtin", "_patch_attr", "_get_np_dtype"),
        semantic: ("binary_op_sanitize_overflow_impl", "broadcast_impl_value", "computation_type_impl"),
        tl.core: ("block_type", "tensor", "tuple", "validate_block_shape", "_unwrap_if_constexpr"),
    }
    if not all(hasattr(owner, name) for owner, names in replaced.items() for name in names):
        return
    semantic.binary_op_sanitize_overflow_impl = staticmethod(check_overflow)
    semantic.broadcast_impl_value = at_once_where_shapes_agree(semantic.broadcast_impl_value)
    semantic.computation_type_impl = functools.cache(semantic.computation_type_impl)
    interpreter._patch_builtin = patch_builtins
    interpreter._get_np_dtype = without_table(interpreter._get_np_dtype)
    tl.block_type.__init__ = init_block_type
    tl.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    tl.tensor.__init__ = init_tensor
