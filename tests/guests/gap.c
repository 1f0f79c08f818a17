/* How long a guest stood still, seen from inside it:
 *
 *   gap SECONDS [KIB]     look at the clock all the time, and write so many KiB of memory a second;
 *                         prints the longest time between two looks, in milliseconds
 *
 * The clock is the processor's time stamp counter, which goes on while the guest does not; what the
 * kernel calls monotonic leaves out the time for which it was suspended.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <x86intrin.h>

enum { PAGE = 4096, ARENA = 64 << 20, CALIBRATE = 200 /* milliseconds */ };

static double monotonic(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

int main(int argc, char **argv)
{
    double seconds = argc > 1 ? atof(argv[1]) : 0, kib = argc > 2 ? atof(argv[2]) : 0;
    uint8_t *arena = mmap(NULL, ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (seconds <= 0 || arena == MAP_FAILED)
        return 2;
    double began = monotonic();
    uint64_t first = __rdtsc();
    while (monotonic() - began < CALIBRATE)
        ;
    double per_ms = (double)(__rdtsc() - first) / (monotonic() - began), longest = 0;
    uint64_t last = __rdtsc(), start = last, written = 0;
    for (;;) {
        struct timespec tick = {0, 500000};
        uint64_t now = __rdtsc();
        double elapsed = (double)(now - start) / per_ms, gap = (double)(now - last) / per_ms;
        last = now;
        if (gap > longest)
            longest = gap;
        if (elapsed > seconds * 1e3)
            break;
        while ((double)written < elapsed * kib * 1024 / 1e3) {
            memset(arena + written % ARENA, (int)(written / ARENA + 1 + written / PAGE), PAGE);
            written += PAGE;
        }
        nanosleep(&tick, NULL);
    }
    printf("GAP %.1f\n", longest);
    return 0;
}
