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

/* How a domain that is to be saved stands there. */
enum ms_stance {
    MS_XEN_RUNS,
    MS_XEN_FRESH, /* it never ran since it was made or restored */
    MS_XEN_PAUSED /* a command holds it */
};

/* Called with suspended = 0 just before the guest is asked to suspend itself, and with 1 when it is;
 * returns 0, or -1 to give up. */
typedef int (*ms_suspended)(void *data, int suspended);

ms_host *ms_host_open(char *why, int room);
void ms_host_close(ms_host *host);
const char *ms_host_why(ms_host *host);
/* Of the last save: when its guest was asked to suspend itself, seconds of CLOCK_MONOTONIC, and how
 * many pages had been sent until then; and whether another program had suspended it already. */
double ms_host_asked(ms_host *host);
uint64_t ms_host_precopied(ms_host *host);
int ms_host_taken(ms_host *host);
int ms_host_domains(ms_host *host, ms_domain *out, int room); /* how many, or -1 */

int ms_host_version(ms_host *host, uint32_t *major, uint32_t *minor);
int64_t ms_host_free(ms_host *host); /* bytes that a new domain could have, or -1 */
int ms_host_read(ms_host *host, const char *path, char *out, int room); /* 1: nothing there */

int ms_domain_save(ms_host *host, uint32_t domid, int fd, int stance, int timeout,
                   ms_suspended then, void *data);
int ms_domain_settle(ms_host *host, uint32_t domid, int timeout);
int ms_domain_resume(ms_host *host, uint32_t domid, int fresh);
/* xen_boot.c: a domain out of libxl's JSON, left paused; -1 with the reason in `why`. */
int ms_domain_boot(const char *json, char *why, int room);
int ms_domain_pause(ms_host *host, uint32_t domid);
int ms_domain_unpause(ms_host *host, uint32_t domid);
#endif
