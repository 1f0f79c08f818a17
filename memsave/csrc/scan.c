/* Which pages of a process are private to it, and which of them were written.
 *
 * On a private file mapping (and in anonymous memory) a page that is anonymous is one that was written
 * since the mapping was made. PAGEMAP_SCAN finds them without looking at absent ones; structures and
 * numbers from Linux 6.7's include/uapi/linux/fs.h, which Debian 12's headers lack. */
#include "memsave.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define PAGE_IS_WRITTEN (1u << 1)
#define PAGE_IS_FILE (1u << 2)
#define PAGE_IS_PRESENT (1u << 3)
#define PAGE_IS_SWAPPED (1u << 4)
#define PAGE_IS_PFNZERO (1u << 5)
#define PM_SCAN_WP_MATCHING (1u << 0)
#define PM_SCAN_CHECK_WPASYNC (1u << 1)

struct page_region {
    uint64_t start, end, categories;
};

struct pm_scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted,
        category_mask, category_anyof_mask, return_mask;
};
_Static_assert(sizeof(struct pm_scan_arg) == 96, "linux/fs.h");
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)

#define REGIONS 512

static int append(ms_run *runs, uint64_t capacity, uint64_t *used, uint64_t first, uint64_t count)
{
    if (*used && runs[*used - 1].first + runs[*used - 1].count == first) {
        runs[*used - 1].count += count;
        return 1;
    }
    if (*used == capacity)
        return 0;
    runs[*used].first = first;
    runs[(*used)++].count = count;
    return 1;
}

int64_t ms_scan(int pagemap, uint64_t address, uint64_t pages, int written, int protect, ms_run *runs,
                uint64_t capacity, uint64_t *next)
{
    struct page_region found[REGIONS];
    uint64_t used = 0, end = address + pages * MS_PAGE;
    struct pm_scan_arg arg = {
        .size = sizeof arg,
        .flags = protect ? PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC : 0,
        .start = address + *next * MS_PAGE,
        .end = end,
        .vec = (uint64_t)(uintptr_t)found,
        .category_inverted = PAGE_IS_FILE | PAGE_IS_PFNZERO,
        .category_mask = PAGE_IS_FILE | PAGE_IS_PFNZERO | (written ? PAGE_IS_WRITTEN : 0),
        .category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        .return_mask = PAGE_IS_PRESENT,
    };

    while (arg.start < end) {
        uint64_t room = capacity - used;
        /* What is found is protected at once, so no more may be found than there is room for. */
        arg.vec_len = room < REGIONS ? room : REGIONS;
        if (!arg.vec_len)
            break;
        arg.walk_end = arg.start;
        int n = ioctl(pagemap, PAGEMAP_SCAN, &arg);
        if (n < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        for (int i = 0; i < n; i++)
            append(runs, capacity, &used, (found[i].start - address) / MS_PAGE,
                   (found[i].end - found[i].start) / MS_PAGE);
        if (arg.walk_end <= arg.start)
            return -EIO; /* a kernel that makes no progress must not hang a paused guest */
        arg.start = arg.walk_end;
    }
    *next = (arg.start - address) / MS_PAGE;
    return (int64_t)used;
}

#define ENTRIES 4096

int64_t ms_scan_entries(int pagemap, uint64_t address, uint64_t pages, ms_run *runs,
                        uint64_t capacity, uint64_t *next)
{
    uint64_t entries[ENTRIES], used = 0, page = *next;

    while (page < pages) {
        uint64_t want = pages - page < ENTRIES ? pages - page : ENTRIES;
        off_t at = (off_t)((address / MS_PAGE + page) * sizeof entries[0]);
        ssize_t got = pread(pagemap, entries, want * sizeof entries[0], at);
        if (got < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (got == 0 || got % (ssize_t)sizeof entries[0])
            return -EIO;
        uint64_t n = (uint64_t)got / sizeof entries[0];
        for (uint64_t i = 0; i < n; i++) {
            int present = (entries[i] >> 63) & 1, swapped = (entries[i] >> 62) & 1;
            int file = (entries[i] >> 61) & 1; /* file page or shared anonymous */
            if ((present || swapped) && !file && !append(runs, capacity, &used, page + i, 1)) {
                *next = page + i;
                return (int64_t)used;
            }
        }
        page += n;
    }
    *next = page;
    return (int64_t)used;
}

int ms_register(int uffd, uint64_t address, uint64_t bytes)
{
    struct uffdio_register arg = {.range = {.start = address, .len = bytes},
                                  .mode = UFFDIO_REGISTER_MODE_WP};
    return ioctl(uffd, UFFDIO_REGISTER, &arg) == 0 ? 0 : -errno;
}
