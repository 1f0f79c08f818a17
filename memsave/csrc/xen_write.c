/* Writing a domain as a libxc stream of version 3, which xc_domain_restore takes. */
#define _GNU_SOURCE
#include "xen.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int put(int fd, const void *from, size_t length, ms_error *error)
{
    const uint8_t *at = from;
    while (length) {
        ssize_t done = write(fd, at, length);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return ms_fail(error, MS_SYSTEM, errno, 0, 0);
        at += done;
        length -= (size_t)done;
    }
    return MS_OK;
}

static int put_record(int fd, uint32_t type, const void *data, uint32_t length, ms_error *error)
{
    static const uint8_t padding[8];
    struct xen_record_header header = {type, length};
    int code = put(fd, &header, sizeof header, error);
    if (!code)
        code = put(fd, data, length, error);
    return code ? code : put(fd, padding, (8 - length % 8) % 8, error);
}

static int put_headers(const ms_xen *xen, int fd, ms_error *error)
{
    struct xen_image_header image = {.marker = XEN_MARKER, .id = htonl(XEN_ID), .version = htonl(3)};
    struct xen_domain_header domain = {.type = xen->guest, .page_shift = 12,
                                       .major = xen->xen_major, .minor = xen->xen_minor};
    int code = put(fd, &image, sizeof image, error);
    return code ? code : put(fd, &domain, sizeof domain, error);
}

/* What a page is to the restore: its content, with the rings back in their places. */
static int content(const ms_xen *xen, uint64_t page, uint8_t *to, ms_error *error)
{
    for (int role = 0; role < MS_XEN_ROLES; role++)
        if (xen->frames[role] && xen->frame_pages[role] == page) {
            memcpy(to, xen->frames[role], MS_PAGE);
            return MS_OK;
        }
    return xen_page_read(xen, page, to, error);
}

struct batch {
    struct xen_record_header record;
    struct xen_pages_header pages;
    uint64_t entries[XEN_BATCH];
};

static int put_pages(const ms_xen *xen, int fd, ms_error *error)
{
    struct batch head;
    uint8_t *data = malloc((size_t)XEN_BATCH * MS_PAGE);
    uint64_t page = 0;
    int code = MS_OK;
    if (!data)
        return ms_fail(error, MS_NO_MEMORY, 0, XEN_BATCH, MS_PAGE);
    while (!code && page < xen->pages) {
        uint32_t n = 0, with = 0;
        for (; !code && page < xen->pages && n < XEN_BATCH; page++) {
            uint8_t type = xen->types[page];
            if (type == MS_XEN_ABSENT)
                continue;
            head.entries[n++] = (uint64_t)(type - 1) << 60 | page;
            if (xen_has_content(type))
                code = content(xen, page, data + (size_t)with++ * MS_PAGE, error);
        }
        if (code || n == 0)
            break;
        size_t table = sizeof head.pages + (size_t)n * 8;
        head.pages = (struct xen_pages_header){n, 0};
        head.record = (struct xen_record_header){XEN_PAGE_DATA,
                                                 (uint32_t)(table + (size_t)with * MS_PAGE)};
        code = put(fd, &head, sizeof head.record + table, error);
        if (!code)
            code = put(fd, data, (size_t)with * MS_PAGE, error);
    }
    free(data);
    return code;
}

enum part { STATIC, FRAMES, REST };

static enum part part_of(uint32_t type)
{
    switch (type) {
    case XEN_PV_INFO:
    case XEN_CPUID_POLICY:
    case XEN_MSR_POLICY:
        return STATIC;
    case XEN_PV_P2M_FRAMES:
        return FRAMES;
    default:
        return REST;
    }
}

static int put_records(const ms_xen *xen, int fd, enum part part, ms_error *error)
{
    int code = MS_OK;
    for (size_t i = 0; !code && i < xen->n; i++)
        if (part_of(xen->records[i].type) == part)
            code = put_record(fd, xen->records[i].type, xen->records[i].data,
                              xen->records[i].length, error);
    return code;
}

int ms_xen_write(ms_xen *xen, int fd, ms_error *error)
{
    int code = put_headers(xen, fd, error);
    if (!code)
        code = put_records(xen, fd, STATIC, error);
    if (!code)
        code = put_record(fd, XEN_STATIC_DATA_END, NULL, 0, error);
    if (!code)
        code = put_records(xen, fd, FRAMES, error);
    if (!code)
        code = put_pages(xen, fd, error);
    if (!code)
        code = put_records(xen, fd, REST, error);
    return code ? code : put_record(fd, XEN_END, NULL, 0, error);
}
