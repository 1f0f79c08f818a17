/*
 * What Python uses of libdevmapper (libdevmapper.h, package libdevmapper-dev), and the little that is
 * ours. cffi reads this file too: only types, enums and prototypes; the compiler checks them against
 * the library's header.
 */
#ifndef BLOCKCOW_DEVMAPPER_H
#define BLOCKCOW_DEVMAPPER_H
#include <stddef.h>

/* Creates a task of one of the kinds below, named; NULL if there is no memory or driver. */
struct dm_task *bc_task(int kind, const char *name);
/* Runs it: 0, or the errno of the ioctl, or EIO where the library itself failed. */
int bc_run(struct dm_task *task);
/* What the library said about the last failure in this thread; empty if nothing. */
const char *bc_words(void);
/* Whether the driver answers at all: 0 or an errno. */
int bc_driver(void);
/* Sends the library's messages to bc_words instead of standard error. Once. */
void bc_quiet(void);

/* What dm_task_get_info says; exists is 0 for a device that is not there. */
typedef struct {
    int exists, suspended, live_table, inactive_table, read_only, open_count, targets;
    unsigned int event, major, minor;
} bc_info;
int bc_get_info(struct dm_task *task, bc_info *info);
/* The devices beneath: up to n numbers as major << 32 | minor; returns how many there are. */
int bc_get_deps(struct dm_task *task, unsigned long long *numbers, int n);
/* Names of all devices, each ended by a zero octet; returns the bytes needed. */
size_t bc_get_names(struct dm_task *task, char *names, size_t n);

extern const int bc_create, bc_reload, bc_remove, bc_suspend, bc_resume, bc_info_of, bc_deps,
    bc_rename, bc_status, bc_table, bc_wait_event, bc_list, bc_message, bc_clear;

#endif
