/* Called only where the processor has AVX2 (kernels.c); xxhash then chooses XXH_AVX2 itself. */
#if defined(__x86_64__)
#pragma GCC target("avx2")
#define WIDTH 32
#define KERNEL(name) ms_avx2_##name
#include "kernels_impl.h"
#else
typedef int ms_no_avx2_here;
#endif
