/* The witness: says whether a guest's memory and disks are of the same instant.
 *
 *   witness DIR...        keep a sequence in RAM and in files on each DIR, compare for ever
 *   witness-ctl WORD...   ask a running witness: status | nonce set X | nonce get | dirty MIB |
 *                         pause | resume | sync
 *
 * Every tick increments one sequence number. On each disk two rings of 4 KiB blocks carry it: `direct`
 * (O_DIRECT) and `buffered` (page cache, fsync now and then, read back past the cache). RAM knows which
 * number each block must hold. Before a tick writes, it reads back from the disk
 *   - the block of the last number: an older disk still holds the number of one lap before;
 *   - the block that is next: a newer disk holds a number there that RAM has not reached;
 * so either kind of wrong disk is seen at the first tick. RAM itself carries a canvas of pages with
 * the same numbers, checked before each is painted anew.
 *
 * No clock is read: time that jumps at a restore changes nothing here.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum {
    BLOCK = 4096,
    RING = 512,         /* blocks of each file */
    CANVAS = 1024,      /* pages of RAM */
    DISKS = 8,
    TICK = 20,          /* milliseconds */
    SYNC_EVERY = 16,    /* ticks */
    SAY_EVERY = 50,     /* ticks */
    DIRTY_MAX = 1024,   /* MiB */
};
#define SOCKET "/run/witness.sock"
#define MAGIC 0x5353454e54495721ULL

struct block {
    uint64_t magic, seq, disk, sum, body[(BLOCK - 32) / 8];
};
_Static_assert(sizeof(struct block) == BLOCK, "one page");

struct ring {
    int fd, raw; /* raw: O_DIRECT */
    uint64_t holds[RING];
};

struct disk {
    const char *dir;
    struct ring direct, buffered;
    uint64_t unsynced; /* numbers above this one may not be on disk yet (buffered) */
};

static struct disk disks[DISKS];
static int disk_count;
static uint64_t seq, canvas_seq[CANVAS];
static uint8_t *canvas;
static char verdict[256]; /* empty: OK */
static char nonce[256];
static int paused;
static uint8_t *dirt;
static struct block scratch __attribute__((aligned(BLOCK)));

static void mismatch(const char *form, ...)
{
    va_list args;
    if (verdict[0])
        return; /* the first one is kept */
    va_start(args, form);
    vsnprintf(verdict, sizeof verdict, form, args);
    va_end(args);
}

static void die(const char *what)
{
    mismatch("%s: %s", what, strerror(errno));
}

static uint64_t mix(uint64_t x)
{
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdULL;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ULL;
    return x ^ x >> 33;
}

static uint64_t sum_of(const struct block *b)
{
    uint64_t sum = mix(b->seq) ^ mix(b->disk + 77);
    for (size_t i = 0; i < sizeof b->body / 8; i++)
        sum = mix(sum ^ b->body[i]);
    return sum;
}

static void fill(struct block *b, uint64_t number, uint64_t disk)
{
    b->magic = MAGIC;
    b->seq = number;
    b->disk = disk;
    for (size_t i = 0; i < sizeof b->body / 8; i++)
        b->body[i] = mix(number * 1000003 + i);
    b->sum = sum_of(b);
}

#define TORN UINT64_MAX

/* Read a slot past the page cache; returns its number, 0 if it was never written, TORN if it holds
 * no whole block. */
static uint64_t look(struct disk *d, struct ring *r, uint64_t slot, const char *what)
{
    if (pread(r->raw, &scratch, BLOCK, slot * BLOCK) != BLOCK) {
        mismatch("%s %s slot %lu: %s", d->dir, what, slot, strerror(errno));
        return 0;
    }
    if (scratch.magic == 0 && scratch.seq == 0)
        return 0;
    if (scratch.magic != MAGIC || scratch.sum != sum_of(&scratch) ||
        scratch.disk != (uint64_t)(d - disks) || scratch.seq % RING != slot) {
        return TORN;
    }
    return scratch.seq;
}

static void expect(struct disk *d, struct ring *r, uint64_t slot, const char *what)
{
    uint64_t found = look(d, r, slot, what);
    if (found == TORN)
        mismatch("%s %s slot %lu is corrupt", d->dir, what, slot);
    else if (!verdict[0] && found != r->holds[slot])
        mismatch("%s %s slot %lu holds %lu, memory says %lu", d->dir, what, slot, found,
                 r->holds[slot]);
}

static void put(struct disk *d, struct ring *r, int fd, uint64_t number, const char *what)
{
    fill(&scratch, number, d - disks);
    if (pwrite(fd, &scratch, BLOCK, number % RING * BLOCK) != BLOCK)
        mismatch("%s %s cannot be written: %s", d->dir, what, strerror(errno));
    r->holds[number % RING] = number;
}

static void flush(struct disk *d)
{
    if (fsync(d->buffered.fd) != 0)
        die("fsync");
    /* So that what is read below comes from the disk. */
    posix_fadvise(d->buffered.fd, 0, 0, POSIX_FADV_DONTNEED);
    d->unsynced = seq;
}

static void tick(void)
{
    uint64_t next = seq + 1;

    for (struct disk *d = disks; d < disks + disk_count && !verdict[0]; d++) {
        if (seq)
            expect(d, &d->direct, seq % RING, "direct");
        expect(d, &d->direct, next % RING, "direct");
        expect(d, &d->direct, mix(next) % RING, "direct");
        put(d, &d->direct, d->direct.raw, next, "direct");
        put(d, &d->buffered, d->buffered.fd, next, "buffered");
    }
    uint64_t page = next % CANVAS;
    struct block *painted = (struct block *)(canvas + page * BLOCK);
    if (canvas_seq[page] && (painted->seq != canvas_seq[page] || painted->sum != sum_of(painted)))
        mismatch("memory page %lu holds %lu instead of %lu", page, painted->seq, canvas_seq[page]);
    fill(painted, next, 99);
    canvas_seq[page] = next;
    if (!verdict[0])
        seq = next;
    if (seq % SYNC_EVERY == 0)
        for (struct disk *d = disks; d < disks + disk_count && !verdict[0]; d++) {
            flush(d);
            for (uint64_t back = 0; back < 4 && back < seq; back++)
                expect(d, &d->buffered, (seq - back) % RING, "buffered");
            expect(d, &d->buffered, mix(seq) % RING, "buffered");
        }
}

static void open_ring(struct disk *d, struct ring *r, const char *name)
{
    char path[256];
    struct stat st;

    snprintf(path, sizeof path, "%s/%s", d->dir, name);
    r->fd = open(path, O_RDWR | O_CREAT, 0600);
    if (r->fd < 0 || fstat(r->fd, &st) != 0)
        return die(path);
    if (st.st_size < RING * BLOCK) {
        /* Real blocks, not holes: no metadata changes later, so that a power cut can only lose the
         * newest contents. */
        static uint8_t zeros[RING * BLOCK];
        if (pwrite(r->fd, zeros, sizeof zeros, 0) != sizeof zeros || fsync(r->fd) != 0)
            return die(path);
    }
    r->raw = open(path, O_RDWR | O_DIRECT);
    if (r->raw < 0)
        die(path);
}

/* A number that a cold start does not find: believed lost if the power may have taken it, that is if
 * it is newer than the last flush which every disk has completed. */
static int lost(struct disk *d, struct ring *r, uint64_t number, const char *what)
{
    uint64_t found = r->holds[number % RING];
    if (found == number)
        return 0;
    if (number + 2 * SYNC_EVERY > seq)
        return 1;
    if (found == TORN)
        mismatch("%s %s slot %lu is corrupt", d->dir, what, number % RING);
    else
        mismatch("%s %s holds %lu instead of %lu", d->dir, what, found, number);
    return 0;
}

/* A cold start believes the disks. Nothing is durable before a flush: power that goes, or a hypervisor
 * that is killed, takes any of the writes since then, in any order, of one disk or of both, and may
 * tear them. They are made anew; everything older must be there. */
static void adopt(void)
{
    for (struct disk *d = disks; d < disks + disk_count && !verdict[0]; d++) {
        open_ring(d, &d->direct, "direct");
        open_ring(d, &d->buffered, "buffered");
        for (uint64_t slot = 0; slot < RING && !verdict[0]; slot++) {
            uint64_t direct = d->direct.holds[slot] = look(d, &d->direct, slot, "direct");
            uint64_t buffered = d->buffered.holds[slot] = look(d, &d->buffered, slot, "buffered");
            if (direct != TORN && direct > seq)
                seq = direct;
            if (buffered != TORN && buffered > seq)
                seq = buffered;
        }
    }
    for (struct disk *d = disks; d < disks + disk_count && !verdict[0]; d++) {
        for (uint64_t number = seq < RING ? 1 : seq - RING + 1; number <= seq; number++) {
            if (lost(d, &d->direct, number, "direct"))
                put(d, &d->direct, d->direct.raw, number, "direct");
            if (lost(d, &d->buffered, number, "buffered"))
                put(d, &d->buffered, d->buffered.fd, number, "buffered");
        }
        if (!verdict[0])
            flush(d);
    }
}

static void make_dirty(unsigned mib)
{
    static uint64_t state = 88172645463325252ULL;
    if (!dirt) {
        dirt = mmap(NULL, (size_t)DIRTY_MAX << 20, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (dirt == MAP_FAILED) {
            dirt = NULL;
            return die("mmap");
        }
    }
    state += seq;
    for (size_t i = 0; i < (size_t)mib << 20; i += 8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *(uint64_t *)(dirt + i) = state;
    }
}

static void answer(int client)
{
    char line[512] = "", reply[512] = "done";
    ssize_t got = read(client, line, sizeof line - 1);
    unsigned mib;

    if (got <= 0)
        return;
    line[got] = 0;
    if (!strcmp(line, "status")) {
        if (verdict[0])
            snprintf(reply, sizeof reply, "MISMATCH %s", verdict);
        else
            snprintf(reply, sizeof reply, "OK %lu", seq);
    } else if (!strncmp(line, "nonce set ", 10)) {
        snprintf(nonce, sizeof nonce, "%.250s", line + 10);
    } else if (!strcmp(line, "nonce get")) {
        snprintf(reply, sizeof reply, "%s", nonce);
    } else if (sscanf(line, "dirty %u", &mib) == 1 && mib <= DIRTY_MAX) {
        make_dirty(mib);
    } else if (!strcmp(line, "pause") || !strcmp(line, "resume")) {
        paused = line[0] == 'p';
    } else if (!strcmp(line, "sync")) {
        for (struct disk *d = disks; d < disks + disk_count; d++)
            flush(d);
    } else {
        snprintf(reply, sizeof reply, "ERROR unknown request");
    }
    if (write(client, reply, strlen(reply)) < 0)
        return;
}

static struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = SOCKET};

static int serve(void)
{
    int sock;

    canvas = mmap(NULL, CANVAS * BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (canvas == MAP_FAILED) {
        perror("mmap");
        return 1;
    }
    adopt(); /* before anybody can ask */
    sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    unlink(SOCKET);
    if (sock < 0 || bind(sock, (struct sockaddr *)&address, sizeof address) || listen(sock, 16)) {
        perror(SOCKET);
        return 1;
    }
    for (uint64_t ticks = 0;; ) {
        struct pollfd p = {.fd = sock, .events = POLLIN};
        if (poll(&p, 1, TICK) > 0) {
            int client = accept(sock, NULL, NULL);
            if (client >= 0) {
                answer(client);
                close(client);
            }
            continue;
        }
        if (!paused && !verdict[0])
            tick();
        if (++ticks % SAY_EVERY == 0) {
            if (verdict[0])
                printf("MISMATCH %s\n", verdict);
            else
                printf("OK %lu\n", seq);
            fflush(stdout);
        }
    }
}

static int ask(int argc, char **argv)
{
    char line[512] = "", reply[512] = "";
    int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    for (int i = 1; i < argc; i++) {
        size_t used = strlen(line);
        snprintf(line + used, sizeof line - used, "%s%s", i > 1 ? " " : "", argv[i]);
    }
    if (connect(sock, (struct sockaddr *)&address, sizeof address) != 0) {
        perror(SOCKET);
        return 2;
    }
    if (write(sock, line, strlen(line)) < 0 || read(sock, reply, sizeof reply - 1) < 0) {
        perror(SOCKET);
        return 2;
    }
    puts(reply);
    return strncmp(reply, "ERROR", 5) == 0 ? 2 : strncmp(reply, "MISMATCH", 8) == 0;
}

int main(int argc, char **argv)
{
    const char *name = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    if (!strcmp(name, "witness-ctl"))
        return ask(argc, argv);
    for (int i = 1; i < argc && disk_count < DISKS; i++)
        disks[disk_count++].dir = argv[i];
    mlockall(MCL_CURRENT); /* the nonce must be in RAM and nowhere else */
    return serve();
}
