"""Builds ahead of time the library that convfast/native.py would build just in time; metadata: pyproject.toml.

`pip install --no-build-isolation .` builds with the torch that is there; with CONVFAST_NO_NATIVE=1 it needs no compiler
and installs the Python part only.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("convfast_native", ROOT / "convfast" / "native.py")
native = sys.modules["convfast_native"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)

if os.environ.get("CONVFAST_NO_NATIVE", "0") not in ("", "0"):
    setup()
else:
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise SystemExit(
            f"convfast is built against the torch that is installed ({error}):"
            " install torch >= 2.10 first, then pip install --no-build-isolation ."
        ) from error

    build = native.read_build(ROOT / "csrc" / "build.json")

    class Library(BuildExtension):
        """Names the library after its sources: native.py refuses one that was built from others."""

        def get_ext_filename(self, fullname: str) -> str:
            return str(Path(*fullname.split(".")[:-1], build.prebuilt_name))

    library = CppExtension(
        "convfast._native",
        [str(Path(source).relative_to(ROOT)) for source in build.sources],
        extra_compile_args=list(build.cflags),
        extra_link_args=list(build.ldflags),
        py_limited_api=True,  # only to keep libtorch_python out: the library uses no Python API at all
    )
    setup(
        ext_modules=[library],
        cmdclass={"build_ext": Library},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
