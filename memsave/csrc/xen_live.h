/*
 * Running domains, through Xen's own libraries. cffi reads this file too: only types and prototypes,
 * lines that begin with '#' are skipped there. Built only where those libraries are.
 *
 * Functions return 0, or -1 with the reason in ms_host_why.
 */
#ifndef MEMSAVE_XEN_LIVE_H
#define MEMSAVE_XEN_LIVE_H
#include <stdint.h>

typedef struct ms_host ms_host;

typedef struct {
    uint32_t domid, vcpus;
    int hardware;             /* HVM or PVH; else PV */
    int paused, dying, down;  /* down: shut down, `reason` says why */
    uint32_t reason;
    uint64_t memory;          /* bytes */
    uint64_t cpu_time;        /* nanoseconds; 0: it never ran */
    uint8_t uuid[16];
} ms_domain;

/* Called with the domain suspended; returns 0, or -1 to give up. */
typedef int (*ms_suspended)(void *data);

ms_host *ms_host_open(char *why, int room);
void ms_host_close(ms_host *host);
const char *ms_host_why(ms_host *host);
double ms_host_asked(ms_host *host); /* when the last save had its guest suspended: CLOCK_MONOTONIC */
int ms_host_domains(ms_host *host, ms_domain *out, int room); /* how many, or -1 */

int ms_domain_save(ms_host *host, uint32_t domid, int fd, int held, int timeout,
                   ms_suspended then, void *data);
int ms_domain_resume(ms_host *host, uint32_t domid, int held);
#endif
