/*
 * The half of dirty tracking that has to run inside the hypervisor.
 *
 * A userfaultfd belongs to the address space that made it, so only the hypervisor itself can make
 * one for its memory. This library, named in LD_PRELOAD, does that before main() and nothing else:
 * it takes no lock, starts no thread, allocates nothing and never blocks. If any step fails it
 * leaves no trace, and the capturing process then works without write tracking.
 *
 * The descriptor is left at TRACKER_FD. Whoever may ptrace the hypervisor takes a copy of it with
 * pidfd_getfd(2) and registers guest RAM (memsave/tracking.py).
 *
 * Sources: Linux Documentation/admin-guide/mm/userfaultfd.rst, include/uapi/linux/userfaultfd.h
 * (WP_ASYNC: Linux 6.7). The constants are repeated here because Debian 12's headers lack them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Below the usual soft RLIMIT_NOFILE of 1024, above what a program opens one by one.
 * memsave/tracking.py has the same number. */
#define TRACKER_FD 1000

#define TRACKER_USER_MODE_ONLY 1 /* UFFD_USER_MODE_ONLY: allowed without privilege */
#define TRACKER_API UINT64_C(0xAA)
#define TRACKER_FEATURES \
    ((UINT64_C(1) << 15)   /* UFFD_FEATURE_WP_ASYNC: the kernel resolves write faults itself */ \
     | (UINT64_C(1) << 13) /* UFFD_FEATURE_WP_UNPOPULATED */ \
     | (UINT64_C(1) << 12) /* UFFD_FEATURE_WP_HUGETLBFS_SHMEM: also file mappings */)

struct tracker_api {
    uint64_t api, features, ioctls;
};
_Static_assert(sizeof(struct tracker_api) == 24, "struct uffdio_api");
#define TRACKER_UFFDIO_API _IOWR(0xAA, 0x3F, struct tracker_api)

__attribute__((constructor)) static void tracker_make(void)
{
    int kept_errno = errno;
    /* The hypervisor's children (helpers, hook scripts) have no guest memory to track. */
    unsetenv("LD_PRELOAD");
#ifdef SYS_userfaultfd
    long made = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | TRACKER_USER_MODE_ONLY);
    if (made >= 0) {
        int fd = (int)made;
        struct tracker_api api = {TRACKER_API, TRACKER_FEATURES, 0};
        /* The features are agreed on before the descriptor takes its place: one that is there
         * is one that works. */
        if (ioctl(fd, TRACKER_UFFDIO_API, &api) == 0) {
            /* Takes the lowest free number from TRACKER_FD on; another one is of no use. */
            int placed = fcntl(fd, F_DUPFD_CLOEXEC, TRACKER_FD);
            if (placed >= 0 && placed != TRACKER_FD)
                close(placed);
        }
        if (fd != TRACKER_FD)
            close(fd);
    }
#endif
    errno = kept_errno;
}

/* An extension module built by setuptools exports this name; nobody calls it. */
void *PyInit__tracker_preload(void);
void *PyInit__tracker_preload(void)
{
    return NULL;
}
