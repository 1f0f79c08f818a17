/* Page kernels, compiled once per instruction set: the includer defines KERNEL(name). */
#define XXH_INLINE_ALL
#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>

#include "core.h"

typedef uint64_t words_t __attribute__((vector_size(WIDTH), may_alias, aligned(1)));

int KERNEL(zero)(const uint8_t *page);
int KERNEL(equal)(const uint8_t *a, const uint8_t *b);
uint64_t KERNEL(hash)(const uint8_t *data, size_t length);

static inline int any(words_t w)
{
    uint64_t all = 0;
    for (size_t i = 0; i < WIDTH / 8; i++)
        all |= w[i];
    return all != 0;
}

/* Four vectors a step: the pages that differ do so early as a rule, and are left early. */
int KERNEL(zero)(const uint8_t *page)
{
    for (size_t at = 0; at < MS_PAGE; at += 4 * WIDTH) {
        const words_t *w = (const words_t *)(page + at);
        if (any(w[0] | w[1] | w[2] | w[3]))
            return 0;
    }
    return 1;
}

int KERNEL(equal)(const uint8_t *a, const uint8_t *b)
{
    for (size_t at = 0; at < MS_PAGE; at += 4 * WIDTH) {
        const words_t *x = (const words_t *)(a + at), *y = (const words_t *)(b + at);
        if (any((x[0] ^ y[0]) | (x[1] ^ y[1]) | (x[2] ^ y[2]) | (x[3] ^ y[3])))
            return 0;
    }
    return 1;
}

uint64_t KERNEL(hash)(const uint8_t *data, size_t length)
{
    return XXH3_64bits(data, length);
}
