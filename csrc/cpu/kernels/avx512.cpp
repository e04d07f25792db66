#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#include <immintrin.h>

#define CONVFAST_ISA avx512
#define CONVFAST_ISA_NAME "avx512"
#define CONVFAST_BYTES 64
#include "instruction_set.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
#define CONVFAST_ISA avx512
#include "no_instruction_set.inc"
#endif
