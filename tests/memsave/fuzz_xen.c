/* libFuzzer's target for the reader of Xen streams: reads an input, makes it canonical, writes what
 * came out, and reads that again, which must work. With PLANTED it fails on every good stream: the
 * control that shows that a fault is seen. */
#define _GNU_SOURCE
#include "api.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MAX_PAGES = 8192 };

static int input = -1, content, output, again;

static int fresh(const char *name)
{
    int fd = memfd_create(name, MFD_CLOEXEC);
    if (fd < 0)
        abort();
    return fd;
}

static void empty(int fd)
{
    if (ftruncate(fd, 0) || lseek(fd, 0, SEEK_SET))
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    ms_error error;
    if (input < 0) {
        input = fresh("input");
        content = fresh("content");
        output = fresh("output");
        again = fresh("again");
    }
    empty(input);
    empty(content);
    if (write(input, data, size) != (ssize_t)size || lseek(input, 0, SEEK_SET))
        abort();
    ms_xen *xen = ms_xen_new(content, MAX_PAGES);
    if (!xen)
        abort();
    int code = ms_xen_read(xen, input, &error);
    if (!code)
        code = ms_xen_canonical(xen, &error);
    if (!code) {
#ifdef PLANTED
        abort();
#endif
        empty(output);
        empty(again);
        if (ms_xen_write(xen, output, &error) || lseek(output, 0, SEEK_SET))
            abort();
        ms_xen *second = ms_xen_new(again, MAX_PAGES);
        if (!second)
            abort();
        if (ms_xen_read(second, output, &error) || ms_xen_canonical(second, &error)) {
            fprintf(stderr, "what was written is refused: %s\n", second->why);
            abort();
        }
        ms_xen_free(second);
    }
    ms_xen_free(xen);
    return 0;
}
