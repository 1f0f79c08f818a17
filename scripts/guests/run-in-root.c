/* Runs PROGRAM of the Debian root beside this file's directory, without chroot: the root's dynamic
 * loader is told where its libraries are. Static, so that LD_PRELOAD is meant for the program and
 * reaches it untouched. */
#define _GNU_SOURCE
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char *inside(const char *base, const char *path)
{
    char *joined;
    if (asprintf(&joined, "%s/root%s", base, path) < 0)
        exit(127);
    return joined;
}

int main(int argc, char **argv)
{
    char self[PATH_MAX], *libraries;
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);

    if (length < 0) {
        perror("/proc/self/exe");
        return 127;
    }
    self[length] = 0;
    char *base = dirname(dirname(self));
    char *loader = inside(base, "/usr/lib64/ld-linux-x86-64.so.2");
    if (access(loader, X_OK) != 0)
        loader = inside(base, "/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2");
    if (asprintf(&libraries, "%s:%s", inside(base, "/usr/lib/x86_64-linux-gnu"),
                 inside(base, "/lib/x86_64-linux-gnu")) < 0)
        return 127;
    setenv("QEMU_MODULE_DIR", inside(base, "/usr/lib/x86_64-linux-gnu/qemu"), 1);

    char **args = calloc((size_t)argc + 16, sizeof *args);
    int n = 0;
    args[n++] = loader;
    args[n++] = "--library-path";
    args[n++] = libraries;
    args[n++] = "--argv0";
    args[n++] = PROGRAM;
    args[n++] = inside(base, "/usr/bin/" PROGRAM);
    if (!strncmp(PROGRAM, "qemu-system", 11)) {
        args[n++] = "-L";
        args[n++] = inside(base, "/usr/share/qemu");
        args[n++] = "-L";
        args[n++] = inside(base, "/usr/share/seabios");
    }
    for (int i = 1; i < argc; i++)
        args[n++] = argv[i];
    execv(loader, args);
    perror(loader);
    return 127;
}
