// The instruction set that the kernels run on, as convfast.info prints it.
#include <torch/csrc/stable/library.h>

#include "split.h"

namespace convfast {
namespace cpu {
namespace {

std::string cpu_capability() {
  return std::string(kernels<float>().name) + (tile_kernels() ? "+amx" : split_kernels<BFloat16>() ? "+bf16" : "");
}

}  // namespace
}  // namespace cpu
}  // namespace convfast

STABLE_TORCH_LIBRARY_IMPL(convfast, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&convfast::cpu::cpu_capability));
}
