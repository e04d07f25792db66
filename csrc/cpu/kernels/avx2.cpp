#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include <immintrin.h>

#define CONVFAST_ISA avx2
#define CONVFAST_ISA_NAME "avx2"
#define CONVFAST_BYTES 32
#include "instruction_set.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
#define CONVFAST_ISA avx2
#include "no_instruction_set.inc"
#endif
