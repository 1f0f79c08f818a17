/* Declarations for cffi: no preprocessor beyond comments. */

typedef struct {
    uint64_t first; /* page number */
    uint64_t count; /* pages */
} ms_run;

typedef struct {
    const uint8_t *base;    /* first byte of slot 0, mapped read-only */
    const uint64_t *hashes; /* XXH3-64 of each slot; 0 where a slot is unused */
    uint64_t slots;         /* whole pages mapped */
} ms_pack;

/* What ms_classify says of a page. */
enum { MS_SAME = 0, MS_ZERO = 1, MS_PARENT = 2, MS_NEW = 3 };

/* Anonymous (private) pages of [address, address + pages * 4096) in the process whose pagemap is
 * open, as runs relative to address. written: only those written since they were last protected;
 * protect: write-protect them in the same step (both need a registered userfaultfd). Stops when
 * `runs` is full; *next is where to go on, == pages when done. Returns the number of runs; -ENOTTY
 * where the kernel has no PAGEMAP_SCAN (before 6.7). */
int64_t ms_scan(int pagemap, uint64_t address, uint64_t pages, int written, int protect, ms_run *runs,
                uint64_t capacity, uint64_t *next);

/* The same from /proc/PID/pagemap entries: works on every kernel, cannot tell `written`. */
int64_t ms_scan_entries(int pagemap, uint64_t address, uint64_t pages, ms_run *runs,
                        uint64_t capacity, uint64_t *next);

/* Write-protection by an asynchronous userfaultfd for [address, address + bytes). */
int ms_register(int uffd, uint64_t address, uint64_t bytes);

/* Copy runs of pages (relative to address) out of a process into `shadow`, page n at n * 4096.
 * Returns bytes copied. */
int64_t ms_read(int pid, uint64_t address, const ms_run *runs, uint64_t count, uint8_t *shadow);

/* Copy pages, each from its own source, to page numbers (relative to address) of a process. */
int64_t ms_write(int pid, uint64_t address, const uint64_t *pages, const uint8_t *const *from,
                 uint64_t count);

/* A duplicate of another process' descriptor (pidfd_getfd(2)). */
int ms_steal(int pid, int fd);

/* 1 if all bytes of a page are zero. The scalar one is the reference the fast one is tested by. */
int ms_is_zero(const uint8_t *page);
int ms_is_zero_scalar(const uint8_t *page);

/* XXH3-64 of each of `count` pages. */
void ms_hash(const uint8_t *pages, uint64_t count, uint64_t *hashes);
uint64_t ms_hash_bytes(const uint8_t *data, uint64_t bytes);

/* Compare captured pages (page n at shadow + n * 4096) with what references say: kinds[i] becomes
 * MS_SAME if page numbers[i] holds base[numbers[i]]'s content, MS_ZERO if it is all zero, MS_PARENT
 * if it holds parent's (may be NULL), else MS_NEW. -ERANGE if a reference points outside its pack. */
int64_t ms_classify(const uint8_t *shadow, const uint64_t *numbers, uint64_t count,
                    const uint64_t *base, const uint64_t *parent, const ms_pack *packs,
                    uint64_t pack_count, uint8_t *kinds);

/* Check referenced pages against their packs' checksums. Returns count if all agree, else the index
 * of the first that does not, or points outside its pack. */
int64_t ms_verify(const uint64_t *refs, uint64_t count, const ms_pack *packs, uint64_t pack_count);

/* Addresses of referenced pages; zero pages point to `zero`. -ERANGE. */
int64_t ms_resolve(const uint64_t *refs, uint64_t count, const ms_pack *packs, uint64_t pack_count,
                   const uint8_t *zero, const uint8_t **addresses);

/* Page numbers at which two reference arrays say different things (by reference, not content). */
uint64_t ms_differ(const uint64_t *a, const uint64_t *b, uint64_t pages, uint64_t *numbers);

/* Page numbers among `numbers` whose referenced contents really differ; in place. -ERANGE. */
int64_t ms_differ_bytes(const uint64_t *a, const ms_pack *packs_a, uint64_t count_a,
                        const uint64_t *b, const ms_pack *packs_b, uint64_t count_b,
                        uint64_t *numbers, uint64_t count);

/* Run-length coding of references. A run is consecutive pages that are all zero (ref 0) or consecutive
 * slots of one pack. Compress returns the number of runs (call with NULL to count). */
uint64_t ms_compress(const uint64_t *refs, uint64_t pages, uint64_t *counts, uint64_t *firsts);
void ms_expand(const uint64_t *counts, const uint64_t *firsts, uint64_t runs, uint64_t *refs);
