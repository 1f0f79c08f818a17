/*
 * Building a domain that boots, with libxl, as `xl create` does. The configuration is libxl's JSON, which
 * `xl` itself takes only with a saved domain behind it.
 *
 * Source: libxl.h (libxl_domain_create_new).
 */
#include "xen_live.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <libxl.h>

struct words {
    xentoollog_logger logger; /* first: the library hands it back to us */
    char *why;
    size_t room;
};

static void note(struct xentoollog_logger *logger, xentoollog_level level, int errnoval,
                 const char *context, const char *format, va_list args)
{
    struct words *words = (struct words *)logger;
    (void)context;
    if (level < XTL_ERROR || words->why[0])
        return; /* the first one is the cause */
    int at = vsnprintf(words->why, words->room, format, args);
    if (errnoval >= 0 && at > 0 && (size_t)at < words->room)
        snprintf(words->why + at, words->room - (size_t)at, ": %s", strerror(errnoval));
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

int ms_domain_boot(const char *json, char *why, int room)
{
    struct words words = {{note, no_progress, no_destroy}, why, (size_t)room};
    libxl_ctx *ctx = NULL;
    libxl_domain_config config;
    uint32_t domid = 0;
    why[0] = 0;
    if (libxl_ctx_alloc(&ctx, LIBXL_VERSION, 0, &words.logger)) {
        if (!why[0])
            snprintf(why, (size_t)room, "libxl cannot be used");
        return -1;
    }
    libxl_domain_config_init(&config);
    int code = libxl_domain_config_from_json(ctx, &config, json);
    if (!code)
        code = libxl_domain_create_new(ctx, &config, &domid, NULL, NULL);
    if (code && !why[0])
        snprintf(why, (size_t)room, "libxl's error %d", code);
    libxl_domain_config_dispose(&config);
    libxl_ctx_free(ctx);
    return code ? -1 : 0;
}
