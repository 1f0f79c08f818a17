/* Reading a domain out of a libxc stream. Every length is bounded before memory is taken for it. */
#define _GNU_SOURCE
#include "xen.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Records come in this order: what does not change, memory, what the processors and Xen know. */
enum phase { STATIC, MEMORY, STATE };

struct reader {
    ms_xen *xen;
    int fd;
    uint32_t version;
    enum phase phase;
    uint8_t *body; /* of a PAGE_DATA record: its table, then its content */
    size_t room;
    ms_error *error;
};

int xen_fault(ms_xen *xen, ms_error *error, const char *form, ...)
{
    va_list args;
    va_start(args, form);
    vsnprintf(xen->why, sizeof xen->why, form, args);
    va_end(args);
    return ms_fail(error, MS_XEN_STREAM, 0, 0, 0);
}

ms_xen *ms_xen_new(int content, uint64_t max_pages)
{
    ms_xen *xen = calloc(1, sizeof *xen);
    if (!xen)
        return NULL;
    xen->content = content;
    xen->max_pages = max_pages;
    /* Untouched parts take no memory. */
    xen->types = mmap(NULL, max_pages + max_pages / 8 + 1, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (xen->types == MAP_FAILED) {
        free(xen);
        return NULL;
    }
    xen->held = xen->types + max_pages;
    return xen;
}

void ms_xen_free(ms_xen *xen)
{
    if (!xen)
        return;
    munmap(xen->types, xen->max_pages + xen->max_pages / 8 + 1);
    for (size_t i = 0; i < xen->n; i++)
        free(xen->records[i].data);
    for (int i = 0; i < MS_XEN_ROLES; i++)
        free(xen->frames[i]);
    free(xen->records);
    free(xen);
}

const ms_xen_record *xen_find(const ms_xen *xen, uint32_t type)
{
    for (size_t i = 0; i < xen->n; i++)
        if (xen->records[i].type == type)
            return &xen->records[i];
    return NULL;
}

int ms_xen_add_record(ms_xen *xen, uint32_t type, const uint8_t *data, uint32_t length,
                      ms_error *error)
{
    if (length > XEN_BLOB_MAX || xen->bytes + length > XEN_BLOBS_MAX)
        return xen_fault(xen, error, "record of type %#x has %u bytes, which is too many", type,
                         length);
    int code = ms_grow((void **)&xen->records, &xen->cap, xen->n + 1, sizeof *xen->records, error);
    if (code)
        return code;
    uint8_t *copy = malloc(length ? length : 1);
    if (!copy)
        return ms_fail(error, MS_NO_MEMORY, 0, 1, length);
    if (length)
        memcpy(copy, data, length);
    xen->records[xen->n++] = (ms_xen_record){type, length, copy};
    xen->bytes += length;
    return MS_OK;
}

/* Reads exactly so much; a stream that ends before is a fault. */
static int take(struct reader *r, void *to, size_t length, const char *what)
{
    uint8_t *at = to;
    while (length) {
        ssize_t got = read(r->fd, at, length);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return ms_fail(r->error, MS_SYSTEM, errno, 0, 0);
        if (got == 0)
            return xen_fault(r->xen, r->error, "it ends within %s", what);
        at += got;
        length -= (size_t)got;
    }
    return MS_OK;
}

static int headers(struct reader *r)
{
    struct xen_image_header image;
    struct xen_domain_header domain;
    int code = take(r, &image, sizeof image, "its header");
    if (code)
        return code;
    if (image.marker != XEN_MARKER || ntohl(image.id) != XEN_ID)
        return xen_fault(r->xen, r->error, "it does not begin as a libxc stream does");
    r->version = ntohl(image.version);
    if (r->version != 2 && r->version != 3)
        return xen_fault(r->xen, r->error, "it has version %u; only 2 and 3 are known",
                         r->version);
    if (ntohs(image.options) & 1)
        return xen_fault(r->xen, r->error, "it is of a machine with the other byte order");
    code = take(r, &domain, sizeof domain, "its domain header");
    if (code)
        return code;
    if (domain.type != MS_XEN_PV && domain.type != MS_XEN_HVM)
        return xen_fault(r->xen, r->error, "it is of a domain of unknown type %u", domain.type);
    if (domain.page_shift != 12)
        return xen_fault(r->xen, r->error, "its pages have 2^%u bytes instead of 4096",
                         domain.page_shift);
    r->xen->guest = domain.type;
    r->xen->xen_major = domain.major;
    r->xen->xen_minor = domain.minor;
    return MS_OK;
}

int xen_page_read(const ms_xen *xen, uint64_t page, uint8_t *to, ms_error *error)
{
    if (!xen_held(xen, page)) {
        memset(to, 0, MS_PAGE);
        return MS_OK;
    }
    for (size_t done = 0; done < MS_PAGE;) {
        ssize_t got = pread(xen->content, to + done, MS_PAGE - done,
                            (off_t)(page * MS_PAGE + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return ms_fail(error, MS_SYSTEM, got ? errno : EIO, page, 0);
        done += (size_t)got;
    }
    return MS_OK;
}

int xen_page_write(ms_xen *xen, uint64_t page, const uint8_t *from, ms_error *error)
{
    int zero = ms_page_zero(from);
    if (!zero) {
        int code = ms_pwrite(xen->content, from, MS_PAGE, page * MS_PAGE, error);
        if (code)
            return code;
    }
    xen_hold(xen, page, !zero);
    return MS_OK;
}

/* Store n pages of content, neighbours with one call. */
static int store(struct reader *r, const uint64_t *pfns, size_t n, const uint8_t *data)
{
    ms_xen *xen = r->xen;
    for (size_t i = 0; i < n;) {
        size_t run = i;
        while (run < n && pfns[run] == pfns[i] + (run - i) &&
               !ms_page_zero(data + run * MS_PAGE)) {
            xen_hold(xen, pfns[run], 1);
            run++;
        }
        if (run == i) {
            xen_hold(xen, pfns[i], 0);
            i++;
            continue;
        }
        int code = ms_pwrite(xen->content, data + i * MS_PAGE, (run - i) * MS_PAGE,
                             pfns[i] * MS_PAGE, r->error);
        if (code)
            return code;
        i = run;
    }
    return MS_OK;
}

/* Lets body have room for so much, at most XEN_BATCH_MAX pages. */
static int reserve(struct reader *r, size_t size)
{
    if (size <= r->room)
        return MS_OK;
    free(r->body);
    r->room = 0;
    r->body = malloc(size);
    if (!r->body)
        return ms_fail(r->error, MS_NO_MEMORY, 0, 1, size);
    r->room = size;
    return MS_OK;
}

static int pages(struct reader *r, uint32_t length)
{
    ms_xen *xen = r->xen;
    struct xen_pages_header header;
    uint64_t with[XEN_BATCH_MAX];
    size_t n = 0;
    if (length < sizeof header)
        return xen_fault(xen, r->error, "a PAGE_DATA record has %u bytes, too few", length);
    int code = take(r, &header, sizeof header, "a PAGE_DATA record");
    if (code)
        return code;
    if (header.count == 0 || header.count > XEN_BATCH_MAX)
        return xen_fault(xen, r->error, "a PAGE_DATA record has %u pages; 1 to %u are possible",
                         header.count, XEN_BATCH_MAX);
    uint64_t rest = length - sizeof header, table = (uint64_t)header.count * 8;
    if (rest < table)
        return xen_fault(xen, r->error, "a PAGE_DATA record of %u pages has %u bytes, too few",
                         header.count, length);
    xen->named += header.count;
    code = reserve(r, table);
    if (!code)
        code = take(r, r->body, table, "a PAGE_DATA record");
    if (code)
        return code;
    for (uint32_t i = 0; i < header.count; i++) {
        uint64_t entry = xen_u64(r->body + i * 8), pfn = entry & ((UINT64_C(1) << 52) - 1);
        unsigned type = (unsigned)(entry >> 60);
        if (pfn >= xen->max_pages)
            return xen_fault(xen, r->error, "page %#llx lies outside the domain",
                             (unsigned long long)pfn);
        if (entry >> 52 & 0xff || (type >= 5 && type <= 8))
            return xen_fault(xen, r->error, "page %#llx has the unknown type %#x",
                             (unsigned long long)pfn, (unsigned)(entry >> 52));
        if (type == XEN_BROKEN)
            return xen_fault(xen, r->error, "page %#llx is broken memory", (unsigned long long)pfn);
        if (xen->guest == MS_XEN_HVM && type >= 1 && type < XEN_BROKEN)
            return xen_fault(xen, r->error, "page %#llx is a page table, in a domain that has none",
                             (unsigned long long)pfn);
        if (pfn >= xen->pages) {
            if (xen->guest == MS_XEN_PV)
                return xen_fault(xen, r->error, "page %#llx lies outside the domain",
                                 (unsigned long long)pfn);
            xen->pages = pfn + 1;
        }
        xen->types[pfn] = type == XEN_XTAB ? MS_XEN_ABSENT : (uint8_t)(type + 1);
        if (type < XEN_BROKEN)
            with[n++] = pfn;
        else
            xen_hold(xen, pfn, 0);
    }
    xen->sent += n;
    rest -= table;
    if (rest != n * MS_PAGE)
        return xen_fault(xen, r->error, "a PAGE_DATA record with %zu pages of content has %llu "
                         "bytes of it", n, (unsigned long long)rest);
    code = reserve(r, rest);
    if (!code)
        code = take(r, r->body, rest, "the content of pages");
    return code ? code : store(r, with, n, r->body);
}

/* Which phase a record belongs to; -1 if it is not known. */
static int phase_of(uint32_t type)
{
    switch (type) {
    case XEN_PV_INFO:
    case XEN_CPUID_POLICY:
    case XEN_MSR_POLICY:
    case XEN_STATIC_DATA_END:
        return STATIC;
    case XEN_PV_P2M_FRAMES:
    case XEN_PAGE_DATA:
        return MEMORY;
    case XEN_PV_VCPU_BASIC:
    case XEN_PV_VCPU_EXTENDED:
    case XEN_PV_VCPU_XSAVE:
    case XEN_PV_VCPU_MSRS:
    case XEN_SHARED_INFO:
    case XEN_TSC_INFO:
    case XEN_HVM_CONTEXT:
    case XEN_HVM_PARAMS:
    case XEN_END:
        return STATE;
    default:
        return -1;
    }
}

static int of_other_guest(const ms_xen *xen, uint32_t type)
{
    switch (type) {
    case XEN_PV_INFO:
    case XEN_PV_P2M_FRAMES:
    case XEN_PV_VCPU_BASIC:
    case XEN_PV_VCPU_EXTENDED:
    case XEN_PV_VCPU_XSAVE:
    case XEN_PV_VCPU_MSRS:
    case XEN_SHARED_INFO:
        return xen->guest != MS_XEN_PV;
    case XEN_HVM_CONTEXT:
    case XEN_HVM_PARAMS:
        return xen->guest != MS_XEN_HVM;
    default:
        return 0;
    }
}

static int is_vcpu(uint32_t type)
{
    return (type >= XEN_PV_VCPU_BASIC && type <= XEN_PV_VCPU_XSAVE) || type == XEN_PV_VCPU_MSRS;
}

/* A record may come once; of a virtual processor's once for each. */
static int is_duplicate(const ms_xen *xen, uint32_t type, const uint8_t *data)
{
    for (size_t i = 0; i < xen->n; i++)
        if (xen->records[i].type == type &&
            (!is_vcpu(type) || xen_u32(xen->records[i].data) == xen_u32(data)))
            return 1;
    return 0;
}

/* A record that is kept as it is: its length by its type, and what of it matters for the rest. */
static int checked(struct reader *r, uint32_t type, const uint8_t *data, uint32_t length)
{
    ms_xen *xen = r->xen;
    uint32_t exact = 0, least = 0;
    switch (type) {
    case XEN_PV_INFO: exact = 8; break;
    case XEN_SHARED_INFO: exact = MS_PAGE; break;
    case XEN_TSC_INFO: exact = 24; break;
    case XEN_PV_VCPU_BASIC: exact = 8 + XEN_CONTEXT; break;
    case XEN_PV_P2M_FRAMES: least = 8; break;
    case XEN_HVM_PARAMS: least = 8; break;
    case XEN_CPUID_POLICY: case XEN_MSR_POLICY: case XEN_HVM_CONTEXT: least = 1; break;
    default: if (is_vcpu(type)) least = 8; break;
    }
    if (exact ? length != exact : length < least)
        return xen_fault(xen, r->error, "a record of type %#x has %u bytes instead of %u", type,
                         length, exact ? exact : least);
    if (type == XEN_PV_INFO && (data[0] != 8 || data[1] != 4))
        return xen_fault(xen, r->error, "its guest has %u-bit words and %u levels of page tables; "
                         "only 64-bit ones can be taken", data[0] * 8u, data[1]);
    if (type == XEN_PV_P2M_FRAMES) {
        uint64_t first = xen_u32(data), last = xen_u32(data + 4);
        if (first != 0 || last >= xen->max_pages ||
            length != 8 + (last / (MS_PAGE / 8) + 1) * 8)
            return xen_fault(xen, r->error, "its P2M frames do not describe pages %#llx to %#llx",
                             (unsigned long long)first, (unsigned long long)last);
        xen->pages = last + 1;
    }
    if (type == XEN_HVM_PARAMS && length != 8 + (uint64_t)xen_u32(data) * 16)
        return xen_fault(xen, r->error, "%u HVM parameters do not fit into %u bytes",
                         xen_u32(data), length);
    return MS_OK;
}

static int enter(struct reader *r, uint32_t type)
{
    ms_xen *xen = r->xen;
    int phase = phase_of(type);
    if (phase < 0 && (type & XEN_OPTIONAL))
        return MS_OK; /* anywhere */
    if (type == XEN_VERIFY || type == XEN_CHECKPOINT)
        return xen_fault(xen, r->error, "it is one of several checkpoints, or of a debugging run");
    if (phase < 0)
        return xen_fault(xen, r->error, "it has a mandatory record of unknown type %#x", type);
    if (of_other_guest(xen, type))
        return xen_fault(xen, r->error, "it has a record of type %#x, which is for another kind of "
                         "guest", type);
    if (phase < (int)r->phase)
        return xen_fault(xen, r->error, "a record of type %#x comes too late", type);
    if (phase > STATIC && r->phase == STATIC &&
        (r->version > 2 || (xen->guest == MS_XEN_PV && !xen_find(xen, XEN_PV_INFO))))
        return xen_fault(xen, r->error, "a record of type %#x comes before the end of the static "
                         "data", type);
    if (type == XEN_PAGE_DATA && xen->guest == MS_XEN_PV && !xen_find(xen, XEN_PV_P2M_FRAMES))
        return xen_fault(xen, r->error, "pages come before the P2M frames");
    if (phase > (int)r->phase)
        r->phase = (enum phase)phase;
    return MS_OK;
}

static int blob(struct reader *r, uint32_t type, uint32_t length)
{
    ms_xen *xen = r->xen;
    if (length > XEN_BLOB_MAX || xen->bytes + length > XEN_BLOBS_MAX)
        return xen_fault(xen, r->error, "record of type %#x has %u bytes, which is too many", type,
                         length);
    uint8_t *data = malloc((size_t)length + 8);
    if (!data)
        return ms_fail(r->error, MS_NO_MEMORY, 0, 1, length);
    memset(data, 0, 8); /* what is looked at in an empty one */
    int code = take(r, data, (length + 7) & ~UINT32_C(7), "a record");
    /* Older Xen wrote such records without content (the specification's errata). */
    if (!code && !(length <= 8 && (is_vcpu(type) || type == XEN_HVM_PARAMS))) {
        code = checked(r, type, data, length);
        if (!code && !(type & XEN_OPTIONAL) && is_duplicate(xen, type, data))
            code = xen_fault(xen, r->error, "a record of type %#x comes twice", type);
        if (!code)
            code = ms_xen_add_record(xen, type, data, length, r->error);
    }
    free(data);
    return code;
}

static int static_end(struct reader *r, uint32_t length)
{
    ms_xen *xen = r->xen;
    if (length)
        return xen_fault(xen, r->error, "the end of the static data has content");
    if (xen->guest == MS_XEN_PV && !xen_find(xen, XEN_PV_INFO))
        return xen_fault(xen, r->error, "the static data end without X86_PV_INFO");
    r->phase = MEMORY;
    return MS_OK;
}

static int complete(struct reader *r, uint32_t length)
{
    static const uint32_t pv[] = {XEN_PV_P2M_FRAMES, XEN_SHARED_INFO, XEN_PV_VCPU_BASIC};
    static const uint32_t hvm[] = {XEN_HVM_CONTEXT, XEN_HVM_PARAMS};
    ms_xen *xen = r->xen;
    const uint32_t *needed = xen->guest == MS_XEN_PV ? pv : hvm;
    size_t n = xen->guest == MS_XEN_PV ? 3 : 2;
    if (length)
        return xen_fault(xen, r->error, "its END record has content");
    for (size_t i = 0; i < n; i++)
        if (!xen_find(xen, needed[i]))
            return xen_fault(xen, r->error, "it has no record of type %#x", needed[i]);
    if (xen->pages == 0)
        return xen_fault(xen, r->error, "it has no memory");
    return MS_OK;
}

static int record(struct reader *r, int *ended)
{
    struct xen_record_header header;
    int code = take(r, &header, sizeof header, "a record's header");
    if (!code)
        code = enter(r, header.type);
    if (code)
        return code;
    switch (header.type) {
    case XEN_END:
        *ended = 1;
        return complete(r, header.length);
    case XEN_STATIC_DATA_END:
        return static_end(r, header.length);
    case XEN_PAGE_DATA:
        return pages(r, header.length);
    default:
        return blob(r, header.type, header.length);
    }
}

/* Reads one libxc stream up to and with its END. The content file must be empty. */
int ms_xen_read(ms_xen *xen, int fd, ms_error *error)
{
    struct reader r = {.xen = xen, .fd = fd, .error = error};
    int ended = 0;
    int code = headers(&r);
    while (!code && !ended)
        code = record(&r, &ended);
    free(r.body);
    return code;
}
