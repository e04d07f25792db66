#define CONVFAST_ISA baseline
#if defined(__aarch64__)
#define CONVFAST_ISA_NAME "neon"
#else
#define CONVFAST_ISA_NAME "baseline"
#endif
#define CONVFAST_BYTES 16
#include "instruction_set.inc"
