"""How the kernels of the CPU backend are compiled."""

import hashlib
from contextlib import suppress
from pathlib import Path

import numba
from numba import types
from numba.core.caching import FunctionCache
from numba.core.datamodel import default_manager
from numba.extending import intrinsic

_SOURCES = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()
_DATA_FIELD = str(default_manager[types.float32[::1]].get_field_position("data"))


class _Cache(FunctionCache):
    """Compiled code on disk, for these very sources: a kernel contains code of other files, and numba looks at its own
    file's date alone."""

    def _index_key(self, signature, codegen):
        return *super()._index_key(signature, codegen), _SOURCES


def jit(fastmath):
    """njit with the compiled code kept on disk, if the cache has anywhere to go."""

    def decorate(function):
        compiled = numba.njit(function, nogil=True, fastmath=fastmath, error_model="numpy", boundscheck=False)
        with suppress(RuntimeError):  # neither this directory nor the user's cache directory can be written
            compiled._cache = _Cache(function)
        return compiled

    return decorate


@intrinsic
def leaf(typing_context):
    """Compile the calling function by itself, for the widest vectors, and promise that its array arguments do not
    overlap, as `restrict` does in C: without that LLVM gives up on loops over many arrays."""

    def generate(context, builder, signature, arguments):
        for argument in builder.function.args:  # an array is passed as its fields: arg.NAME.0, arg.NAME.1, …
            if argument.name.startswith("arg.") and argument.name.split(".")[2:] == [_DATA_FIELD]:
                argument.add_attribute("noalias")
        attributes = builder.function.attributes
        attributes.add("noinline")
        set.add(attributes, '"prefer-vector-width"="512"')  # past llvmlite's list of attributes that it knows
        return context.get_dummy_value()

    return types.void(), generate
