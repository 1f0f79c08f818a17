/* Copying pages out of and into another process, many at a time. */
#define _GNU_SOURCE
#include "memsave.h"

#include <errno.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define VECTORS 1024            /* IOV_MAX of the kernel */
#define CHUNK (512u * MS_PAGE)  /* bytes of one vector at most, so that a call stays below 2 GiB */

int64_t ms_read(int pid, uint64_t address, const ms_run *runs, uint64_t count, uint8_t *shadow)
{
    struct iovec local[VECTORS], remote[VECTORS];
    uint64_t total = 0, index = 0, done = 0; /* done: bytes of runs[index] already asked for */

    while (index < count) {
        uint64_t n = 0, bytes = 0;
        while (index < count && n < VECTORS) {
            uint64_t left = runs[index].count * MS_PAGE - done;
            uint64_t part = left < CHUNK ? left : CHUNK;
            uint64_t at = runs[index].first * MS_PAGE + done;
            local[n].iov_base = shadow + at;
            remote[n].iov_base = (void *)(uintptr_t)(address + at);
            local[n].iov_len = remote[n].iov_len = part;
            n++;
            bytes += part;
            done += part;
            if (part == left) {
                index++;
                done = 0;
            }
        }
        ssize_t got = process_vm_readv(pid, local, n, remote, n, 0);
        if (got < 0)
            return -errno;
        if ((uint64_t)got != bytes)
            return -EFAULT; /* a mapping ended where guest memory should be */
        total += bytes;
    }
    return (int64_t)total;
}

int64_t ms_write(int pid, uint64_t address, const uint64_t *pages, const uint8_t *const *from,
                 uint64_t count)
{
    struct iovec local[VECTORS], remote[VECTORS];

    for (uint64_t index = 0; index < count;) {
        uint64_t n = 0;
        for (; n < VECTORS && index + n < count; n++) {
            local[n].iov_base = (void *)(uintptr_t)from[index + n];
            remote[n].iov_base = (void *)(uintptr_t)(address + pages[index + n] * MS_PAGE);
            local[n].iov_len = remote[n].iov_len = MS_PAGE;
        }
        ssize_t put = process_vm_writev(pid, local, n, remote, n, 0);
        if (put < 0)
            return -errno;
        if ((uint64_t)put != n * MS_PAGE)
            return -EFAULT;
        index += n;
    }
    return (int64_t)count;
}

int ms_steal(int pid, int fd)
{
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (pidfd < 0)
        return -errno;
    int got = (int)syscall(SYS_pidfd_getfd, pidfd, fd, 0), error = errno;
    close(pidfd);
    return got < 0 ? -error : got;
}
