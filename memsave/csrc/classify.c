/*
 * Canonicalising: what captured pages are in terms of the pages that are stored already, and
 * storing those that are new. Bytes are compared, never hashes.
 */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MAX_IOV = 512 };

/*
 * Reads the stored pages of up to MS_BATCH copies into to[i*MS_PAGE], neighbouring slots in one
 * read. Leaves out zero pages and those for which skip[i] is set.
 */
static int gather(const ms_pack *packs, const uint64_t *slots, const uint32_t *in,
                  const uint8_t *skip, size_t n, uint8_t *to, ms_error *error)
{
    for (size_t i = 0; i < n;) {
        if (in[i] == MS_ZERO || (skip && skip[i])) {
            i++;
            continue;
        }
        size_t end = i + 1;
        while (end < n && !(skip && skip[end]) && in[end] == in[i] &&
               slots[end] == slots[i] + (end - i))
            end++;
        int code = ms_pack_read(packs, in[i], slots[i], end - i, to + i * MS_PAGE, error);
        if (code)
            return code;
        i = end;
    }
    return MS_OK;
}

/*
 * Says for each copy (ascending pages) which kind it is, and hashes those that are new.
 * base_*: where the base map has each page; parent_*: the same of the parent, or NULL.
 * A page that is unchanged is MS_SAME_AS_BASE, also if it is zero in both.
 */
int ms_classify(const ms_pack *packs, const ms_copy *copies, size_t n, const uint64_t *base_slots,
                const uint32_t *base_packs, const uint64_t *parent_slots,
                const uint32_t *parent_packs, uint8_t *kinds, uint64_t *hashes, ms_error *error)
{
    static const uint8_t zero_page[MS_PAGE];
    uint8_t skip[MS_BATCH];
    uint8_t *stored = ms_batch_new(error);
    int code = stored ? MS_OK : MS_NO_MEMORY;
    for (size_t first = 0; first < n && !code; first += MS_BATCH) {
        size_t count = n - first < MS_BATCH ? n - first : MS_BATCH;
        size_t open = 0; /* pages that the parent may still have */
        code = gather(packs, base_slots + first, base_packs + first, NULL, count, stored, error);
        for (size_t i = 0; i < count && !code; i++) {
            size_t at = first + i;
            const uint8_t *data = copies[at].data ? copies[at].data : zero_page;
            int now_zero = data == zero_page || ms_page_zero(data);
            int same = base_packs[at] == MS_ZERO
                           ? now_zero
                           : !now_zero && ms_page_equal(data, stored + i * MS_PAGE);
            kinds[at] = same ? MS_SAME_AS_BASE : now_zero ? MS_NOW_ZERO : MS_NEW;
            skip[i] = !(kinds[at] == MS_NEW && parent_packs && parent_packs[at] != MS_ZERO &&
                        (parent_packs[at] != base_packs[at] ||
                         parent_slots[at] != base_slots[at]));
            open += !skip[i];
        }
        if (open && !code) {
            code = gather(packs, parent_slots + first, parent_packs + first, skip, count, stored,
                          error);
            for (size_t i = 0; i < count && !code; i++)
                if (!skip[i] && ms_page_equal(copies[first + i].data, stored + i * MS_PAGE))
                    kinds[first + i] = MS_SAME_AS_PARENT;
        }
        for (size_t i = first; i < first + count && !code; i++)
            if (kinds[i] == MS_NEW)
                hashes[i] = ms_page_hash(copies[i].data);
    }
    free(stored);
    return code;
}

static int put(int fd, struct iovec *iov, int n, uint64_t offset, ms_error *error)
{
    while (n) {
        ssize_t done = pwritev(fd, iov, n, (off_t)offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return ms_fail(error, MS_SYSTEM, done ? errno : EIO, offset, 0);
        offset += (uint64_t)done;
        while (n && (size_t)done >= iov->iov_len) {
            done -= (ssize_t)iov->iov_len;
            iov++;
            n--;
        }
        if (n) {
            iov->iov_base = (uint8_t *)iov->iov_base + done;
            iov->iov_len -= (size_t)done;
        }
    }
    return MS_OK;
}

/* Writes the new pages: flat: at slot = page; else from *next_slot on, which moves. */
int ms_write_new(int fd, const ms_copy *copies, const uint8_t *kinds, size_t n, int flat,
                 uint64_t *next_slot, ms_error *error)
{
    struct iovec iov[MAX_IOV];
    int used = 0;
    uint64_t begin = 0, end = 0; /* slots of what iov holds */
    for (size_t i = 0; i < n; i++) {
        if (kinds[i] != MS_NEW)
            continue;
        uint64_t slot = flat ? copies[i].page : (*next_slot)++;
        if (used && (slot != end || used == MAX_IOV)) {
            int code = put(fd, iov, used, begin * MS_PAGE, error);
            if (code)
                return code;
            used = 0;
        }
        if (!used)
            begin = slot;
        struct iovec *last = used ? &iov[used - 1] : NULL;
        if (last && (const uint8_t *)last->iov_base + last->iov_len == copies[i].data)
            last->iov_len += MS_PAGE;
        else
            iov[used++] = (struct iovec){(void *)(uintptr_t)copies[i].data, MS_PAGE};
        end = slot + 1;
    }
    return used ? put(fd, iov, used, begin * MS_PAGE, error) : MS_OK;
}

/* Turns the outcome of ms_classify into runs to lay over the base map. */
int ms_apply(const ms_copy *copies, const uint8_t *kinds, const uint64_t *parent_slots,
             const uint32_t *parent_packs, size_t n, uint32_t new_pack, int flat,
             uint64_t *next_slot, ms_runs *updates, ms_error *error)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t slot = 0;
        uint32_t pack = MS_ZERO;
        switch (kinds[i]) {
        case MS_SAME_AS_BASE:
            continue;
        case MS_SAME_AS_PARENT:
            slot = parent_slots[i];
            pack = parent_packs[i];
            break;
        case MS_NEW:
            slot = flat ? copies[i].page : (*next_slot)++;
            pack = new_pack;
            break;
        default:
            break;
        }
        int code = ms_runs_push(updates, copies[i].page, slot, 1, pack, error);
        if (code)
            return code;
    }
    return MS_OK;
}

/* Packs the hashes of new pages together, in their order; returns how many there are. */
size_t ms_new_hashes(const uint8_t *kinds, const uint64_t *hashes, size_t n, uint64_t *out)
{
    size_t used = 0;
    for (size_t i = 0; i < n; i++)
        if (kinds[i] == MS_NEW)
            out[used++] = hashes[i];
    return used;
}

/* counts[k] += pages of kind k, for the four kinds. */
void ms_count_kinds(const uint8_t *kinds, size_t n, uint64_t *counts)
{
    for (size_t i = 0; i < n; i++)
        counts[kinds[i]]++;
}
