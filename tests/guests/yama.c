/* Whether a process may read another one's memory, by Yama's rules. Run as root on a kernel with Yama:
 * starts a victim of user 1000 that execs itself (with PR_SET_PTRACER_ANY set before, if an argument is
 * given), and lets an unrelated process of the same user do what a capture does. Prints "read=… fd=…",
 * each "ok" or the reason. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define USER 1000
static char secret[8] = "secret";

static void become_user(void)
{
    if (setgid(USER) != 0 || setuid(USER) != 0)
        _exit(2);
}

static void victim(int to)
{
    void *address = secret;
    if (write(to, &address, sizeof address) == sizeof address)
        pause();
    _exit(2);
}

static void reader(pid_t pid, void *address)
{
    char found[8] = "";
    struct iovec local = {found, sizeof found}, remote = {address, sizeof found};
    become_user();
    ssize_t got = process_vm_readv(pid, &local, 1, &remote, 1, 0);
    const char *read_result = got < 0 ? strerror(errno) : strcmp(found, secret) ? "wrong" : "ok";
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    const char *fd_result = syscall(SYS_pidfd_getfd, fd, 0, 0) < 0 ? strerror(errno) : "ok";
    printf("read=%s fd=%s\n", read_result, fd_result);
    fflush(stdout);
    _exit(0);
}

int main(int argc, char **argv)
{
    if (argc == 3)
        victim(atoi(argv[2]));
    int ends[2];
    void *address;
    if (pipe(ends) != 0)
        return 2;
    pid_t other = fork();
    if (other == 0) {
        char number[12];
        become_user();
        if (argc == 2 && prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0) != 0)
            _exit(2);
        snprintf(number, sizeof number, "%d", ends[1]);
        execl("/proc/self/exe", argv[0], "victim", number, NULL);
        _exit(2);
    }
    if (read(ends[0], &address, sizeof address) != sizeof address)
        return 2;
    pid_t pid = fork();
    if (pid == 0)
        reader(other, address);
    waitpid(pid, NULL, 0);
    kill(other, SIGKILL);
    waitpid(other, NULL, 0);
    return 0;
}
