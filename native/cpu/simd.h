// Which instruction sets Highway builds: SSE4, AVX2 and AVX-512 on x86 (SSE4 is the least that runs), NEON on Arm. Included
// before any Highway header by each file that dispatches.
#pragma once

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#if defined(__x86_64__) || defined(_M_X64)
#define HWY_BASELINE_TARGETS HWY_SSE4
#endif
