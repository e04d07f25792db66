"""Builds ahead of time the libraries that convfast/native.py would build just in time; metadata: pyproject.toml.

`pip install --no-build-isolation .` builds with the torch that is there, and for CUDA too where torch has it and there
is nvcc; TORCH_CUDA_ARCH_LIST says for which GPUs. With CONVFAST_NO_NATIVE=1 it needs no compiler and no torch. The
sources are installed too: what is not built here is built just in time.
"""

import importlib
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# The package without its __init__, which imports torch.
package = sys.modules["convfast"] = ModuleType("convfast")
package.__path__ = [str(ROOT / "convfast")]
environment, toolchain = (importlib.import_module(f"convfast.{name}") for name in ("environment", "toolchain"))


class Package(build_py):
    """Puts the sources of the libraries into the package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            sources = Path(self.build_lib, "convfast", "csrc")
            shutil.rmtree(sources, ignore_errors=True)  # files of an earlier build
            shutil.copytree(ROOT / "csrc", sources)


if environment.enabled("CONVFAST_NO_NATIVE"):
    setup(cmdclass={"build_py": Package})
else:
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        raise SystemExit(
            f"convfast is built against the torch that is installed ({error}):"
            " install torch >= 2.10 first, then pip install --no-build-isolation ."
        ) from error

    try:
        architectures = toolchain.architectures(toolchain.nvcc()[1])
    except toolchain.NativeUnavailable as error:
        print(f"convfast: without its CUDA library: {error}", file=sys.stderr)
        kinds = {"cpu": CppExtension}
    else:
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
        kinds = {"cpu": CppExtension, "cuda": CUDAExtension}
    builds = {name: toolchain.read_build(ROOT / "csrc" / "build.json", name) for name in kinds}

    class Library(BuildExtension):
        """Names each library after its sources: native.py refuses one that was built from others."""

        def get_ext_filename(self, fullname: str) -> str:
            *package, name = fullname.split(".")
            return str(Path(*package, builds[name.removeprefix("_")].prebuilt_name))

    libraries = [
        kind(
            f"convfast._{name}",
            [str(Path(source).relative_to(ROOT)) for source in builds[name].sources],
            extra_compile_args={"nvcc" if name == "cuda" else "cxx": list(builds[name].cflags)},
            extra_link_args=[*builds[name].ldflags, *(toolchain.cuda_folders() if name == "cuda" else ())],
            py_limited_api=True,  # only to keep libtorch_python out: the libraries use no Python API at all
        )
        for name, kind in kinds.items()
    ]
    setup(
        ext_modules=libraries,
        cmdclass={"build_py": Package, "build_ext": Library},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
