/*
 * What of a domain's memory depends on the machine frames it happened to have is made independent of
 * them, so that equal guests have equal memory (docs/xen-image.md):
 *
 *   page tables            libxc writes guest frame numbers already; each must be one of the domain
 *   P2M frames             entry n is n where the domain has that page, else all ones
 *   start info             the store's and the console's pages as guest frame numbers; ports, flags
 *                          and the address of shared info, which a restore sets, are zero
 *   store, console frames  kept beside the memory, which has zeros there
 */
#include "xen.h"

#include <stdlib.h>
#include <string.h>

#define PTE_PRESENT 1
#define PTE_LARGE (1 << 7)
#define PTE_FRAME UINT64_C(0x000ffffffffff000)

enum { ENTRIES = MS_PAGE / 8, NEIGHBOURS = 4 };

static int page_table(ms_xen *xen, uint64_t page, int level, ms_error *error)
{
    uint8_t table[MS_PAGE];
    int code = xen_page_read(xen, page, table, error);
    for (int i = 0; !code && i < ENTRIES; i++) {
        uint64_t entry = xen_u64(table + i * 8), pfn = (entry & PTE_FRAME) / MS_PAGE;
        if (!(entry & PTE_PRESENT))
            continue;
        if (level > 1 && entry & PTE_LARGE)
            return xen_fault(xen, error, "entry %d of the page table in page %#llx is of a large "
                             "page", i, (unsigned long long)page);
        if (pfn >= xen->pages || xen->types[pfn] == MS_XEN_ABSENT)
            return xen_fault(xen, error, "entry %d of the page table in page %#llx points to page "
                             "%#llx, outside the domain", i, (unsigned long long)page,
                             (unsigned long long)pfn);
    }
    return code;
}

/* A page that must be there, with content, and no page table. */
static int ordinary(ms_xen *xen, uint64_t page, const char *what, ms_error *error)
{
    if (page >= xen->pages || xen->types[page] != MS_XEN_NORMAL)
        return xen_fault(xen, error, "its %s is in page %#llx, which is not ordinary memory of the "
                         "domain", what, (unsigned long long)page);
    return MS_OK;
}

/* Replaces the P2M's content by the canonical one; *was gets what it held: xen->pages machine frame
 * numbers, to be freed. */
static int p2m(ms_xen *xen, uint64_t **was, ms_error *error)
{
    const ms_xen_record *frames = xen_find(xen, XEN_PV_P2M_FRAMES);
    uint64_t count = (xen->pages + ENTRIES - 1) / ENTRIES;
    int code = MS_OK;
    *was = malloc(count * MS_PAGE);
    if (!*was)
        return ms_fail(error, MS_NO_MEMORY, 0, count, MS_PAGE);
    for (uint64_t i = 0; !code && i < count; i++) {
        uint64_t at = xen_u64(frames->data + 8 + i * 8), table[ENTRIES];
        code = ordinary(xen, at, "P2M", error);
        if (!code)
            code = xen_page_read(xen, at, (uint8_t *)(*was + i * ENTRIES), error);
        for (int j = 0; j < ENTRIES; j++) {
            uint64_t pfn = i * ENTRIES + (uint64_t)j;
            table[j] = pfn < xen->pages && xen->types[pfn] != MS_XEN_ABSENT ? pfn : UINT64_MAX;
        }
        if (!code)
            code = xen_page_write(xen, at, (uint8_t *)table, error);
    }
    return code;
}

/*
 * Start info's word for a shared page. The guest turns it into a guest frame number when it is
 * suspended, and a restore back into a machine frame number, so that a domain that was saved before
 * it ran again has the latter there. The three pages lie side by side (alloc_magic_pages in libxc),
 * and that tells.
 */
static uint64_t shared_page(const ms_xen *xen, const uint64_t *p2m, uint64_t info, uint64_t word)
{
    if (word >= info && word - info <= NEIGHBOURS)
        return word;
    for (uint64_t pfn = info; pfn < xen->pages && pfn <= info + NEIGHBOURS; pfn++)
        if (p2m[pfn] == word)
            return pfn;
    return word;
}

int ms_xen_set_frame(ms_xen *xen, int role, uint64_t page, const uint8_t *data, ms_error *error)
{
    uint8_t *copy = malloc(MS_PAGE);
    if (!copy)
        return ms_fail(error, MS_NO_MEMORY, 0, 1, MS_PAGE);
    memcpy(copy, data, MS_PAGE);
    free(xen->frames[role]);
    xen->frames[role] = copy;
    xen->frame_pages[role] = page;
    return MS_OK;
}

/* Takes a shared page's content out of the memory. */
static int set_aside(ms_xen *xen, int role, uint64_t page, ms_error *error)
{
    static const char *const names[] = {"store ring", "console ring"};
    uint8_t content[MS_PAGE];
    int code = ordinary(xen, page, names[role], error);
    if (!code)
        code = xen_page_read(xen, page, content, error);
    if (!code)
        code = ms_xen_set_frame(xen, role, page, content, error);
    if (!code)
        xen_hold(xen, page, 0);
    return code;
}

static int start_info(ms_xen *xen, const uint64_t *p2m, ms_error *error)
{
    const ms_xen_record *vcpu = NULL;
    uint8_t info[MS_PAGE];
    uint64_t pages = xen->pages;
    for (size_t i = 0; i < xen->n; i++)
        if (xen->records[i].type == XEN_PV_VCPU_BASIC && xen_u32(xen->records[i].data) == 0)
            vcpu = &xen->records[i];
    if (!vcpu)
        return xen_fault(xen, error, "it has no state of virtual processor 0");
    uint64_t at = xen_u64(vcpu->data + 8 + XEN_CONTEXT_RDX);
    int code = ordinary(xen, at, "start info", error);
    if (!code)
        code = xen_page_read(xen, at, info, error);
    if (code)
        return code;
    uint64_t store = shared_page(xen, p2m, at, xen_u64(info + XEN_INFO_STORE));
    uint64_t console = shared_page(xen, p2m, at, xen_u64(info + XEN_INFO_CONSOLE));
    memcpy(info + XEN_INFO_PAGES, &pages, 8);
    memset(info + XEN_INFO_SHARED, 0, 8);
    memset(info + XEN_INFO_FLAGS, 0, 4);
    memcpy(info + XEN_INFO_STORE, &store, 8);
    memset(info + XEN_INFO_STORE_PORT, 0, 4);
    memcpy(info + XEN_INFO_CONSOLE, &console, 8);
    memset(info + XEN_INFO_CONSOLE_PORT, 0, 4);
    code = xen_page_write(xen, at, info, error);
    if (!code)
        code = set_aside(xen, MS_XEN_STORE, store, error);
    return code ? code : set_aside(xen, MS_XEN_CONSOLE, console, error);
}

static int paravirtual(ms_xen *xen, ms_error *error)
{
    uint64_t *frames = NULL;
    int code = MS_OK;
    for (uint64_t page = 0; !code && page < xen->pages; page++) {
        int level = xen_level(xen->types[page]);
        if (level && xen_held(xen, page))
            code = page_table(xen, page, level, error);
    }
    if (!code)
        code = p2m(xen, &frames, error);
    if (!code)
        code = start_info(xen, frames, error);
    free(frames);
    return code;
}

static int hardware(ms_xen *xen, ms_error *error)
{
    const ms_xen_record *params = xen_find(xen, XEN_HVM_PARAMS);
    int code = MS_OK;
    for (uint32_t i = 0; !code && i < xen_u32(params->data); i++) {
        uint64_t index = xen_u64(params->data + 8 + i * 16);
        uint64_t value = xen_u64(params->data + 16 + i * 16);
        if (index == XEN_PARAM_STORE && value)
            code = set_aside(xen, MS_XEN_STORE, value, error);
        if (index == XEN_PARAM_CONSOLE && value)
            code = set_aside(xen, MS_XEN_CONSOLE, value, error);
    }
    return code;
}

/* Makes a domain that was just read canonical. */
int ms_xen_canonical(ms_xen *xen, ms_error *error)
{
    return xen->guest == MS_XEN_PV ? paravirtual(xen, error) : hardware(xen, error);
}

/* All pages that are not zero, out of `mapped`, which is the content file in memory. */
int ms_xen_copies(const ms_xen *xen, const uint8_t *mapped, ms_copies *out, ms_error *error)
{
    for (uint64_t page = 0; page < xen->pages; page++) {
        if (!xen_held(xen, page))
            continue;
        int code = ms_grow((void **)&out->v, &out->cap, out->n + 1, sizeof *out->v, error);
        if (code)
            return code;
        out->v[out->n++] = (ms_copy){page, mapped + page * MS_PAGE};
    }
    return MS_OK;
}

/* The content file has the pages of these runs. */
int ms_xen_hold(ms_xen *xen, const ms_runs *runs, ms_error *error)
{
    for (size_t i = 0; i < runs->n; i++)
        for (uint64_t page = runs->v[i].page; page < runs->v[i].page + runs->v[i].count; page++) {
            if (page >= xen->pages || !xen_has_content(xen->types[page]))
                return xen_fault(xen, error, "page %#llx has content, but the domain has no such "
                                 "page", (unsigned long long)page);
            xen_hold(xen, page, 1);
        }
    return MS_OK;
}
