/*
 * Stands in for a hypervisor: maps a file MAP_PRIVATE and some anonymous memory, prints
 * "pid file-address anonymous-address", then obeys one command a line and answers "ok".
 * Pages count through both areas.
 *
 *   w PAGE COUNT SEED   write: a pattern of the seed, from the processor
 *   k PAGE              the kernel writes: read(2) from /dev/urandom into the page
 *   z PAGE COUNT        write zeros
 *   t PAGE COUNT        only read
 *   o PAGE              page out (madvise)
 *   x FD                close a descriptor
 *   d PAGE PATH         a direct read (O_DIRECT) of a file into the page
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static uint8_t *file_area, *anonymous;
static long file_pages;

static uint8_t *page_at(long page)
{
    return page < file_pages ? file_area + page * 4096 : anonymous + (page - file_pages) * 4096;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    int fd = open(argv[1], O_RDWR);
    int random = open("/dev/urandom", O_RDONLY);
    file_pages = atol(argv[2]);
    long other = atol(argv[3]);
    if (fd < 0 || random < 0)
        return 3;
    file_area = mmap(NULL, file_pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    anonymous = mmap(NULL, other * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (file_area == MAP_FAILED || anonymous == MAP_FAILED)
        return 4;
    close(fd);
    printf("%d %lu %lu %s\n", getpid(), (unsigned long)file_area, (unsigned long)anonymous,
           getenv("LD_PRELOAD") ? "preload-left" : "clean");
    fflush(stdout);
    char line[4096], path[4096];
    volatile uint64_t sum = 0;
    while (fgets(line, sizeof line, stdin)) {
        char what;
        long page = 0, count = 1;
        unsigned long seed = 0;
        if (sscanf(line, " %c %ld %ld %lu", &what, &page, &count, &seed) < 1)
            return 5;
        for (long i = 0; i < count && what != 'x' && what != 'd' && what != 'e'; i++) {
            uint64_t *words = (uint64_t *)page_at(page + i);
            if (what == 'w')
                for (int w = 0; w < 512; w++)
                    words[w] = (seed + 1) * UINT64_C(0x9E3779B97F4A7C15) + (uint64_t)w * (page + i + 1);
            else if (what == 'k' && read(random, words, 4096) != 4096)
                return 6;
            else if (what == 'z')
                memset(words, 0, 4096);
            else if (what == 't')
                sum += *(volatile uint64_t *)words;
            else if (what == 'o')
                madvise(words, 4096, MADV_PAGEOUT);
        }
        if (what == 'e') { /* every other page, a few times over, each time with other bytes */
            long rounds = 1;
            if (sscanf(line, " e %ld %ld %lu %ld", &page, &count, &seed, &rounds) < 3)
                return 5;
            for (long round = 0; round < rounds; round++)
                for (long i = 0; i < count; i++) {
                    uint64_t *words = (uint64_t *)page_at(page + 2 * i);
                    for (int w = 0; w < 512; w++)
                        words[w] = (seed + (unsigned long)round) * UINT64_C(0x9E3779B97F4A7C15) + (uint64_t)(w + i);
                }
        }
        if (what == 'x')
            close((int)page);
        if (what == 'd') {
            if (sscanf(line, " d %ld %4095s", &page, path) != 2)
                return 5;
            int direct = open(path, O_RDONLY | O_DIRECT);
            if (direct < 0 || read(direct, page_at(page), 4096) != 4096)
                return 7;
            close(direct);
        }
        puts("ok");
        fflush(stdout);
    }
    return 0;
}
