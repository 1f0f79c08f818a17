/* Looking at pages: zero, equal, hash; and the run-length coding of references. */
#include "memsave.h"

#include <errno.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#define SLOT_BITS 40
#define SLOT_MASK ((1ULL << SLOT_BITS) - 1)

int ms_is_zero_scalar(const uint8_t *page)
{
    for (int i = 0; i < MS_PAGE; i++)
        if (page[i])
            return 0;
    return 1;
}

__attribute__((target_clones("avx2", "default"))) int ms_is_zero(const uint8_t *page)
{
    for (int at = 0; at < MS_PAGE; at += 256) {
        uint64_t any = 0, word;
        for (int i = 0; i < 256; i += 8) {
            memcpy(&word, page + at + i, 8);
            any |= word;
        }
        if (any)
            return 0;
    }
    return 1;
}

uint64_t ms_hash_bytes(const uint8_t *data, uint64_t bytes)
{
    return XXH3_64bits(data, bytes);
}

void ms_hash(const uint8_t *pages, uint64_t count, uint64_t *hashes)
{
    for (uint64_t i = 0; i < count; i++)
        hashes[i] = XXH3_64bits(pages + i * MS_PAGE, MS_PAGE);
}

/* NULL if the reference is outside its pack. */
static const uint8_t *resolve(uint64_t ref, const ms_pack *packs, uint64_t pack_count,
                              const uint8_t *zero)
{
    if (!ref)
        return zero;
    uint64_t pack = (ref >> SLOT_BITS) - 1, slot = ref & SLOT_MASK;
    if (pack >= pack_count || slot >= packs[pack].slots)
        return NULL;
    return packs[pack].base + slot * MS_PAGE;
}

int64_t ms_resolve(const uint64_t *refs, uint64_t count, const ms_pack *packs, uint64_t pack_count,
                   const uint8_t *zero, const uint8_t **addresses)
{
    for (uint64_t i = 0; i < count; i++)
        if (!(addresses[i] = resolve(refs[i], packs, pack_count, zero)))
            return -ERANGE;
    return (int64_t)count;
}

static const uint8_t zero_page[MS_PAGE];

int64_t ms_classify(const uint8_t *shadow, const uint64_t *numbers, uint64_t count,
                    const uint64_t *base, const uint64_t *parent, const ms_pack *packs,
                    uint64_t pack_count, uint8_t *kinds)
{
    for (uint64_t i = 0; i < count; i++) {
        uint64_t number = numbers[i];
        const uint8_t *page = shadow + number * MS_PAGE;
        const uint8_t *old = resolve(base[number], packs, pack_count, zero_page);
        if (!old)
            return -ERANGE;
        if (old == zero_page) {
            if (ms_is_zero(page)) {
                kinds[i] = MS_SAME;
                continue;
            }
        } else if (memcmp(page, old, MS_PAGE) == 0) {
            kinds[i] = MS_SAME;
            continue;
        } else if (ms_is_zero(page)) {
            kinds[i] = MS_ZERO;
            continue;
        }
        kinds[i] = MS_NEW;
        if (parent && parent[number] && parent[number] != base[number]) {
            old = resolve(parent[number], packs, pack_count, zero_page);
            if (!old)
                return -ERANGE;
            if (memcmp(page, old, MS_PAGE) == 0)
                kinds[i] = MS_PARENT;
        }
    }
    return (int64_t)count;
}

int64_t ms_verify(const uint64_t *refs, uint64_t count, const ms_pack *packs, uint64_t pack_count)
{
    for (uint64_t i = 0; i < count; i++) {
        if (!refs[i])
            continue;
        const uint8_t *page = resolve(refs[i], packs, pack_count, NULL);
        if (!page || XXH3_64bits(page, MS_PAGE) !=
                         packs[(refs[i] >> SLOT_BITS) - 1].hashes[refs[i] & SLOT_MASK])
            return (int64_t)i;
    }
    return (int64_t)count;
}

uint64_t ms_differ(const uint64_t *a, const uint64_t *b, uint64_t pages, uint64_t *numbers)
{
    uint64_t n = 0;
    for (uint64_t i = 0; i < pages; i++)
        if (a[i] != b[i])
            numbers[n++] = i;
    return n;
}

int64_t ms_differ_bytes(const uint64_t *a, const ms_pack *packs_a, uint64_t count_a,
                        const uint64_t *b, const ms_pack *packs_b, uint64_t count_b,
                        uint64_t *numbers, uint64_t count)
{
    uint64_t n = 0;
    for (uint64_t i = 0; i < count; i++) {
        const uint8_t *left = resolve(a[numbers[i]], packs_a, count_a, zero_page);
        const uint8_t *right = resolve(b[numbers[i]], packs_b, count_b, zero_page);
        if (!left || !right)
            return -ERANGE;
        if (memcmp(left, right, MS_PAGE) != 0)
            numbers[n++] = numbers[i];
    }
    return (int64_t)n;
}

uint64_t ms_compress(const uint64_t *refs, uint64_t pages, uint64_t *counts, uint64_t *firsts)
{
    uint64_t runs = 0;
    for (uint64_t at = 0; at < pages;) {
        uint64_t end = at + 1;
        if (!refs[at])
            while (end < pages && !refs[end])
                end++;
        else /* the top bits are the pack: a run cannot cross into the next one unseen */
            while (end < pages && refs[end] == refs[at] + (end - at) &&
                   refs[end] >> SLOT_BITS == refs[at] >> SLOT_BITS)
                end++;
        if (counts) {
            counts[runs] = end - at;
            firsts[runs] = refs[at];
        }
        runs++;
        at = end;
    }
    return runs;
}

void ms_expand(const uint64_t *counts, const uint64_t *firsts, uint64_t runs, uint64_t *refs)
{
    for (uint64_t run = 0; run < runs; run++)
        for (uint64_t i = 0; i < counts[run]; i++)
            *refs++ = firsts[run] ? firsts[run] + i : 0;
}
