/* Chooses the page kernels once, by what the processor can do. */
#include "core.h"

#if defined(__x86_64__)
int ms_avx2_zero(const uint8_t *page);
int ms_avx2_equal(const uint8_t *a, const uint8_t *b);
uint64_t ms_avx2_hash(const uint8_t *data, size_t length);
#endif

static int (*zero_kernel)(const uint8_t *) = ms_scalar_zero;
static int (*equal_kernel)(const uint8_t *, const uint8_t *) = ms_scalar_equal;
static uint64_t (*hash_kernel)(const uint8_t *, size_t) = ms_scalar_hash;
static const char *chosen = "scalar";

__attribute__((constructor)) static void choose(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) {
        zero_kernel = ms_avx2_zero;
        equal_kernel = ms_avx2_equal;
        hash_kernel = ms_avx2_hash;
        chosen = "avx2";
    }
#endif
}

const char *ms_kernels(void)
{
    return chosen;
}

int ms_page_zero(const uint8_t *page)
{
    return zero_kernel(page);
}

int ms_page_equal(const uint8_t *a, const uint8_t *b)
{
    return equal_kernel(a, b);
}

uint64_t ms_page_hash(const uint8_t *page)
{
    return hash_kernel(page, MS_PAGE);
}

uint64_t ms_hash(const uint8_t *data, size_t length)
{
    return hash_kernel(data, length);
}
