/* Reading packs: with pread(2), never a mapping, so that a bad disk is an error and no SIGBUS. */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Memory for MS_BATCH pages, to be freed by the caller. */
uint8_t *ms_batch_new(ms_error *error)
{
    void *batch = NULL;
    int err = posix_memalign(&batch, MS_PAGE, (size_t)MS_BATCH * MS_PAGE);
    if (err)
        ms_fail(error, MS_NO_MEMORY, err, MS_BATCH, MS_PAGE);
    return err ? NULL : batch;
}

/* Checks the spans of an index and fills pack->before (nspans elements). */
int ms_pack_check(ms_pack *pack, ms_error *error)
{
    uint64_t used = 0, end = 0;
    for (size_t i = 0; i < pack->nspans; i++) {
        const ms_span *span = &pack->spans[i];
        if (!span->count)
            return ms_fail(error, MS_RUN_EMPTY, 0, i, 0);
        if (span->first < end)
            return ms_fail(error, MS_RUN_ORDER, 0, i, 0);
        if (i && span->first == end)
            return ms_fail(error, MS_RUN_SPLIT, 0, i, 0);
        if (span->first > pack->slots || span->count > pack->slots - span->first)
            return ms_fail(error, MS_RUN_OUTSIDE, 0, i, 0);
        pack->before[i] = used;
        used += span->count;
        end = span->first + span->count;
    }
    if (used != pack->used)
        return ms_fail(error, MS_SPAN_COUNT, 0, used, pack->used);
    return MS_OK;
}

/* The last span that begins at or before a slot, or the first of all. */
static size_t first_span(const ms_pack *pack, uint64_t slot)
{
    size_t low = 0, high = pack->nspans;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (pack->spans[middle].first <= slot)
            low = middle + 1;
        else
            high = middle;
    }
    return low ? low - 1 : 0;
}

/* The checksums of slots [slot, slot+count), or NULL if one of them is not in use. */
static const uint64_t *sums_of(const ms_pack *pack, uint64_t slot, uint64_t count)
{
    size_t i = first_span(pack, slot);
    if (i == pack->nspans || slot < pack->spans[i].first)
        return NULL;
    uint64_t into = slot - pack->spans[i].first;
    if (into > pack->spans[i].count || count > pack->spans[i].count - into)
        return NULL;
    return pack->sums + pack->before[i] + into;
}

int ms_pack_read(const ms_pack *packs, uint32_t pack, uint64_t slot, uint64_t count, uint8_t *to,
                 ms_error *error)
{
    if (!sums_of(&packs[pack], slot, count))
        return ms_fail(error, MS_PACK_UNUSED, 0, pack, slot);
    size_t length = (size_t)count * MS_PAGE, done = 0;
    while (done < length) {
        ssize_t got = pread(packs[pack].fd, to + done, length - done,
                            (off_t)(slot * MS_PAGE + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return ms_fail(error, MS_PACK_READ, got ? errno : 0, pack, slot + done / MS_PAGE);
        done += (size_t)got;
    }
    return MS_OK;
}

/* As ms_pack_read, with every page's checksum compared; copies the checksums to sums, if given. */
int ms_pack_read_checked(const ms_pack *packs, uint32_t pack, uint64_t slot, uint64_t count,
                         uint8_t *to, uint64_t *sums, ms_error *error)
{
    int code = ms_pack_read(packs, pack, slot, count, to, error);
    if (code)
        return code;
    const uint64_t *wanted = sums_of(&packs[pack], slot, count);
    for (uint64_t i = 0; i < count; i++)
        if (ms_page_hash(to + i * MS_PAGE) != wanted[i])
            return ms_fail(error, MS_PACK_CHECKSUM, 0, pack, slot + i);
    if (sums)
        memcpy(sums, wanted, (size_t)count * sizeof(*sums));
    return MS_OK;
}

/* Reads every page that n runs refer to: its checksum is right and it is not zero. */
int ms_verify(const ms_pack *packs, const ms_run *runs, size_t n, ms_error *error)
{
    uint8_t *batch = ms_batch_new(error);
    if (!batch)
        return MS_NO_MEMORY;
    int code = MS_OK;
    for (size_t i = 0; i < n && !code; i++) {
        for (uint64_t at = 0; at < runs[i].count && !code; at += MS_BATCH) {
            uint64_t count = runs[i].count - at < MS_BATCH ? runs[i].count - at : MS_BATCH;
            uint64_t slot = runs[i].slot + at;
            code = ms_pack_read_checked(packs, runs[i].pack, slot, count, batch, NULL, error);
            for (uint64_t page = 0; page < count && !code; page++)
                if (ms_page_zero(batch + page * MS_PAGE))
                    code = ms_fail(error, MS_PACK_ZERO, 0, runs[i].pack, slot + page);
        }
    }
    free(batch);
    return code;
}

int ms_pwrite(int fd, const uint8_t *from, size_t length, uint64_t offset, ms_error *error)
{
    while (length) {
        ssize_t put = pwrite(fd, from, length, (off_t)offset);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return ms_fail(error, MS_SYSTEM, put ? errno : EIO, offset, 0);
        from += put;
        length -= (size_t)put;
        offset += (uint64_t)put;
    }
    return MS_OK;
}

/* Stores a run's pages again, each checked, from slot of fd on; sums: one for each page. */
static int store_again(const ms_pack *packs, const ms_run *run, int fd, uint64_t slot,
                       uint64_t *sums, uint8_t *batch, ms_error *error)
{
    int code = MS_OK;
    for (uint64_t at = 0; at < run->count && !code; at += MS_BATCH) {
        uint64_t count = run->count - at < MS_BATCH ? run->count - at : MS_BATCH;
        code = ms_pack_read_checked(packs, run->pack, run->slot + at, count, batch, sums + at,
                                    error);
        if (!code)
            code = ms_pwrite(fd, batch, (size_t)count * MS_PAGE, (slot + at) * MS_PAGE, error);
    }
    return code;
}

/* Stores a run's pages again, each checked, at slot = page of fd; sums: one for each page. */
int ms_restore_run(const ms_pack *packs, const ms_run *run, int fd, uint64_t *sums,
                   ms_error *error)
{
    uint8_t *batch = ms_batch_new(error);
    if (!batch)
        return MS_NO_MEMORY;
    int code = store_again(packs, run, fd, run->page, sums, batch, error);
    free(batch);
    return code;
}

/*
 * Stores the pages of all runs in folded packs (folded[pack] set) again, each checked, from slot of
 * fd on. out: the runs with those pages in new_pack; sums: one for each page stored.
 */
int ms_fold(const ms_pack *packs, const ms_runs *runs, const uint8_t *folded, uint32_t new_pack,
            int fd, uint64_t slot, uint64_t *sums, ms_runs *out, ms_error *error)
{
    uint8_t *batch = ms_batch_new(error);
    int code = batch ? MS_OK : MS_NO_MEMORY;
    for (size_t i = 0; i < runs->n && !code; i++) {
        const ms_run *run = &runs->v[i];
        if (!folded[run->pack]) {
            code = ms_runs_push(out, run->page, run->slot, run->count, run->pack, error);
            continue;
        }
        code = store_again(packs, run, fd, slot, sums, batch, error);
        if (!code)
            code = ms_runs_push(out, run->page, slot, run->count, new_pack, error);
        slot += run->count;
        sums += run->count;
    }
    free(batch);
    return code;
}

static int side(const ms_pack *packs, uint32_t pack, uint64_t slot, uint64_t count, uint8_t *to,
                ms_error *error)
{
    if (pack == MS_ZERO) {
        memset(to, 0, (size_t)count * MS_PAGE);
        return MS_OK;
    }
    return ms_pack_read_checked(packs, pack, slot, count, to, NULL, error);
}

/* Compares both sides of every segment; out gets the pages whose bytes differ (pack, slot 0). */
int ms_diff(const ms_pack *packs, const ms_segment *segments, size_t n, ms_runs *out,
            ms_error *error)
{
    uint8_t *left = ms_batch_new(error), *right = ms_batch_new(error);
    int code = left && right ? MS_OK : MS_NO_MEMORY;
    for (size_t i = 0; i < n && !code; i++) {
        const ms_segment *s = &segments[i];
        for (uint64_t at = 0; at < s->count && !code; at += MS_BATCH) {
            uint64_t count = s->count - at < MS_BATCH ? s->count - at : MS_BATCH;
            code = side(packs, s->a_pack, s->a_slot + at, count, left, error);
            if (!code)
                code = side(packs, s->b_pack, s->b_slot + at, count, right, error);
            for (uint64_t page = 0; page < count && !code; page++)
                if (!ms_page_equal(left + page * MS_PAGE, right + page * MS_PAGE))
                    /* MS_ZERO: these runs have no slots, so that neighbours become one. */
                    code = ms_runs_push(out, s->page + at + page, 0, 1, MS_ZERO, error);
        }
    }
    free(left);
    free(right);
    return code;
}

/* out = what of the runs lies in slots in use: holes of a flat pack read as zero pages. */
int ms_runs_in_use(const ms_pack *packs, const ms_runs *runs, ms_runs *out, ms_error *error)
{
    for (size_t i = 0; i < runs->n; i++) {
        const ms_run *run = &runs->v[i];
        const ms_pack *pack = &packs[run->pack];
        uint64_t run_end = run->slot + run->count;
        for (size_t k = first_span(pack, run->slot); k < pack->nspans; k++) {
            uint64_t first = pack->spans[k].first, end = first + pack->spans[k].count;
            if (first >= run_end)
                break;
            if (first < run->slot)
                first = run->slot;
            if (end > run_end)
                end = run_end;
            if (first >= end)
                continue;
            int code = ms_runs_push(out, run->page + (first - run->slot), first, end - first,
                                    run->pack, error);
            if (code)
                return code;
        }
    }
    return MS_OK;
}
