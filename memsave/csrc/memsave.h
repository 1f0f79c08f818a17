/* The C core of memsave. Included by the cffi module and by tests/memsave/test_core.c.
 *
 * Pages are 4096 bytes. A *reference* says where a page's content is: 0 for a page of zeros, else
 * (pack index + 1) << 40 | slot, with pack indices into an array the caller holds. Functions return 0
 * or a count, and a negative errno on failure; outputs come last; no function keeps a pointer.
 */
#ifndef MEMSAVE_H
#define MEMSAVE_H
#include <stddef.h>
#include <stdint.h>

#define MS_PAGE 4096

#include "memsave_api.h"

_Static_assert(sizeof(ms_run) == 16, "two u64, as in the page map file");
#endif
