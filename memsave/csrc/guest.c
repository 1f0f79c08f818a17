/*
 * A running process: which of its pages were written, copying them, writing them.
 *
 * Sources: Linux Documentation/admin-guide/mm/pagemap.rst (PAGEMAP_SCAN, Linux 6.7; entry bits),
 * include/uapi/linux/fs.h, process_vm_readv(2), pidfd_getfd(2). Debian 12's headers lack
 * PAGEMAP_SCAN, so that its constants are repeated here.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct scan_region { /* struct page_region */
    uint64_t start, end, categories;
};

struct scan_arg { /* struct pm_scan_arg */
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
_Static_assert(sizeof(struct scan_arg) == 96, "struct pm_scan_arg");

#define SCAN_IOCTL _IOWR('f', 16, struct scan_arg) /* PAGEMAP_SCAN */
#define SCAN_IS_WRITTEN (1 << 1)
#define SCAN_IS_FILE (1 << 2)
#define SCAN_IS_PRESENT (1 << 3)
#define SCAN_IS_SWAPPED (1 << 4)
#define SCAN_IS_PFNZERO (1 << 5)
#define SCAN_WP_MATCHING (1 << 0)   /* PM_SCAN_WP_MATCHING */
#define SCAN_CHECK_WPASYNC (1 << 1) /* PM_SCAN_CHECK_WPASYNC */

#define ENTRY_FILE (UINT64_C(1) << 61)
#define ENTRY_SWAPPED (UINT64_C(1) << 62)
#define ENTRY_PRESENT (UINT64_C(1) << 63)

#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

/* NEAR: pages between two ranges below which looking at them costs less than another call. */
enum { NEAR = 32, REGIONS = 2048, ENTRIES = 8192, MAX_IOV = 1024, MAX_READ_PAGES = 16384 };

ms_ranges *ms_ranges_new(void)
{
    return calloc(1, sizeof(ms_ranges));
}

void ms_ranges_free(ms_ranges *ranges)
{
    if (ranges)
        free(ranges->v);
    free(ranges);
}

/* Makes room for n ranges and touches it, so that collecting them takes no page fault. */
int ms_ranges_reserve(ms_ranges *ranges, size_t n, ms_error *error)
{
    int code = ms_grow((void **)&ranges->v, &ranges->cap, n, sizeof(ms_range), error);
    if (!code)
        memset(ranges->v + ranges->n, 0, (ranges->cap - ranges->n) * sizeof(ms_range));
    return code;
}

/* Ranges ascend and do not overlap: everything that is done with them relies on it. */
static int push(ms_ranges *out, uint64_t page, uint64_t count, uint64_t zero, ms_error *error)
{
    if (out->n) {
        ms_range *last = &out->v[out->n - 1];
        if (page < last->page + last->count)
            return ms_fail(error, MS_RUN_ORDER, 0, out->n, 0);
    }
    if (!zero)
        out->pages += count;
    if (out->n) {
        ms_range *last = &out->v[out->n - 1];
        if (last->page + last->count == page && last->zero == zero) {
            last->count += count;
            return MS_OK;
        }
    }
    int code = ms_grow((void **)&out->v, &out->cap, out->n + 1, sizeof(ms_range), error);
    if (!code)
        out->v[out->n++] = (ms_range){page, count, zero};
    return code;
}

int ms_ranges_push(ms_ranges *ranges, uint64_t page, uint64_t count, ms_error *error)
{
    return push(ranges, page, count, 0, error);
}

ms_copies *ms_copies_new(void)
{
    return calloc(1, sizeof(ms_copies));
}

void ms_copies_free(ms_copies *copies)
{
    if (copies)
        free(copies->v);
    free(copies);
}

/*
 * Appends to out what `older` has and what `ranges` were copied to (data, packed one after the
 * other), the latter instead of the former where both have a page.
 */
int ms_copies_merge(const ms_copies *older, const ms_ranges *ranges, const uint8_t *data,
                    ms_copies *out, ms_error *error)
{
    uint64_t newer = 0;
    for (size_t i = 0; i < ranges->n; i++)
        newer += ranges->v[i].count;
    int code = ms_grow((void **)&out->v, &out->cap, out->n + older->n + (size_t)newer,
                       sizeof(ms_copy), error);
    if (code)
        return code;
    size_t old = 0;
    for (size_t i = 0; i < ranges->n; i++) {
        const ms_range *range = &ranges->v[i];
        while (old < older->n && older->v[old].page < range->page)
            out->v[out->n++] = older->v[old++];
        for (uint64_t k = 0; k < range->count; k++) {
            out->v[out->n++] = (ms_copy){range->page + k, range->zero ? NULL : data};
            if (!range->zero)
                data += MS_PAGE;
        }
        while (old < older->n && older->v[old].page < range->page + range->count)
            old++;
    }
    while (old < older->n)
        out->v[out->n++] = older->v[old++];
    return MS_OK;
}

/* Copies that take memory: pages the kernel gave as its zero page do not. */
uint64_t ms_copies_pages(const ms_copies *copies)
{
    uint64_t pages = 0;
    for (size_t i = 0; i < copies->n; i++)
        pages += copies->v[i].data != NULL;
    return pages;
}

/* Whether the kernel knows PAGEMAP_SCAN: tried on one page, changing nothing. */
int ms_can_scan(int pagemap, uint64_t address)
{
    struct scan_arg arg = {.size = sizeof(arg), .start = address, .end = address + MS_PAGE,
                           .category_mask = SCAN_IS_PRESENT, .return_mask = SCAN_IS_PRESENT};
    return ioctl(pagemap, SCAN_IOCTL, &arg) >= 0;
}

/* Appends what PAGEMAP_SCAN says of arg's range, part of the block. regions: room for REGIONS. */
static int scan(const ms_guest *guest, struct scan_arg arg, struct scan_region *regions,
                const ms_block *block, ms_ranges *out, ms_error *error)
{
    int code = MS_OK;
    arg.size = sizeof(arg);
    arg.vec = (uint64_t)(uintptr_t)regions;
    arg.vec_len = REGIONS;
    while (arg.start < arg.end && !code) {
        int got = ioctl(guest->pagemap, SCAN_IOCTL, &arg);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0) {
            code = ms_fail(error, MS_SYSTEM, errno, arg.start, 0);
            break;
        }
        uint64_t seen = arg.start;
        for (int i = 0; i < got && !code; i++) {
            seen = regions[i].end;
            code = push(out, block->first_page + (regions[i].start - block->address) / MS_PAGE,
                        (regions[i].end - regions[i].start) / MS_PAGE,
                        (regions[i].categories & SCAN_IS_PFNZERO) != 0, error);
        }
        /*
         * The kernel walks in pieces of 512 regions, and where a later piece comes to the end of
         * the range it leaves walk_end at the end of an earlier one (do_pagemap_scan() of Linux
         * 6.7 to 6.18). To go on from there would find pages again, out of order, and those that
         * were written meanwhile a second time.
         */
        if (seen < arg.walk_end)
            seen = arg.walk_end;
        if (seen <= arg.start) /* an ended process: its memory is gone */
            code = code ? code : ms_fail(error, MS_SYSTEM, ESRCH, arg.start, 0);
        arg.start = seen;
    }
    return code;
}

/*
 * Pages among which all written ones are, and few others where most pages are protected. Not asked
 * is what tells a file's pages from anonymous ones, for which the kernel looks up the page behind
 * each entry: that costs several times as much. (Asking for SCAN_IS_WRITTEN alone would be quicker
 * still, but Linux before 6.9 then takes some swapped pages for protected.)
 */
static int scan_candidates(const ms_guest *guest, struct scan_region *regions,
                           const ms_block *block, ms_ranges *out, ms_error *error)
{
    struct scan_arg arg = {
        .start = block->address,
        .end = block->address + block->pages * MS_PAGE,
        .category_mask = SCAN_IS_WRITTEN,
        .category_anyof_mask = SCAN_IS_PRESENT | SCAN_IS_SWAPPED,
        .return_mask = SCAN_IS_WRITTEN,
    };
    return scan(guest, arg, regions, block, out, error);
}

static int scan_block(const ms_guest *guest, const ms_block *block, int wanted, int protect,
                      ms_ranges *out, ms_error *error)
{
    struct scan_region *regions = malloc(REGIONS * sizeof(*regions));
    ms_ranges where = {0};
    int code = regions ? ms_ranges_push(&where, block->first_page, block->pages, error)
                       : ms_fail(error, MS_NO_MEMORY, ENOMEM, REGIONS, sizeof(*regions));
    if (!code && wanted == MS_WRITTEN) {
        where.n = 0;
        code = scan_candidates(guest, regions, block, &where, error);
    }
    struct scan_arg arg = {
        .flags = protect ? SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC : 0,
        .category_anyof_mask = SCAN_IS_PRESENT | SCAN_IS_SWAPPED,
        .return_mask = SCAN_IS_PFNZERO,
    };
    if (wanted != MS_POPULATED) {
        arg.category_inverted = SCAN_IS_FILE;
        arg.category_mask = SCAN_IS_FILE | (wanted == MS_WRITTEN ? SCAN_IS_WRITTEN : 0);
    }
    for (size_t i = 0; i < where.n && !code;) {
        uint64_t start = where.v[i].page, end = start + where.v[i].count;
        while (++i < where.n && where.v[i].page - end < NEAR)
            end = where.v[i].page + where.v[i].count;
        arg.start = block->address + (start - block->first_page) * MS_PAGE;
        arg.end = block->address + (end - block->first_page) * MS_PAGE;
        code = scan(guest, arg, regions, block, out, error);
    }
    free(where.v);
    free(regions);
    return code;
}

/*
 * Protects a file's pages that are there and not protected: a guest that only reads has many, and
 * each look for written pages would find them anew. Nothing is forgotten: a page that is a file's
 * was not written, and once it is it is anonymous and unprotected. Does nothing without
 * PAGEMAP_SCAN.
 */
int ms_shield(const ms_guest *guest, ms_error *error)
{
    if (!guest->scan)
        return MS_OK;
    /* They have to be listed: without a list the kernel protects whatever is there, anonymous pages
     * as well (pagemap_scan_pmd_entry(), "exclusive WP"). */
    struct scan_region *regions = malloc(REGIONS * sizeof(*regions));
    int code = regions ? MS_OK : ms_fail(error, MS_NO_MEMORY, ENOMEM, REGIONS, sizeof(*regions));
    for (size_t i = 0; i < guest->nblocks && !code; i++) {
        const ms_block *block = &guest->blocks[i];
        ms_ranges found = {0};
        struct scan_arg arg = {
            .flags = SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC,
            .start = block->address,
            .end = block->address + block->pages * MS_PAGE,
            .category_mask = SCAN_IS_WRITTEN | SCAN_IS_PRESENT | SCAN_IS_FILE,
            .return_mask = SCAN_IS_FILE,
        };
        code = scan(guest, arg, regions, block, &found, error);
        free(found.v);
    }
    free(regions);
    return code;
}

/* The way of kernels before 6.7: the same without telling what was written since. */
static int read_entries(const ms_guest *guest, const ms_block *block, int wanted, ms_ranges *out,
                        ms_error *error)
{
    uint64_t *entries = malloc(ENTRIES * sizeof(*entries));
    if (!entries)
        return ms_fail(error, MS_NO_MEMORY, ENOMEM, ENTRIES, sizeof(*entries));
    int code = MS_OK;
    uint64_t avoided = wanted == MS_POPULATED ? 0 : ENTRY_FILE;
    for (uint64_t page = 0; page < block->pages && !code;) {
        uint64_t count = block->pages - page < ENTRIES ? block->pages - page : ENTRIES;
        ssize_t got = pread(guest->pagemap, entries, count * sizeof(*entries),
                            (off_t)((block->address / MS_PAGE + page) * sizeof(*entries)));
        if (got < 0 && errno == EINTR)
            continue;
        if (got < (ssize_t)sizeof(*entries)) {
            code = ms_fail(error, MS_SYSTEM, got < 0 ? errno : ESRCH, page, 0);
            break;
        }
        count = (uint64_t)got / sizeof(*entries);
        for (uint64_t i = 0; i < count && !code; i++)
            if ((entries[i] & (ENTRY_PRESENT | ENTRY_SWAPPED)) && !(entries[i] & avoided))
                code = push(out, block->first_page + page + i, 1, 0, error);
        page += count;
    }
    free(entries);
    return code;
}

/*
 * Appends the wanted pages of one block or of all, ascending. protect: pages found are protected
 * in the same step, so that MS_WRITTEN finds them again only once they are written again.
 */
static int collect(const ms_guest *guest, size_t block, int wanted, int protect, ms_ranges *out,
                   ms_error *error)
{
    if (guest->scan)
        return scan_block(guest, &guest->blocks[block], wanted, protect, out, error);
    if (wanted == MS_WRITTEN || protect)
        return ms_fail(error, MS_SYSTEM, ENOTTY, block, 0);
    return read_entries(guest, &guest->blocks[block], wanted, out, error);
}

int ms_collect_block(const ms_guest *guest, size_t block, int wanted, ms_ranges *out,
                     ms_error *error)
{
    return collect(guest, block, wanted, 0, out, error);
}

int ms_collect(const ms_guest *guest, int wanted, int protect, ms_ranges *out, ms_error *error)
{
    for (size_t i = 0; i < guest->nblocks; i++) {
        int code = collect(guest, i, wanted, protect, out, error);
        if (code)
            return code;
    }
    return MS_OK;
}

/* The address of a page, and how many pages follow it in its block. */
static uint64_t address_of(const ms_guest *guest, uint64_t page, uint64_t *left)
{
    for (size_t i = 0; i < guest->nblocks; i++) {
        const ms_block *block = &guest->blocks[i];
        if (page - block->first_page < block->pages) {
            *left = block->pages - (page - block->first_page);
            return block->address + (page - block->first_page) * MS_PAGE;
        }
    }
    *left = 0;
    return 0;
}

/* One transfer of many pieces; remote[] is used up. write: into the process. */
static int transfer(const ms_guest *guest, uint8_t *local, struct iovec *remote, int n, int write,
                    ms_error *error)
{
    size_t left = 0;
    for (int i = 0; i < n; i++)
        left += remote[i].iov_len;
    while (left) {
        struct iovec here = {local, left};
        ssize_t done = write ? process_vm_writev(guest->pid, &here, 1, remote, (size_t)n, 0)
                             : process_vm_readv(guest->pid, &here, 1, remote, (size_t)n, 0);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return ms_fail(error, MS_REMOTE, done ? errno : EFAULT,
                           (uint64_t)(uintptr_t)remote->iov_base, 0);
        local += done;
        left -= (size_t)done;
        while (n && (size_t)done >= remote->iov_len) {
            done -= (ssize_t)remote->iov_len;
            remote++;
            n--;
        }
        if (n) {
            remote->iov_base = (uint8_t *)remote->iov_base + done;
            remote->iov_len -= (size_t)done;
        }
    }
    return MS_OK;
}

struct share { /* pages [from, to) of what the ranges hold, one after the other */
    const ms_guest *guest;
    const ms_ranges *ranges;
    uint64_t from, to;
    uint8_t *local;
    ms_error error;
};

static void *read_share(void *argument)
{
    struct share *share = argument;
    struct iovec remote[MAX_IOV];
    int n = 0;
    uint64_t position = 0, pending = 0;
    uint8_t *local = share->local;
    share->error.code = MS_OK;
    for (size_t i = 0; i < share->ranges->n && position < share->to; i++) {
        const ms_range *range = &share->ranges->v[i];
        if (range->zero)
            continue;
        uint64_t skip = position < share->from ? share->from - position : 0;
        uint64_t begin = position;
        position += range->count;
        if (skip >= range->count)
            continue;
        uint64_t page = range->page + skip;
        uint64_t left = (position < share->to ? position : share->to) - begin - skip;
        while (left) {
            uint64_t in_block, room = MAX_READ_PAGES - pending;
            uint64_t address = address_of(share->guest, page, &in_block);
            uint64_t part = left < in_block ? left : in_block;
            if (part > room)
                part = room;
            if (!part) {
                ms_fail(&share->error, MS_REMOTE, EFAULT, page, 0);
                return NULL;
            }
            remote[n++] = (struct iovec){(void *)(uintptr_t)address, part * MS_PAGE};
            pending += part;
            page += part;
            left -= part;
            if (n == MAX_IOV || pending == MAX_READ_PAGES) {
                if (transfer(share->guest, local, remote, n, 0, &share->error))
                    return NULL;
                local += pending * MS_PAGE;
                n = 0;
                pending = 0;
            }
        }
    }
    if (n)
        transfer(share->guest, local, remote, n, 0, &share->error);
    return NULL;
}

/* Copies the pages of all ranges (without zero ones) to `to`, ranges->pages * MS_PAGE bytes. */
int ms_read_ranges(const ms_guest *guest, const ms_ranges *ranges, uint8_t *to, int threads,
                   ms_error *error)
{
    uint64_t half = threads > 1 ? ranges->pages / 2 : ranges->pages;
    struct share first = {guest, ranges, 0, half, to, {0}};
    struct share second = {guest, ranges, half, ranges->pages, to + half * MS_PAGE, {0}};
    pthread_t helper;
    int helped = half < ranges->pages && !pthread_create(&helper, NULL, read_share, &second);
    read_share(&first);
    if (helped)
        pthread_join(helper, NULL);
    else if (half < ranges->pages)
        read_share(&second);
    if (first.error.code || second.error.code)
        *error = first.error.code ? first.error : second.error;
    return first.error.code ? first.error.code : second.error.code;
}

/* Up to MS_BATCH pages on their way into the process. */
struct outgoing {
    struct iovec remote[MS_BATCH];
    int n;
    size_t pages;
    uint8_t *data;
};

static int send(const ms_guest *guest, struct outgoing *out, uint64_t *written, ms_error *error)
{
    int code = out->n ? transfer(guest, out->data, out->remote, out->n, 1, error) : MS_OK;
    if (!code)
        *written += out->pages;
    out->n = 0;
    out->pages = 0;
    return code;
}

static void add(struct outgoing *out, uint64_t address, uint64_t count)
{
    struct iovec *last = out->n ? &out->remote[out->n - 1] : NULL;
    if (last && (uint64_t)(uintptr_t)last->iov_base + last->iov_len == address)
        last->iov_len += count * MS_PAGE;
    else
        out->remote[out->n++] = (struct iovec){(void *)(uintptr_t)address, count * MS_PAGE};
    out->pages += count;
}

/* Takes back from the last `count` pages of `out` those that the process has already. */
static int keep_differing(const ms_guest *guest, struct outgoing *out, uint64_t address,
                          uint64_t count, uint8_t *live, ms_error *error)
{
    struct iovec remote = {(void *)(uintptr_t)address, count * MS_PAGE};
    int code = transfer(guest, live, &remote, 1, 0, error);
    uint8_t *next = out->data + out->pages * MS_PAGE, *page = next;
    for (uint64_t i = 0; i < count && !code; i++, page += MS_PAGE) {
        if (ms_page_equal(page, live + i * MS_PAGE))
            continue;
        if (page != next)
            memcpy(next, page, MS_PAGE);
        next += MS_PAGE;
        add(out, address + i * MS_PAGE, 1);
    }
    return code;
}

struct patch_share { /* pages [from, to) of what the segments hold, one after the other */
    const ms_guest *guest;
    const ms_pack *packs;
    const ms_segment *segments;
    size_t n;
    uint64_t from, to, written;
    ms_error error;
};

/* One segment's pages [at, end), gathered into out and sent whenever that is full. */
static int patch_segment(const struct patch_share *share, const ms_segment *s, uint64_t at,
                         uint64_t end, struct outgoing *out, uint8_t *live, uint64_t *written,
                         ms_error *error)
{
    int code = MS_OK;
    while (at < end && !code) {
        if (out->pages == MS_BATCH)
            code = send(share->guest, out, written, error);
        uint64_t in_block, count = MS_BATCH - out->pages;
        uint64_t address = address_of(share->guest, s->page + at, &in_block);
        if (count > end - at)
            count = end - at;
        if (count > in_block)
            count = in_block;
        if (!code && !count)
            code = ms_fail(error, MS_REMOTE, EFAULT, s->page + at, 0);
        if (code)
            break;
        uint8_t *to = out->data + out->pages * MS_PAGE;
        if (s->a_pack == MS_ZERO)
            memset(to, 0, (size_t)count * MS_PAGE);
        else
            code = ms_pack_read_checked(share->packs, s->a_pack, s->a_slot + at, count, to, NULL,
                                        error);
        if (!code && s->b_pack == MS_LIVE)
            code = keep_differing(share->guest, out, address, count, live, error);
        else if (!code)
            add(out, address, count);
        at += count;
    }
    return code;
}

static void *patch_part(void *argument)
{
    struct patch_share *share = argument;
    ms_error *error = &share->error;
    error->code = MS_OK;
    struct outgoing out = {.data = ms_batch_new(error)};
    uint8_t *live = ms_batch_new(error);
    int code = out.data && live ? MS_OK : MS_NO_MEMORY;
    uint64_t position = 0;
    for (size_t i = 0; i < share->n && position < share->to && !code; i++) {
        const ms_segment *s = &share->segments[i];
        uint64_t begin = position;
        position += s->count;
        if (position <= share->from)
            continue;
        uint64_t first = begin < share->from ? share->from - begin : 0;
        uint64_t end = position < share->to ? s->count : share->to - begin;
        code = patch_segment(share, s, first, end, &out, live, &share->written, error);
    }
    if (!code)
        send(share->guest, &out, &share->written, error);
    free(out.data);
    free(live);
    return NULL;
}

/*
 * Makes pages of the process what side a of the segments says; side b is what it holds now, or
 * MS_LIVE for segments that are compared first. Every page is checked before it goes in. written:
 * pages that were. Shared between two threads where there is much.
 */
int ms_patch(const ms_guest *guest, const ms_pack *packs, const ms_segment *segments, size_t n,
             uint64_t *written, ms_error *error)
{
    uint64_t pages = 0;
    for (size_t i = 0; i < n; i++)
        pages += segments[i].count;
    uint64_t half = pages < 2 * MS_BATCH ? pages : pages / 2;
    struct patch_share first = {guest, packs, segments, n, 0, half, 0, {0}};
    struct patch_share second = {guest, packs, segments, n, half, pages, 0, {0}};
    pthread_t helper;
    int helped = half < pages && !pthread_create(&helper, NULL, patch_part, &second);
    patch_part(&first);
    if (helped)
        pthread_join(helper, NULL);
    else if (half < pages)
        patch_part(&second);
    *written = first.written + second.written;
    if (first.error.code || second.error.code)
        *error = first.error.code ? first.error : second.error;
    return first.error.code ? first.error.code : second.error.code;
}

/* A copy of another process' descriptor, or -1 and errno. Needs permission to ptrace it. */
int ms_pidfd_getfd(int pidfd, int fd)
{
    return (int)syscall(SYS_pidfd_getfd, pidfd, fd, 0);
}

/* Gives every page of a private mapping its memory now. 0, or errno. */
int ms_prefault(uint8_t *buffer, size_t length)
{
    madvise(buffer, length, MADV_HUGEPAGE); /* only advice */
    if (madvise(buffer, length, MADV_POPULATE_WRITE) == 0)
        return 0;
    if (errno != EINVAL) /* before Linux 5.14 it is unknown */
        return errno;
    for (size_t at = 0; at < length; at += MS_PAGE)
        ((volatile uint8_t *)buffer)[at] = 0;
    return 0;
}
