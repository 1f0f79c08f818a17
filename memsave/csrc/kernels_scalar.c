/* The reference: no vector unit. XXH_VECTOR 0 is XXH_SCALAR. */
#define XXH_VECTOR 0
#define WIDTH 8
#define KERNEL(name) ms_scalar_##name
#include "kernels_impl.h"
