#define CONVFAST_ISA baseline
#define CONVFAST_ISA_NAME "baseline"
#define CONVFAST_BYTES 16
#include "instruction_set.inc"
