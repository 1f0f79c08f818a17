/*
 * Saving running domains with libxenguest: pages are sent while the guest runs, until few change;
 * then it is suspended, the caller freezes its disks, and the rest is sent.
 *
 * Sources: xenguest.h (struct save_callbacks, xc_domain_resume), xenctrl.h, xenstore.h; Xen
 * docs/misc/xenstore-paths.pandoc (control/shutdown).
 */
#define _GNU_SOURCE
#include "xen_live.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define XC_WANT_COMPAT_MAP_FOREIGN_API
#include <xenctrl.h>
#include <xenguest.h>
#include <xenstore.h>

#include <xencall.h>

enum {
    FEW = 64,       /* changed pages that are sent in the pause without regret */
    ROUNDS = 6,     /* of sending what changed meanwhile, at most */
    HANDLES = 64,   /* domains asked for at a time */
    LOOK = 500      /* milliseconds after which a domain is looked at without an event */
};
#define TOKEN "epochs"

struct ms_host {
    xentoollog_logger logger; /* first: the library hands it back to us */
    xc_interface *xc;
    struct xs_handle *store;
    xencall_handle *call;
    char why[256];
    double asked;
    uint64_t precopied;
    int taken; /* the last save found its domain suspended by another program */
};

struct save {
    ms_host *host;
    uint32_t domid;
    int stance, timeout;
    ms_suspended then;
    void *data;
    long before; /* pages that had changed when last asked, -1: not asked yet */
};

static void note(struct xentoollog_logger *logger, xentoollog_level level, int errnoval,
                 const char *context, const char *format, va_list args)
{
    ms_host *host = (ms_host *)logger;
    (void)context;
    if (level < XTL_ERROR || host->why[0])
        return; /* the first one is the cause */
    int at = vsnprintf(host->why, sizeof host->why, format, args);
    if (errnoval >= 0 && at > 0 && (size_t)at < sizeof host->why)
        snprintf(host->why + at, sizeof host->why - (size_t)at, ": %s", strerror(errnoval));
}

static void no_progress(struct xentoollog_logger *logger, const char *context, const char *what,
                        int percent, unsigned long done, unsigned long total)
{
    (void)logger, (void)context, (void)what, (void)percent, (void)done, (void)total;
}

static void no_destroy(struct xentoollog_logger *logger)
{
    (void)logger;
}

static int fail(ms_host *host, const char *what)
{
    if (!host->why[0])
        snprintf(host->why, sizeof host->why, "%s: %s", what, strerror(errno));
    return -1;
}

ms_host *ms_host_open(char *why, int room)
{
    ms_host *host = calloc(1, sizeof *host);
    if (!host) {
        snprintf(why, (size_t)room, "no memory");
        return NULL;
    }
    host->logger = (xentoollog_logger){note, no_progress, no_destroy};
    host->xc = xc_interface_open(&host->logger, &host->logger, 0);
    if (host->xc)
        host->store = xs_open(0);
    if (host->store)
        host->call = xencall_open(&host->logger, 0);
    if (host->call)
        return host;
    snprintf(why, (size_t)room, "%s", !host->xc ? "no hypervisor answers (are you root in dom0?)" :
             !host->store ? "xenstored does not answer" : "no hypercalls can be made");
    ms_host_close(host);
    return NULL;
}

void ms_host_close(ms_host *host)
{
    if (!host)
        return;
    if (host->call)
        xencall_close(host->call);
    if (host->store)
        xs_close(host->store);
    if (host->xc)
        xc_interface_close(host->xc);
    free(host);
}

const char *ms_host_why(ms_host *host)
{
    return host->why;
}

double ms_host_asked(ms_host *host)
{
    return host->asked;
}

uint64_t ms_host_precopied(ms_host *host)
{
    return host->precopied;
}

int ms_host_taken(ms_host *host)
{
    return host->taken;
}

static void fill(ms_domain *out, const xc_domaininfo_t *info)
{
    *out = (ms_domain){
        .domid = info->domain, .vcpus = info->max_vcpu_id + 1,
        .hardware = !!(info->flags & XEN_DOMINF_hvm_guest),
        .paused = !!(info->flags & XEN_DOMINF_paused),
        .dying = !!(info->flags & XEN_DOMINF_dying),
        .down = !!(info->flags & XEN_DOMINF_shutdown),
        .reason = info->flags >> XEN_DOMINF_shutdownshift & XEN_DOMINF_shutdownmask,
        .memory = info->tot_pages * 4096, .cpu_time = info->cpu_time,
    };
    memcpy(out->uuid, info->handle, sizeof out->uuid);
}

int ms_host_domains(ms_host *host, ms_domain *out, int room)
{
    xc_domaininfo_t found[HANDLES];
    uint32_t first = 0;
    int n = 0;
    host->why[0] = 0;
    while (n < room) {
        int got = xc_domain_getinfolist(host->xc, first, HANDLES, found);
        if (got < 0)
            return fail(host, "domains cannot be listed");
        for (int i = 0; i < got && n < room; i++)
            fill(&out[n++], &found[i]);
        if (got < HANDLES)
            break;
        first = found[got - 1].domain + 1u;
    }
    return n;
}

/* One domain as it is now; -1 if it is gone. */
static int look(ms_host *host, uint32_t domid, xc_domaininfo_t *info)
{
    int got = xc_domain_getinfolist(host->xc, domid, 1, info);
    if (got == 1 && info->domain == domid)
        return 0;
    errno = got < 0 ? errno : ESRCH;
    return fail(host, "the domain is gone");
}

static int64_t milliseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static int is_suspended(const xc_domaininfo_t *info)
{
    return info->flags & XEN_DOMINF_shutdown &&
           (info->flags >> XEN_DOMINF_shutdownshift & XEN_DOMINF_shutdownmask) == SHUTDOWN_suspend;
}

/* Takes a request back that the guest has not looked at; 1 if it was too late for that. */
static int withdraw(ms_host *host, const char *path)
{
    for (;;) {
        unsigned length;
        xs_transaction_t t = xs_transaction_start(host->store);
        char *word = t == XBT_NULL ? NULL : xs_read(host->store, t, path, &length);
        int taken = !word || strcmp(word, "suspend") != 0;
        free(word);
        if (!taken)
            xs_write(host->store, t, path, "", 0);
        if (t == XBT_NULL || xs_transaction_end(host->store, t, taken))
            return taken;
        if (errno != EAGAIN)
            return taken;
    }
}

/* Waits for xenstored to say that some domain's state changed, at most so many milliseconds, and not
 * for long: it tells of no domain twice that it was not told of as going on. */
static void next_event(ms_host *host, int64_t limit)
{
    struct pollfd ready = {xs_fileno(host->store), POLLIN, 0};
    unsigned n;
    if (poll(&ready, 1, (int)(limit < LOOK ? limit : LOOK)) > 0)
        free(xs_read_watch(host->store, &n));
}

/* Waits until a guest that was asked to has suspended itself; xenstored says when a domain's state
 * changed. A guest that has not begun within so many milliseconds has the request taken back. */
static int await_suspended(ms_host *host, uint32_t domid, const char *path, int timeout)
{
    xc_domaininfo_t info;
    int64_t until = milliseconds() + timeout;
    int result = -1, withdrawn = 0;
    for (;;) {
        if (look(host, domid, &info))
            break;
        if (is_suspended(&info)) {
            result = 0;
            break;
        }
        if (info.flags & XEN_DOMINF_shutdown) {
            snprintf(host->why, sizeof host->why, "the guest shut itself down (reason %u)",
                     (unsigned)(info.flags >> XEN_DOMINF_shutdownshift &
                                XEN_DOMINF_shutdownmask));
            break;
        }
        int64_t left = until - milliseconds();
        if (left <= 0 && !withdrawn) {
            withdrawn = 1;
            if (!withdraw(host, path)) {
                snprintf(host->why, sizeof host->why, "the guest does not suspend itself on "
                         "request (no Xen drivers in it, or it hangs)");
                break;
            }
            until += timeout; /* it has begun */
            continue;
        }
        if (left <= 0) {
            snprintf(host->why, sizeof host->why, "the guest began to suspend itself and did not "
                     "get there");
            break;
        }
        next_event(host, left);
    }
    return result;
}

static void request_path(char *path, size_t room, uint32_t domid)
{
    snprintf(path, room, "/local/domain/%u/control/shutdown", domid);
}

/* One that a command holds goes on for as long as it takes to suspend itself. */
static int suspend_guest(struct save *save)
{
    ms_host *host = save->host;
    xc_domaininfo_t info;
    char path[64];
    int result = -1;
    request_path(path, sizeof path, save->domid);
    if (look(host, save->domid, &info))
        return -1;
    if (info.flags & XEN_DOMINF_shutdown) { /* what suspended it will resume it, at its own time */
        snprintf(host->why, sizeof host->why, "the domain was suspended or shut down meanwhile");
        save->host->taken = 1;
        return -1;
    }
    if (!xs_watch(host->store, "@releaseDomain", TOKEN))
        return fail(host, "xenstored cannot be watched");
    if (!xs_write(host->store, XBT_NULL, path, "suspend", 7))
        fail(host, "the guest cannot be asked to suspend itself");
    else if (save->stance == MS_XEN_PAUSED && xc_domain_unpause(host->xc, save->domid))
        fail(host, "the domain cannot be unpaused");
    else
        result = await_suspended(host, save->domid, path, save->timeout);
    if (save->stance == MS_XEN_PAUSED && ms_domain_pause(host, save->domid))
        result = -1;
    xs_unwatch(host->store, "@releaseDomain", TOKEN);
    return result;
}

/* Whether Xen can tell which pages a domain writes to: of a PV one only if it was built with shadow
 * page tables, which Debian's is not. */
static int can_track(ms_host *host, uint32_t domid)
{
    xc_domaininfo_t info;
    xc_physinfo_t machine = {0};
    if (look(host, domid, &info))
        return -1;
    if (info.flags & XEN_DOMINF_hvm_guest)
        return 1;
    if (xc_physinfo(host->xc, &machine))
        return fail(host, "what Xen can do cannot be asked for");
    return !!(machine.capabilities & XEN_SYSCTL_PHYSCAP_shadow);
}

/*
 * A domain that a killed save may have left anyhow: asked to suspend itself, on its way there, or
 * tracked. timeout: milliseconds that one has which has taken the request; one that had its pause
 * already does not suspend itself, and nothing tells the two apart.
 */
int ms_domain_settle(ms_host *host, uint32_t domid, int timeout)
{
    xc_domaininfo_t info;
    char path[64];
    host->why[0] = 0;
    request_path(path, sizeof path, domid);
    if (!xs_watch(host->store, "@releaseDomain", TOKEN))
        return fail(host, "xenstored cannot be watched");
    int result = look(host, domid, &info);
    if (!result && !is_suspended(&info) && withdraw(host, path)) {
        int64_t until = milliseconds() + timeout, left;
        while (!(result = look(host, domid, &info)) && !is_suspended(&info) &&
               (left = until - milliseconds()) > 0)
            next_event(host, left);
    }
    xs_unwatch(host->store, "@releaseDomain", TOKEN);
    int tracks = result ? result : can_track(host, domid);
    if (tracks > 0)
        xc_shadow_control(host->xc, domid, XEN_DOMCTL_SHADOW_OP_OFF, NULL, 0);
    return tracks < 0 ? tracks : 0;
}

/*
 * A domain that never ran since it was restored stands behind its suspend hypercall already; Xen only
 * has to be told. A PV guest says where its P2M is when it goes on, so that until then Xen's word for
 * it is of the domain it was before: any page table of the guest's maps it.
 */
static int suspend_as_it_stands(struct save *save)
{
    ms_host *host = save->host;
    xc_domaininfo_t info;
    if (look(host, save->domid, &info))
        return -1;
    if (!(info.flags & XEN_DOMINF_paused) || info.cpu_time) {
        snprintf(host->why, sizeof host->why, "the domain began to run meanwhile");
        return -1;
    }
    if (xc_domain_shutdown(host->xc, save->domid, SHUTDOWN_suspend))
        return fail(host, "the domain cannot be marked as suspended");
    return 0;
}

static int mend_p2m(ms_host *host, uint32_t domid)
{
    vcpu_guest_context_any_t context;
    xc_domaininfo_t info;
    if (look(host, domid, &info))
        return -1;
    if (info.flags & XEN_DOMINF_hvm_guest)
        return 0;
    if (xc_vcpu_getcontext(host->xc, domid, 0, &context))
        return fail(host, "the state of virtual processor 0 cannot be read");
    shared_info_any_t *shared = xc_map_foreign_range(host->xc, domid, 4096, PROT_READ | PROT_WRITE,
                                                     info.shared_info_frame);
    if (!shared)
        return fail(host, "shared info cannot be mapped");
    shared->x64.arch.p2m_cr3 = context.x64.ctrlreg[3];
    munmap(shared, 4096);
    return 0;
}

static int suspend(void *data)
{
    struct save *save = data;
    struct timespec now;
    if (save->then(save->data, 0))
        return 0;
    clock_gettime(CLOCK_MONOTONIC, &now);
    save->host->asked = (double)now.tv_sec + (double)now.tv_nsec / 1e9;
    if (save->stance == MS_XEN_FRESH ? suspend_as_it_stands(save) : suspend_guest(save))
        return 0;
    return save->then(save->data, 1) == 0;
}

/* Go on sending while it gets less; what is left then is sent in the pause. */
static int policy(struct precopy_stats stats, void *data)
{
    struct save *save = data;
    save->host->precopied = stats.total_written;
    if (stats.dirty_count < 0 || stats.iteration == 0)
        return XGS_POLICY_CONTINUE_PRECOPY;
    int enough = stats.dirty_count < FEW || stats.iteration >= ROUNDS ||
                 (save->before >= 0 && stats.dirty_count * 4 > save->before * 3);
    save->before = stats.dirty_count;
    return enough ? XGS_POLICY_STOP_AND_COPY : XGS_POLICY_CONTINUE_PRECOPY;
}

static int no_device_model(uint32_t domid, unsigned enable, void *data)
{
    (void)domid, (void)enable, (void)data;
    return 0;
}

/*
 * Writes a domain's stream to fd. It is suspended when `then` is called, and stays so: the caller
 * resumes it, whatever came out. Where Xen cannot track it, it is suspended from the beginning. One
 * that never ran since it was restored is saved as it stands. timeout: milliseconds that the guest has
 * to suspend itself.
 */
int ms_domain_save(ms_host *host, uint32_t domid, int fd, int stance, int timeout,
                   ms_suspended then, void *data)
{
    struct save save = {host, domid, stance, timeout, then, data, -1};
    struct save_callbacks callbacks = {
        .suspend = suspend, .precopy_policy = policy, .switch_qemu_logdirty = no_device_model,
        .data = &save,
    };
    host->why[0] = 0;
    host->precopied = 0;
    host->taken = 0;
    if (stance == MS_XEN_FRESH && mend_p2m(host, domid))
        return -1;
    int live = stance == MS_XEN_RUNS ? can_track(host, domid) : 0;
    if (live < 0)
        return -1;
    if (xc_domain_save(host->xc, fd, domid, live ? XCFLAGS_LIVE : 0, &callbacks, XC_STREAM_PLAIN,
                       -1))
        return fail(host, "the domain cannot be saved");
    return 0;
}

/* Only the hypervisor's mark goes: the guest's registers stay as a restore made them. */
static int unmark(ms_host *host, uint32_t domid)
{
    xen_domctl_t *call = xencall_alloc_buffer(host->call, sizeof *call);
    if (!call)
        return fail(host, "no memory for a hypercall");
    *call = (xen_domctl_t){.cmd = XEN_DOMCTL_resumedomain, .domain = (domid_t)domid,
                           .interface_version = XEN_DOMCTL_INTERFACE_VERSION};
    int code = xencall1(host->call, __HYPERVISOR_domctl, (uint64_t)(uintptr_t)call);
    xencall_free_buffer(host->call, call);
    return code ? fail(host, "the domain cannot be resumed") : 0;
}

/* Lets a suspended domain go on as if the suspend had been cancelled: its devices stay connected. If
 * it goes on already, xenstored may not have been told. */
int ms_domain_resume(ms_host *host, uint32_t domid, int fresh)
{
    xc_domaininfo_t info;
    host->why[0] = 0;
    if (look(host, domid, &info))
        return -1;
    if (info.flags & XEN_DOMINF_shutdown && !is_suspended(&info))
        return 0;
    if (is_suspended(&info) && (fresh ? unmark(host, domid) : xc_domain_resume(host->xc, domid, 1)))
        return fail(host, "the domain cannot be resumed");
    if (!xs_resume_domain(host->store, domid))
        return fail(host, "xenstored cannot be told that the domain goes on");
    return 0;
}

int ms_domain_pause(ms_host *host, uint32_t domid)
{
    return xc_domain_pause(host->xc, domid) ? fail(host, "the domain cannot be paused") : 0;
}

int ms_domain_unpause(ms_host *host, uint32_t domid)
{
    return xc_domain_unpause(host->xc, domid) ? fail(host, "the domain cannot be unpaused") : 0;
}

int ms_host_version(ms_host *host, uint32_t *major, uint32_t *minor)
{
    int version = xc_version(host->xc, XENVER_version, NULL);
    host->why[0] = 0;
    if (version < 0)
        return fail(host, "Xen's version cannot be asked for");
    *major = (uint32_t)version >> 16;
    *minor = (uint32_t)version & 0xffff;
    return 0;
}

int64_t ms_host_free(ms_host *host)
{
    xc_physinfo_t machine = {0};
    host->why[0] = 0;
    if (xc_physinfo(host->xc, &machine))
        return fail(host, "how much memory is free cannot be asked for");
    return (int64_t)(machine.free_pages + machine.scrub_pages - machine.outstanding_pages) * 4096;
}

int ms_host_read(ms_host *host, const char *path, char *out, int room)
{
    unsigned length;
    host->why[0] = 0;
    char *found = xs_read(host->store, XBT_NULL, path, &length);
    if (!found)
        return errno == ENOENT ? 1 : fail(host, "xenstore cannot be read");
    snprintf(out, (size_t)room, "%.*s", (int)length, found);
    free(found);
    return 0;
}
