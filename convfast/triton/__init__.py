"""The Triton backend: `runtime` says whether it can be had, `ops` (which needs triton) registers its kernels."""
