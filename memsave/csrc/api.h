/*
 * What the C core offers to Python. cffi reads this file too: only types, enums and prototypes,
 * lines that begin with '#' are skipped there.
 *
 * Every fallible function returns 0 or an ms_code, and describes a failure in *error, which comes
 * last. No function keeps a pointer that it was given. All numbers of pages and slots are in units
 * of MS_PAGE bytes.
 */
#ifndef MEMSAVE_API_H
#define MEMSAVE_API_H
#include <stddef.h>
#include <stdint.h>

enum ms_constant { MS_PAGE = 4096, MS_BATCH = 256 /* pages handled at a time: 1 MiB */ };

enum ms_code {
    MS_OK = 0,
    MS_NO_MEMORY,
    MS_SYSTEM,        /* a system call failed: err */
    MS_PACK_READ,     /* pack a, slot b: err, 0 at the end of the file */
    MS_PACK_CHECKSUM, /* pack a, slot b */
    MS_PACK_UNUSED,   /* pack a, slot b is not in use */
    MS_PACK_ZERO,     /* pack a, slot b holds an all-zero page */
    MS_REMOTE,        /* memory of the process at page a: err */
    MS_RUN_EMPTY,     /* run a has no pages */
    MS_RUN_ORDER,     /* run a begins before the end of the one before it */
    MS_RUN_OUTSIDE,   /* run a ends behind the last page or slot */
    MS_RUN_PACK,      /* run a names pack b, which the table does not have */
    MS_RUN_SPLIT,     /* runs a-1 and a could be one */
    MS_SPAN_COUNT,    /* the spans hold a slots, not b */
    MS_XEN_STREAM     /* a domain's stream is not what it must be: ms_xen.why says it */
};

typedef struct {
    int code;
    int err;
    uint64_t a, b;
} ms_error;

/* Pages [page, page+count) are in slots [slot, slot+count) of pack number pack. As stored. */
typedef struct {
    uint64_t page, slot;
    uint32_t count, pack;
} ms_run;

/* Growable, sorted by page, pages in no run are zero. Made by ms_runs_new, freed by the caller. */
typedef struct {
    ms_run *v;
    size_t n, cap;
} ms_runs;

/* Pages where two maps refer to different things: sides a and b. */
typedef struct {
    uint64_t page, count, a_slot, b_slot;
    uint32_t a_pack, b_pack;
} ms_segment;

typedef struct {
    ms_segment *v;
    size_t n, cap;
} ms_segments;

/* Slots [first, first+count) of a pack are in use. As stored. */
typedef struct {
    uint64_t first, count;
} ms_span;

/* An open pack. before[i]: slots in use ahead of span i; sums: one per slot in use. Borrowed. */
typedef struct {
    int fd;
    uint64_t slots, used;
    const ms_span *spans;
    uint64_t *before;
    size_t nspans;
    const uint64_t *sums;
} ms_pack;

/* Pages found in a process. zero: the kernel says that they are the shared zero page. */
typedef struct {
    uint64_t page, count, zero;
} ms_range;

typedef struct {
    ms_range *v;
    size_t n, cap;
    uint64_t pages; /* in ranges that are not zero */
} ms_ranges;

/* One captured page; data NULL: all zero. Whoever made the copy keeps the memory behind data. */
typedef struct {
    uint64_t page;
    const uint8_t *data;
} ms_copy;

typedef struct {
    ms_copy *v;
    size_t n, cap;
} ms_copies;

/* A RAM block: its first global page and its address in the process. */
typedef struct {
    uint64_t first_page, pages, address;
} ms_block;

/* A process whose memory is read. scan: use PAGEMAP_SCAN; pagemap: /proc/PID/pagemap. */
typedef struct {
    int pid, pagemap, scan;
    size_t nblocks;
    ms_block *blocks;
} ms_guest;

enum ms_wanted {
    MS_ANONYMOUS, /* pages that are anonymous memory: written since the mapping was made */
    MS_WRITTEN,   /* of those, the ones written since they were last protected */
    MS_POPULATED  /* pages that are there at all */
};

/* What a page of a domain is, as ms_xen.types has it: 0 if the domain has no such page, else one
 * more than the type in the stream (XEN_DOMCTL_PFINFO_*, without its shift). */
enum ms_xen_page {
    MS_XEN_ABSENT = 0,
    MS_XEN_NORMAL = 1,
    MS_XEN_TABLE = 2,     /* level 1 to 4 of a page table: up to 5 */
    MS_XEN_PIN = 8,       /* added to a level: pinned */
    MS_XEN_ALLOCATED = 15 /* there, and without content */
};
enum ms_xen_guest { MS_XEN_PV = 1, MS_XEN_HVM = 2 };
enum ms_xen_role { MS_XEN_STORE, MS_XEN_CONSOLE, MS_XEN_ROLES };

/* A record of a libxc stream that is not memory, as it came. */
typedef struct {
    uint32_t type, length;
    uint8_t *data;
} ms_xen_record;

/* A domain out of a stream, or to be written to one. Page p is at byte p * MS_PAGE of the file
 * `content` where bit p of `held` is set, and all zero where it is not. */
typedef struct {
    int content; /* borrowed */
    uint32_t guest, xen_major, xen_minor;
    uint64_t pages, max_pages;
    uint64_t named, sent; /* pages that a stream named, brought; one that came again counts again */
    uint8_t *types;
    uint8_t *held;
    ms_xen_record *records;
    size_t n, cap, bytes;   /* records; the bytes of all of them */
    uint8_t *frames[MS_XEN_ROLES]; /* the rings shared with xenstored and xenconsoled, or NULL */
    uint64_t frame_pages[MS_XEN_ROLES];
    char why[160];
} ms_xen;

enum ms_kind { MS_SAME_AS_BASE, MS_SAME_AS_PARENT, MS_NOW_ZERO, MS_NEW };

/* -- kernels.c: one page; ms_scalar_* are the references of the faster ones ------------------ */
const char *ms_kernels(void);
int ms_page_zero(const uint8_t *page);
int ms_page_equal(const uint8_t *a, const uint8_t *b);
uint64_t ms_page_hash(const uint8_t *page);
uint64_t ms_hash(const uint8_t *data, size_t length);
int ms_scalar_zero(const uint8_t *page);
int ms_scalar_equal(const uint8_t *a, const uint8_t *b);
uint64_t ms_scalar_hash(const uint8_t *data, size_t length);

/* -- runs.c ---------------------------------------------------------------------------------- */
ms_runs *ms_runs_new(void);
void ms_runs_free(ms_runs *runs);
int ms_runs_push(ms_runs *runs, uint64_t page, uint64_t slot, uint64_t count, uint32_t pack,
                 ms_error *error);
int ms_runs_check(const ms_run *runs, size_t n, uint64_t pages, uint32_t packs, uint8_t *used,
                  ms_error *error);
int ms_runs_copy(const ms_run *from, size_t n, const uint32_t *pack_table, ms_runs *out,
                 ms_error *error);
int ms_runs_overlay(const ms_runs *below, const ms_runs *above, ms_runs *out, ms_error *error);
void ms_runs_lookup(const ms_runs *runs, const ms_copy *copies, size_t n, uint64_t *slots,
                    uint32_t *packs);
uint64_t ms_runs_pages(const ms_runs *runs);
void ms_runs_by_pack(const ms_runs *runs, uint64_t *pages);
ms_segments *ms_segments_new(void);
void ms_segments_free(ms_segments *segments);
int ms_runs_differ(const ms_runs *a, const ms_runs *b, uint64_t first, uint64_t end,
                   ms_segments *out, ms_error *error);
int ms_runs_over_live(const ms_runs *wanted, const ms_ranges *populated, uint64_t first,
                      uint64_t end, ms_segments *out, ms_error *error);

/* -- packs.c --------------------------------------------------------------------------------- */
int ms_pack_read_checked(const ms_pack *packs, uint32_t pack, uint64_t slot, uint64_t count,
                         uint8_t *to, uint64_t *sums, ms_error *error);
int ms_runs_in_use(const ms_pack *packs, const ms_runs *runs, ms_runs *out, ms_error *error);
int ms_pack_check(ms_pack *pack, ms_error *error);
int ms_verify(const ms_pack *packs, const ms_run *runs, size_t n, ms_error *error);
int ms_restore_run(const ms_pack *packs, const ms_run *run, int fd, uint64_t *sums,
                   ms_error *error);
int ms_fold(const ms_pack *packs, const ms_runs *runs, const uint8_t *folded, uint32_t new_pack,
            int fd, uint64_t slot, uint64_t *sums, ms_runs *out, ms_error *error);
int ms_diff(const ms_pack *packs, const ms_segment *segments, size_t n, ms_runs *out,
            ms_error *error);

/* -- classify.c ------------------------------------------------------------------------------ */
int ms_classify(const ms_pack *packs, const ms_copy *copies, size_t n, const uint64_t *base_slots,
                const uint32_t *base_packs, const uint64_t *parent_slots,
                const uint32_t *parent_packs, uint8_t *kinds, uint64_t *hashes, ms_error *error);
int ms_write_new(int fd, const ms_copy *copies, const uint8_t *kinds, size_t n, int flat,
                 uint64_t *next_slot, ms_error *error);
int ms_apply(const ms_copy *copies, const uint8_t *kinds, const uint64_t *parent_slots,
             const uint32_t *parent_packs, size_t n, uint32_t new_pack, int flat,
             uint64_t *next_slot, ms_runs *updates, ms_error *error);
size_t ms_new_hashes(const uint8_t *kinds, const uint64_t *hashes, size_t n, uint64_t *out);
void ms_count_kinds(const uint8_t *kinds, size_t n, uint64_t *counts);

/* -- guest.c --------------------------------------------------------------------------------- */
ms_ranges *ms_ranges_new(void);
void ms_ranges_free(ms_ranges *ranges);
int ms_ranges_push(ms_ranges *ranges, uint64_t page, uint64_t count, ms_error *error);
int ms_ranges_reserve(ms_ranges *ranges, size_t n, ms_error *error);
ms_copies *ms_copies_new(void);
void ms_copies_free(ms_copies *copies);
int ms_copies_merge(const ms_copies *older, const ms_ranges *ranges, const uint8_t *data,
                    ms_copies *out, ms_error *error);
uint64_t ms_copies_pages(const ms_copies *copies);
int ms_can_scan(int pagemap, uint64_t address);
int ms_collect(const ms_guest *guest, int wanted, int protect, ms_ranges *out, ms_error *error);
int ms_collect_block(const ms_guest *guest, size_t block, int wanted, ms_ranges *out,
                     ms_error *error);
int ms_shield(const ms_guest *guest, ms_error *error);
int ms_read_ranges(const ms_guest *guest, const ms_ranges *ranges, uint8_t *to, int threads,
                   ms_error *error);
int ms_patch(const ms_guest *guest, const ms_pack *packs, const ms_segment *segments, size_t n,
             uint64_t *written, ms_error *error);

/* -- xen_read.c, xen_canonical.c, xen_write.c ------------------------------------------------ */
ms_xen *ms_xen_new(int content, uint64_t max_pages);
void ms_xen_free(ms_xen *xen);
int ms_xen_add_record(ms_xen *xen, uint32_t type, const uint8_t *data, uint32_t length,
                      ms_error *error);
int ms_xen_read(ms_xen *xen, int fd, ms_error *error);
int ms_xen_canonical(ms_xen *xen, ms_error *error);
int ms_xen_set_frame(ms_xen *xen, int role, uint64_t page, const uint8_t *data, ms_error *error);
int ms_xen_copies(const ms_xen *xen, const uint8_t *mapped, ms_copies *out, ms_error *error);
int ms_xen_hold(ms_xen *xen, const ms_runs *runs, ms_error *error);
int ms_xen_write(ms_xen *xen, int fd, ms_error *error);

int ms_pidfd_getfd(int pidfd, int fd);
int ms_prefault(uint8_t *buffer, size_t length);
#endif
