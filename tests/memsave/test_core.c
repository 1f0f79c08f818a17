/*
 * The C core without Python, for the sanitisers: run lists, packs, classification, a process' own
 * memory as the guest. Prints what fails; exit status 0 if nothing does. Argument: a directory.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core.h"

static int failures;
#define CHECK(holds) \
    do { \
        if (!(holds)) { \
            printf("line %d: %s\n", __LINE__, #holds); \
            failures++; \
        } \
    } while (0)

static uint64_t state = 88172645463325252u;

static uint64_t draw(uint64_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % below;
}

static void fill(uint8_t *page, uint64_t seed)
{
    for (int i = 0; i < MS_PAGE; i++)
        page[i] = (uint8_t)(seed * 31 + (uint64_t)i * 7 + 1);
}

/* Every kernel against the scalar reference, at every byte of a page and unaligned. */
static void kernels(void)
{
    uint8_t *a = malloc(MS_PAGE + 64), *b = malloc(MS_PAGE + 64);
    for (int shift = 0; shift < 3; shift++) {
        uint8_t *x = a + shift, *y = b + 2 * shift;
        memset(x, 0, MS_PAGE);
        memset(y, 0, MS_PAGE);
        CHECK(ms_page_zero(x) && ms_scalar_zero(x) && ms_page_equal(x, y));
        for (int i = 0; i < MS_PAGE; i++) {
            x[i] = (uint8_t)(1u << (i % 8));
            CHECK(!ms_page_zero(x) && !ms_scalar_zero(x));
            CHECK(!ms_page_equal(x, y) && !ms_scalar_equal(x, y));
            CHECK(ms_page_hash(x) == ms_scalar_hash(x, MS_PAGE));
            y[i] = x[i];
            CHECK(ms_page_equal(x, y) && ms_scalar_equal(x, y));
        }
    }
    for (size_t length = 0; length <= MS_PAGE; length += 1 + length / 16)
        CHECK(ms_hash(a, length) == ms_scalar_hash(a, length));
    /* The negative control of "unused length": one byte more is another hash. */
    CHECK(ms_hash(a, 100) != ms_hash(a, 101));
    free(a);
    free(b);
}

enum { PAGES = 200 };

/* The dense model of a run list: pack and slot of each page. */
struct model {
    uint32_t pack[PAGES];
    uint64_t slot[PAGES];
};

static void model_of(const ms_runs *runs, struct model *model)
{
    for (int i = 0; i < PAGES; i++)
        model->pack[i] = MS_ZERO;
    for (size_t i = 0; i < runs->n; i++)
        for (uint32_t k = 0; k < runs->v[i].count; k++) {
            model->pack[runs->v[i].page + k] = runs->v[i].pack;
            model->slot[runs->v[i].page + k] = runs->v[i].slot + k;
        }
}

static ms_runs *random_runs(int with_zero)
{
    ms_error error;
    ms_runs *runs = ms_runs_new();
    for (uint64_t page = draw(8); page < PAGES; page += draw(6)) {
        uint64_t count = 1 + draw(9);
        if (count > PAGES - page)
            count = PAGES - page;
        uint32_t pack = with_zero && !draw(3) ? MS_ZERO : (uint32_t)draw(3);
        CHECK(!ms_runs_push(runs, page, draw(2) ? page : draw(50), count, pack, &error));
        page += count;
    }
    return runs;
}

static void run_lists(void)
{
    ms_error error;
    for (int round = 0; round < 300; round++) {
        ms_runs *low = random_runs(0), *high = random_runs(1), *out = ms_runs_new();
        struct model a, b, c;
        model_of(low, &a);
        model_of(high, &b);
        CHECK(!ms_runs_overlay(low, high, out, &error));
        model_of(out, &c);
        uint8_t covered[PAGES] = {0}, used[3] = {0};
        for (size_t i = 0; i < high->n; i++)
            memset(covered + high->v[i].page, 1, high->v[i].count);
        for (int i = 0; i < PAGES; i++) {
            const struct model *from = covered[i] ? &b : &a;
            CHECK(c.pack[i] == from->pack[i]);
            CHECK(c.pack[i] == MS_ZERO || c.slot[i] == from->slot[i]);
        }
        CHECK(!ms_runs_check(out->v, out->n, PAGES, 3, used, &error));
        ms_segments *segments = ms_segments_new();
        CHECK(!ms_runs_differ(low, out, 0, PAGES, segments, &error));
        uint8_t differ[PAGES] = {0};
        for (size_t i = 0; i < segments->n; i++)
            memset(differ + segments->v[i].page, 1, segments->v[i].count);
        for (int i = 0; i < PAGES; i++)
            CHECK(differ[i] == (a.pack[i] != c.pack[i] ||
                                (a.pack[i] != MS_ZERO && a.slot[i] != c.slot[i])));
        ms_segments_free(segments);
        ms_runs_free(low);
        ms_runs_free(high);
        ms_runs_free(out);
    }
    /* A run longer than 32 bits is stored as several. */
    ms_runs *runs = ms_runs_new();
    CHECK(!ms_runs_push(runs, 0, 0, UINT64_C(0x100000010), 0, &error));
    CHECK(runs->n == 2 && ms_runs_pages(runs) == UINT64_C(0x100000010));
    uint8_t used[1];
    CHECK(!ms_runs_check(runs->v, runs->n, UINT64_C(1) << 36, 1, used, &error));
    CHECK(ms_runs_check(runs->v, runs->n, 100, 1, used, &error) == MS_RUN_OUTSIDE);
    ms_runs_free(runs);
}

/* A guest that is this process: captured, stored, changed, captured, put back. */
static void round_trip(const char *directory, int scan)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/core.pack", directory);
    ms_error error = {0, 0, 0, 0};
    uint8_t *memory = mmap(NULL, PAGES * MS_PAGE, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ms_block block = {0, PAGES, (uint64_t)(uintptr_t)memory};
    int pagemap = open("/proc/self/pagemap", O_RDONLY);
    ms_guest guest = {getpid(), pagemap, scan && ms_can_scan(pagemap, block.address), 1, &block};
    for (int i = 0; i < PAGES; i += 1 + i / 10)
        fill(memory + i * MS_PAGE, (uint64_t)i);
    ms_ranges *ranges = ms_ranges_new();
    CHECK(!ms_ranges_reserve(ranges, 10, &error));
    CHECK(!ms_collect(&guest, MS_ANONYMOUS, 0, ranges, &error));
    uint8_t *data = malloc((ranges->pages + 1) * MS_PAGE);
    CHECK(!ms_read_ranges(&guest, ranges, data, 2, &error));
    ms_copies *none = ms_copies_new(), *copies = ms_copies_new();
    CHECK(!ms_copies_merge(none, ranges, data, copies, &error));
    size_t n = copies->n;
    uint64_t *slots = calloc(n, 8), *hashes = calloc(n, 8), *sums = calloc(n, 8);
    uint32_t *packs = malloc(n * 4);
    uint8_t *kinds = malloc(n);
    memset(packs, 0xff, n * 4);
    CHECK(!ms_classify(NULL, copies->v, n, slots, packs, NULL, NULL, kinds, hashes, &error));
    uint64_t next = 0;
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(!ms_write_new(fd, copies->v, kinds, n, 0, &next, &error));
    uint64_t stored = next;
    CHECK(ms_new_hashes(kinds, hashes, n, sums) == stored);
    ms_runs *runs = ms_runs_new();
    next = 0;
    CHECK(!ms_apply(copies->v, kinds, NULL, NULL, n, 0, 0, &next, runs, &error));
    ms_span span = {0, stored};
    uint64_t before[1];
    ms_pack pack = {fd, stored, stored, &span, before, 1, sums};
    CHECK(!ms_pack_check(&pack, &error));
    CHECK(!ms_verify(&pack, runs->v, runs->n, &error));
    /* Nothing has changed: everything is as in the base. */
    ms_runs_lookup(runs, copies->v, n, slots, packs);
    CHECK(!ms_classify(&pack, copies->v, n, slots, packs, slots, packs, kinds, hashes, &error));
    uint64_t counts[4] = {0};
    ms_count_kinds(kinds, n, counts);
    CHECK(counts[MS_SAME_AS_BASE] == n);
    /* Folded into a file behind two other slots: the same pages, the same checksums. */
    uint8_t folded[2] = {1, 0};
    uint64_t again[PAGES];
    ms_runs *moved = ms_runs_new();
    char other[4096];
    snprintf(other, sizeof other, "%s/folded.pack", directory);
    int to = open(other, O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(!ms_fold(&pack, runs, folded, 1, to, 2, again, moved, &error));
    CHECK(ms_runs_pages(moved) == stored && !memcmp(again, sums, stored * 8));
    ms_span behind = {2, stored};
    uint64_t none_before[1];
    ms_pack both[2] = {pack, {to, stored + 2, stored, &behind, none_before, 1, again}};
    CHECK(!ms_pack_check(&both[1], &error));
    CHECK(!ms_verify(both, moved->v, moved->n, &error));
    uint64_t by_pack[2] = {0};
    ms_runs_by_pack(moved, by_pack);
    CHECK(by_pack[0] == 0 && by_pack[1] == stored);
    ms_segments *unlike = ms_segments_new();
    ms_runs *differing = ms_runs_new();
    CHECK(!ms_runs_differ(runs, moved, 0, PAGES, unlike, &error));
    CHECK(unlike->n && !ms_diff(both, unlike->v, unlike->n, differing, &error));
    CHECK(differing->n == 0);
    folded[0] = 0; /* the control: nothing to fold, nothing moves */
    ms_runs *kept = ms_runs_new();
    CHECK(!ms_fold(&pack, runs, folded, 1, to, 2, again, kept, &error));
    CHECK(kept->n == runs->n && !memcmp(kept->v, runs->v, runs->n * sizeof *runs->v));
    ms_segments_free(unlike);
    ms_runs_free(differing);
    ms_runs_free(moved);
    ms_runs_free(kept);
    close(to);
    /* Another content everywhere, put back from the pack. */
    uint8_t *wanted = malloc(PAGES * MS_PAGE);
    memcpy(wanted, memory, PAGES * MS_PAGE);
    memset(memory + 3 * MS_PAGE, 0x5a, (PAGES - 3) * MS_PAGE);
    ms_ranges *live = ms_ranges_new();
    CHECK(!ms_collect_block(&guest, 0, MS_POPULATED, live, &error));
    ms_segments *segments = ms_segments_new();
    CHECK(!ms_runs_over_live(runs, live, 0, PAGES, segments, &error));
    uint64_t written = 0;
    CHECK(!ms_patch(&guest, &pack, segments->v, segments->n, &written, &error));
    CHECK(written == PAGES - 3);
    CHECK(!memcmp(wanted, memory, PAGES * MS_PAGE));
    /* Damage: one bit of the pack. Nothing of it gets into the process. */
    uint8_t bit = 0xff;
    CHECK(pwrite(fd, &bit, 1, (off_t)(stored - 1) * MS_PAGE + 7) == 1);
    CHECK(ms_verify(&pack, runs->v, runs->n, &error) == MS_PACK_CHECKSUM);
    CHECK(error.a == 0 && error.b == stored - 1);
    uint64_t last = copies->v[n - 1].page;
    memset(memory + last * MS_PAGE, 0x11, MS_PAGE);
    CHECK(ms_patch(&guest, &pack, segments->v, segments->n, &written, &error) == MS_PACK_CHECKSUM);
    CHECK(memory[last * MS_PAGE] == 0x11);
    /* A truncated pack is an error, and no SIGBUS. */
    CHECK(!ftruncate(fd, MS_PAGE));
    CHECK(ms_verify(&pack, runs->v, runs->n, &error) == MS_PACK_READ && error.err == 0);
    /* Memory that is not there. */
    munmap(memory + (PAGES - 1) * MS_PAGE, MS_PAGE);
    ms_range beyond = {PAGES - 1, 1, 0};
    ms_ranges gone = {&beyond, 1, 1, 1};
    CHECK(ms_read_ranges(&guest, &gone, data, 1, &error) == MS_REMOTE);
    beyond.page = PAGES;
    CHECK(ms_read_ranges(&guest, &gone, data, 1, &error) == MS_REMOTE);
    munmap(memory, (PAGES - 1) * MS_PAGE);
    ms_ranges_free(ranges);
    ms_ranges_free(live);
    ms_copies_free(none);
    ms_copies_free(copies);
    ms_segments_free(segments);
    ms_runs_free(runs);
    free(data);
    free(slots);
    free(hashes);
    free(sums);
    free(packs);
    free(kinds);
    free(wanted);
    close(fd);
    close(pagemap);
}

/* Spans with holes: which slots of a flat pack are in use. */
static void holes(void)
{
    ms_error error;
    ms_span spans[] = {{2, 3}, {10, 1}, {20, 5}};
    uint64_t before[3], sums[9] = {0};
    ms_pack pack = {-1, 30, 9, spans, before, 3, sums};
    CHECK(!ms_pack_check(&pack, &error));
    ms_runs *all = ms_runs_new(), *used = ms_runs_new();
    CHECK(!ms_runs_push(all, 100, 3, 19, 0, &error)); /* slots 3 to 21 */
    CHECK(!ms_runs_in_use(&pack, all, used, &error));
    CHECK(used->n == 3 && ms_runs_pages(used) == 5);
    CHECK(used->v[0].page == 100 && used->v[0].slot == 3 && used->v[0].count == 2);
    CHECK(used->v[1].page == 107 && used->v[1].slot == 10 && used->v[1].count == 1);
    CHECK(used->v[2].page == 117 && used->v[2].slot == 20 && used->v[2].count == 2);
    uint8_t page[2 * MS_PAGE];
    CHECK(ms_pack_read_checked(&pack, 0, 4, 2, page, NULL, &error) == MS_PACK_UNUSED);
    CHECK(ms_pack_read_checked(&pack, 0, 0, 1, page, NULL, &error) == MS_PACK_UNUSED);
    CHECK(ms_pack_read_checked(&pack, 0, UINT64_MAX, 2, page, NULL, &error) == MS_PACK_UNUSED);
    ms_pack empty = {-1, 0, 0, NULL, NULL, 0, NULL};
    CHECK(!ms_pack_check(&empty, &error));
    CHECK(ms_pack_read_checked(&empty, 0, 0, 1, page, NULL, &error) == MS_PACK_UNUSED);
    ms_runs_free(all);
    ms_runs_free(used);
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    kernels();
    run_lists();
    holes();
    round_trip(argv[1], 1);
    round_trip(argv[1], 0);
    printf("%s, %d failures\n", ms_kernels(), failures);
    return failures != 0;
}
