/*
 * Streams of Xen's libxc and what is in them, shared by xen_*.c.
 *
 * Sources: Xen docs/specs/libxc-migration-stream.pandoc; public headers xen.h (start_info),
 * arch-x86/xen.h (vcpu_guest_context), hvm/params.h, domctl.h (page types).
 */
#ifndef MEMSAVE_XEN_H
#define MEMSAVE_XEN_H
#include "core.h"

#define XEN_MARKER UINT64_C(0xFFFFFFFFFFFFFFFF)
#define XEN_ID 0x58454E46 /* "XENF" */
#define XEN_OPTIONAL UINT32_C(0x80000000)

enum xen_record_type {
    XEN_END = 0,
    XEN_PAGE_DATA = 1,
    XEN_PV_INFO = 2,
    XEN_PV_P2M_FRAMES = 3,
    XEN_PV_VCPU_BASIC = 4,
    XEN_PV_VCPU_EXTENDED = 5,
    XEN_PV_VCPU_XSAVE = 6,
    XEN_SHARED_INFO = 7,
    XEN_TSC_INFO = 8,
    XEN_HVM_CONTEXT = 9,
    XEN_HVM_PARAMS = 10,
    XEN_PV_VCPU_MSRS = 12,
    XEN_VERIFY = 13,
    XEN_CHECKPOINT = 14,
    XEN_STATIC_DATA_END = 16,
    XEN_CPUID_POLICY = 17,
    XEN_MSR_POLICY = 18
};

enum {
    XEN_BATCH = 1024,             /* pages of a PAGE_DATA record that we write, as libxc does */
    XEN_BATCH_MAX = 4096,         /* and that we read */
    XEN_BLOB_MAX = 16 << 20,      /* bytes of any other record */
    XEN_BLOBS_MAX = 256 << 20,    /* and of all of them */
    XEN_BROKEN = 13,              /* page types without content, as in the stream */
    XEN_XALLOC = 14,
    XEN_XTAB = 15,
    XEN_CONTEXT = 5168,           /* sizeof(vcpu_guest_context_x86_64_t) */
    XEN_CONTEXT_RDX = 616,        /* user_regs.rdx in it: vCPU 0's says where start info is */
    XEN_INFO_PAGES = 32,          /* offsets in start_info, 64-bit */
    XEN_INFO_SHARED = 40,
    XEN_INFO_FLAGS = 48,
    XEN_INFO_STORE = 56,
    XEN_INFO_STORE_PORT = 64,
    XEN_INFO_CONSOLE = 72,
    XEN_INFO_CONSOLE_PORT = 80,
    XEN_PARAM_STORE = 1,
    XEN_PARAM_CONSOLE = 17
};

struct xen_image_header {
    uint64_t marker;
    uint32_t id, version; /* big endian, as all of this structure */
    uint16_t options, reserved[3];
};
struct xen_domain_header {
    uint32_t type;
    uint16_t page_shift, reserved;
    uint32_t major, minor;
};
struct xen_record_header {
    uint32_t type, length;
};
struct xen_pages_header {
    uint32_t count, reserved;
};
_Static_assert(sizeof(struct xen_image_header) == 24, "libxc image header");
_Static_assert(sizeof(struct xen_domain_header) == 16, "libxc domain header");

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
int xen_fault(ms_xen *xen, ms_error *error, const char *form, ...);
const ms_xen_record *xen_find(const ms_xen *xen, uint32_t type);
int xen_page_read(const ms_xen *xen, uint64_t page, uint8_t *to, ms_error *error);
int xen_page_write(ms_xen *xen, uint64_t page, const uint8_t *from, ms_error *error);

static inline int xen_held(const ms_xen *xen, uint64_t page)
{
    return xen->held[page / 8] >> (page % 8) & 1;
}

static inline void xen_hold(ms_xen *xen, uint64_t page, int held)
{
    if (held)
        xen->held[page / 8] |= (uint8_t)(1 << (page % 8));
    else
        xen->held[page / 8] &= (uint8_t)~(1 << (page % 8));
}

/* Whether a page type of ours has content; its level in a page table, 0 for none. */
static inline int xen_has_content(uint8_t type)
{
    return type != MS_XEN_ABSENT && type <= XEN_BROKEN;
}

static inline int xen_level(uint8_t type)
{
    int level = (type & ~MS_XEN_PIN) - MS_XEN_NORMAL;
    return type <= XEN_BROKEN && level >= 1 && level <= 4 ? level : 0;
}

static inline uint64_t xen_u64(const uint8_t *at)
{
    uint64_t value;
    __builtin_memcpy(&value, at, sizeof value);
    return value;
}

static inline uint32_t xen_u32(const uint8_t *at)
{
    uint32_t value;
    __builtin_memcpy(&value, at, sizeof value);
    return value;
}
#endif
