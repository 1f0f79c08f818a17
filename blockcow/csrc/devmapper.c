/* The part of the binding to libdevmapper that is easier in C: constants, errors, structures. */
#include "devmapper.h"

#include <errno.h>
#include <libdevmapper.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

const int bc_create = DM_DEVICE_CREATE, bc_reload = DM_DEVICE_RELOAD, bc_remove = DM_DEVICE_REMOVE,
          bc_suspend = DM_DEVICE_SUSPEND, bc_resume = DM_DEVICE_RESUME, bc_info_of = DM_DEVICE_INFO,
          bc_deps = DM_DEVICE_DEPS, bc_rename = DM_DEVICE_RENAME, bc_status = DM_DEVICE_STATUS,
          bc_table = DM_DEVICE_TABLE, bc_wait_event = DM_DEVICE_WAITEVENT, bc_list = DM_DEVICE_LIST,
          bc_message = DM_DEVICE_TARGET_MSG, bc_clear = DM_DEVICE_CLEAR;

enum { LOG_WARNINGS = 4, LEVEL = 7 }; /* levels of dm_log_with_errno_fn, as syslog(3) */
static _Thread_local char words[1024];

__attribute__((format(printf, 5, 6))) static void note(int level, const char *file, int line,
                                                       int number, const char *form, ...)
{
    (void)file;
    (void)line;
    (void)number;
    if ((level & LEVEL) > LOG_WARNINGS)
        return;
    va_list args;
    va_start(args, form);
    vsnprintf(words, sizeof words, form, args); /* the last one counts: retries repeat themselves */
    va_end(args);
}

void bc_quiet(void)
{
    dm_log_with_errno_init(note);
}

const char *bc_words(void)
{
    return words;
}

struct dm_task *bc_task(int kind, const char *name)
{
    words[0] = 0;
    struct dm_task *task = dm_task_create(kind);
    if (task && name && !dm_task_set_name(task, name)) {
        dm_task_destroy(task);
        return NULL;
    }
    return task;
}

int bc_run(struct dm_task *task)
{
    if (dm_task_run(task))
        return 0;
    int number = dm_task_get_errno(task);
    return number ? number : EIO;
}

int bc_driver(void)
{
    struct dm_task *task = bc_task(DM_DEVICE_VERSION, NULL);
    if (!task)
        return ENODEV;
    int number = bc_run(task);
    dm_task_destroy(task);
    return number;
}

int bc_get_info(struct dm_task *task, bc_info *info)
{
    struct dm_info found;
    if (!dm_task_get_info(task, &found))
        return 0;
    *info = (bc_info){found.exists,       found.suspended,  found.live_table,
                      found.inactive_table, found.read_only, found.open_count,
                      found.target_count, found.event_nr,   found.major,
                      found.minor};
    return 1;
}

int bc_get_deps(struct dm_task *task, unsigned long long *numbers, int n)
{
    struct dm_deps *deps = dm_task_get_deps(task);
    if (!deps)
        return -1;
    for (unsigned i = 0; i < deps->count && (int)i < n; i++) {
        unsigned long long device = deps->device[i]; /* huge_encode_dev of linux/kdev_t.h */
        unsigned long long major = (device >> 8) & 0xfff;
        unsigned long long minor = (device & 0xff) | ((device >> 12) & 0xfff00);
        numbers[i] = major << 32 | minor;
    }
    return (int)deps->count;
}

size_t bc_get_names(struct dm_task *task, char *names, size_t n)
{
    struct dm_names *entry = dm_task_get_names(task);
    size_t used = 0;
    if (!entry || !entry->dev)
        return 0;
    for (;;) {
        size_t length = strlen(entry->name) + 1;
        if (used + length <= n)
            memcpy(names + used, entry->name, length);
        used += length;
        if (!entry->next)
            return used;
        entry = (struct dm_names *)((char *)entry + entry->next);
    }
}
