/* Run-length page maps: checking, overlaying, comparing. Nothing here touches a file. */
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int ms_fail(ms_error *error, int code, int err, uint64_t a, uint64_t b)
{
    *error = (ms_error){code, err, a, b};
    return code;
}

/* Makes room for n elements of size bytes in *v. */
int ms_grow(void **v, size_t *cap, size_t n, size_t size, ms_error *error)
{
    if (n <= *cap)
        return MS_OK;
    size_t wanted = *cap < 32 ? 64 : *cap * 2;
    if (wanted < n)
        wanted = n;
    void *grown = wanted > SIZE_MAX / size ? NULL : realloc(*v, wanted * size);
    if (!grown)
        return ms_fail(error, MS_NO_MEMORY, ENOMEM, wanted, size);
    *v = grown;
    *cap = wanted;
    return MS_OK;
}

ms_runs *ms_runs_new(void)
{
    return calloc(1, sizeof(ms_runs));
}

void ms_runs_free(ms_runs *runs)
{
    if (runs)
        free(runs->v);
    free(runs);
}

/* Whether run b continues run a without a seam; their sum must fit the stored 32 bits. */
static int continues(const ms_run *a, uint64_t page, uint64_t slot, uint64_t count, uint32_t pack)
{
    return a->pack == pack && a->page + a->count == page &&
           (pack == MS_ZERO || a->slot + a->count == slot) && a->count + count <= UINT32_MAX;
}

int ms_runs_push(ms_runs *runs, uint64_t page, uint64_t slot, uint64_t count, uint32_t pack,
                 ms_error *error)
{
    while (count) {
        uint32_t part = count > UINT32_MAX ? UINT32_MAX : (uint32_t)count;
        if (runs->n && continues(&runs->v[runs->n - 1], page, slot, part, pack)) {
            runs->v[runs->n - 1].count += part;
        } else {
            int code = ms_grow((void **)&runs->v, &runs->cap, runs->n + 1, sizeof(ms_run), error);
            if (code)
                return code;
            runs->v[runs->n++] = (ms_run){page, slot, part, pack};
        }
        page += part;
        slot += part;
        count -= part;
    }
    return MS_OK;
}

/* Checks stored runs; used[i] becomes 1 for every pack that a run names. */
int ms_runs_check(const ms_run *runs, size_t n, uint64_t pages, uint32_t packs, uint8_t *used,
                  ms_error *error)
{
    uint64_t end = 0;
    for (size_t i = 0; i < n; i++) {
        const ms_run *run = &runs[i];
        if (!run->count)
            return ms_fail(error, MS_RUN_EMPTY, 0, i, 0);
        if (run->page < end)
            return ms_fail(error, MS_RUN_ORDER, 0, i, 0);
        if (run->page > pages || run->count > pages - run->page ||
            run->slot > UINT64_MAX / MS_PAGE / 2)
            return ms_fail(error, MS_RUN_OUTSIDE, 0, i, 0);
        if (run->pack >= packs)
            return ms_fail(error, MS_RUN_PACK, 0, i, run->pack);
        if (i && continues(&runs[i - 1], run->page, run->slot, run->count, run->pack))
            return ms_fail(error, MS_RUN_SPLIT, 0, i, 0);
        used[run->pack] = 1;
        end = run->page + run->count;
    }
    return MS_OK;
}

/* Appends n runs, each pack number p replaced by pack_table[p]. */
int ms_runs_copy(const ms_run *from, size_t n, const uint32_t *pack_table, ms_runs *out,
                 ms_error *error)
{
    for (size_t i = 0; i < n; i++) {
        int code = ms_runs_push(out, from[i].page, from[i].slot, from[i].count,
                                pack_table[from[i].pack], error);
        if (code)
            return code;
    }
    return MS_OK;
}

/* Walks a run list forwards: what is at a page, and up to where that stays so. */
struct cursor {
    const ms_run *v;
    size_t n, i;
};

struct place {
    int found;
    uint32_t pack;
    uint64_t slot, until;
};

static struct place at(struct cursor *cursor, uint64_t page)
{
    while (cursor->i < cursor->n &&
           cursor->v[cursor->i].page + cursor->v[cursor->i].count <= page)
        cursor->i++;
    if (cursor->i == cursor->n)
        return (struct place){0, MS_ZERO, 0, UINT64_MAX};
    const ms_run *run = &cursor->v[cursor->i];
    if (page < run->page)
        return (struct place){0, MS_ZERO, 0, run->page};
    return (struct place){1, run->pack, run->slot + (page - run->page), run->page + run->count};
}

static struct cursor over(const ms_runs *runs)
{
    return (struct cursor){runs->v, runs->n, 0};
}

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* out = below, except where above has a run; a run of above with pack MS_ZERO makes zero. */
int ms_runs_overlay(const ms_runs *below, const ms_runs *above, ms_runs *out, ms_error *error)
{
    struct cursor lower = over(below), upper = over(above);
    for (uint64_t page = 0;;) {
        struct place low = at(&lower, page), high = at(&upper, page);
        uint64_t until = least(low.until, high.until);
        if (until == UINT64_MAX)
            return MS_OK;
        struct place top = high.found ? high : low;
        if (top.found && top.pack != MS_ZERO) {
            int code = ms_runs_push(out, page, top.slot, until - page, top.pack, error);
            if (code)
                return code;
        }
        page = until;
    }
}

/* Where each copied page (ascending) is in a map; pack MS_ZERO where it is zero. */
void ms_runs_lookup(const ms_runs *runs, const ms_copy *copies, size_t n, uint64_t *slots,
                    uint32_t *packs)
{
    struct cursor cursor = over(runs);
    for (size_t i = 0; i < n; i++) {
        struct place place = at(&cursor, copies[i].page);
        slots[i] = place.slot;
        packs[i] = place.pack;
    }
}

uint64_t ms_runs_pages(const ms_runs *runs)
{
    uint64_t pages = 0;
    for (size_t i = 0; i < runs->n; i++)
        pages += runs->v[i].count;
    return pages;
}

/* pages[p] += the pages in runs of pack p. */
void ms_runs_by_pack(const ms_runs *runs, uint64_t *pages)
{
    for (size_t i = 0; i < runs->n; i++)
        pages[runs->v[i].pack] += runs->v[i].count;
}

ms_segments *ms_segments_new(void)
{
    return calloc(1, sizeof(ms_segments));
}

void ms_segments_free(ms_segments *segments)
{
    if (segments)
        free(segments->v);
    free(segments);
}

static int push_segment(ms_segments *out, ms_segment segment, ms_error *error)
{
    int code = ms_grow((void **)&out->v, &out->cap, out->n + 1, sizeof(ms_segment), error);
    if (!code)
        out->v[out->n++] = segment;
    return code;
}

/* Segments of [first, end) where a and b do not refer to the same slot. */
int ms_runs_differ(const ms_runs *a, const ms_runs *b, uint64_t first, uint64_t end,
                   ms_segments *out, ms_error *error)
{
    struct cursor left = over(a), right = over(b);
    for (uint64_t page = first; page < end;) {
        struct place x = at(&left, page), y = at(&right, page);
        uint64_t until = least(end, least(x.until, y.until));
        if (x.pack != y.pack || (x.pack != MS_ZERO && x.slot != y.slot)) {
            int code = push_segment(
                out, (ms_segment){page, until - page, x.slot, y.slot, x.pack, y.pack}, error);
            if (code)
                return code;
        }
        page = until;
    }
    return MS_OK;
}

/*
 * Segments of [first, end) that have to be looked at to make memory equal to `wanted`: side b is
 * MS_LIVE where the process has a page already, MS_ZERO where it has none (anonymous memory that
 * nobody touched reads as zero). Untouched pages that shall be zero are left out.
 */
int ms_runs_over_live(const ms_runs *wanted, const ms_ranges *populated, uint64_t first,
                      uint64_t end, ms_segments *out, ms_error *error)
{
    ms_runs live = {0};
    int code = MS_OK;
    for (size_t i = 0; i < populated->n && !code; i++)
        code = ms_runs_push(&live, populated->v[i].page, 0, populated->v[i].count, MS_LIVE, error);
    struct cursor left = over(wanted), right = over(&live);
    for (uint64_t page = first; page < end && !code;) {
        struct place x = at(&left, page), y = at(&right, page);
        uint64_t until = least(end, least(x.until, y.until));
        if (x.found || y.found)
            code = push_segment(
                out, (ms_segment){page, until - page, x.slot, 0, x.pack, y.pack}, error);
        page = until;
    }
    free(live.v);
    return code;
}
