/* Shared inside the C core; not seen by Python. */
#ifndef MEMSAVE_CORE_H
#define MEMSAVE_CORE_H
#include "api.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the stored structures are little endian and are used as they are"
#endif

/* Pack numbers that are no pack: a zero page, and (in segments) "whatever the process holds". */
#define MS_ZERO UINT32_C(0xFFFFFFFF)
#define MS_LIVE UINT32_C(0xFFFFFFFE)

_Static_assert(sizeof(ms_run) == 24 && offsetof(ms_run, count) == 16, "stored in page maps");
_Static_assert(sizeof(ms_span) == 16, "stored in pack indexes");

int ms_fail(ms_error *error, int code, int err, uint64_t a, uint64_t b);
int ms_grow(void **v, size_t *cap, size_t n, size_t size, ms_error *error);
int ms_pack_read(const ms_pack *packs, uint32_t pack, uint64_t slot, uint64_t count, uint8_t *to,
                 ms_error *error);
int ms_pwrite(int fd, const uint8_t *from, size_t length, uint64_t offset, ms_error *error);
uint8_t *ms_batch_new(ms_error *error);
#endif
