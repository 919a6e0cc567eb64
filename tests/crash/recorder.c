/* Records, in order, all that a process does to the files below a folder: for LD_PRELOAD, Linux only.

   RECORD_ROOT names the folder, RECORD_LOG the file that grows by one record per call, after its effect:
   op, descriptor, two numbers, the lengths of two byte strings, and these (see `powercut.read_log`). One lock
   is held from before each call until it is in the log, so that the order of the log is the order of effects. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define MOST_FDS 65536

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned char ours[MOST_FDS];
static const char *root;
static int log_fd = -1;

struct __attribute__((packed)) head {
    char op;
    int32_t fd;
    int64_t a, b;
    uint32_t first, second;
};

__attribute__((constructor)) static void begin(void) {
    root = getenv("RECORD_ROOT");
    const char *path = getenv("RECORD_LOG");
    if (root && path)
        log_fd = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static void note(char op, int fd, int64_t a, const void *first, size_t n1, const void *second, size_t n2) {
    struct head head = {op, fd, a, 0, (uint32_t)n1, (uint32_t)n2};
    struct iovec parts[3] = {{&head, sizeof head}, {(void *)first, n1}, {(void *)second, n2}};
    if (syscall(SYS_writev, log_fd, parts, 3) != (long)(sizeof head + n1 + n2)) {
        static const char words[] = "the recorder's log cannot be written\n";
        syscall(SYS_write, 2, words, sizeof words - 1);
        _exit(99);
    }
}

/* The absolute path, in `out`; 0 when it is not below the root. */
static int below(int dir, const char *path, char *out) {
    if (log_fd < 0 || !path)
        return 0;
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
    } else {
        char link[64], base[PATH_MAX];
        ssize_t length;
        if (dir == AT_FDCWD)
            snprintf(link, sizeof link, "/proc/self/cwd");
        else
            snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        length = readlink(link, base, sizeof base - 1);
        if (length < 0)
            return 0;
        base[length] = 0;
        snprintf(out, PATH_MAX, "%.*s/%s", (int)(PATH_MAX - strlen(path) - 2), base, path);
    }
    size_t length = strlen(root);
    return strncmp(out, root, length) == 0 && (out[length] == '/' || out[length] == 0);
}

static int is_ours(int fd) { return log_fd >= 0 && fd >= 0 && fd < MOST_FDS && ours[fd]; }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* --- opening and closing --- */

static int opened(int dir, const char *path, int flags, int fd) {
    char full[PATH_MAX];
    if (fd >= 0 && fd < MOST_FDS && below(dir, path, full) && !(flags & O_PATH)) {
        ours[fd] = 1;
        note('O', fd, flags, full, strlen(full), "", 0);
    }
    return fd;
}

static mode_t mode_of(int flags, va_list more) {
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
}

#define OPENS(name)                                                                                         \
    int name(const char *path, int flags, ...) {                                                            \
        va_list more;                                                                                       \
        va_start(more, flags);                                                                              \
        mode_t mode = mode_of(flags, more);                                                                 \
        va_end(more);                                                                                       \
        pthread_mutex_lock(&lock);                                                                          \
        int fd = opened(AT_FDCWD, path, flags, REAL(name)(path, flags, mode));                              \
        int error = errno;                                                                                  \
        pthread_mutex_unlock(&lock);                                                                        \
        errno = error;                                                                                      \
        return fd;                                                                                          \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name)                                                                                      \
    int name(int dir, const char *path, int flags, ...) {                                                   \
        va_list more;                                                                                       \
        va_start(more, flags);                                                                              \
        mode_t mode = mode_of(flags, more);                                                                 \
        va_end(more);                                                                                       \
        pthread_mutex_lock(&lock);                                                                          \
        int fd = opened(dir, path, flags, REAL(name)(dir, path, flags, mode));                              \
        int error = errno;                                                                                  \
        pthread_mutex_unlock(&lock);                                                                        \
        errno = error;                                                                                      \
        return fd;                                                                                          \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

int close(int fd) {
    pthread_mutex_lock(&lock);
    if (is_ours(fd)) {
        ours[fd] = 0;
        note('C', fd, 0, "", 0, "", 0);
    }
    int result = REAL(close)(fd);
    int error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

/* --- content --- */

ssize_t write(int fd, const void *data, size_t count) {
    if (!is_ours(fd))
        return REAL(write)(fd, data, count);
    pthread_mutex_lock(&lock);
    ssize_t done = REAL(write)(fd, data, count);
    int error = errno;
    if (done > 0)
        note('W', fd, lseek(fd, 0, SEEK_CUR) - done, data, done, "", 0);
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}

#define WRITES_AT(name, offset_type)                                                                        \
    ssize_t name(int fd, const void *data, size_t count, offset_type at) {                                  \
        if (!is_ours(fd))                                                                                   \
            return REAL(name)(fd, data, count, at);                                                         \
        pthread_mutex_lock(&lock);                                                                          \
        ssize_t done = REAL(name)(fd, data, count, at);                                                     \
        int error = errno;                                                                                  \
        if (done > 0)                                                                                       \
            note('W', fd, at, data, done, "", 0);                                                           \
        pthread_mutex_unlock(&lock);                                                                        \
        errno = error;                                                                                      \
        return done;                                                                                        \
    }
WRITES_AT(pwrite, off_t)
WRITES_AT(pwrite64, off64_t)

#define CUTS(name, offset_type)                                                                             \
    int name(int fd, offset_type length) {                                                                  \
        pthread_mutex_lock(&lock);                                                                          \
        int result = REAL(name)(fd, length);                                                                \
        int error = errno;                                                                                  \
        if (result == 0 && is_ours(fd))                                                                     \
            note('T', fd, length, "", 0, "", 0);                                                            \
        pthread_mutex_unlock(&lock);                                                                        \
        errno = error;                                                                                      \
        return result;                                                                                      \
    }
CUTS(ftruncate, off_t)
CUTS(ftruncate64, off64_t)

#define SYNCS(name)                                                                                         \
    int name(int fd) {                                                                                      \
        pthread_mutex_lock(&lock);                                                                          \
        int result = REAL(name)(fd);                                                                        \
        int error = errno;                                                                                  \
        if (result == 0 && is_ours(fd))                                                                     \
            note('S', fd, 0, "", 0, "", 0);                                                                 \
        pthread_mutex_unlock(&lock);                                                                        \
        errno = error;                                                                                      \
        return result;                                                                                      \
    }
SYNCS(fsync)
SYNCS(fdatasync)

/* --- names --- */

#define NAMES(name, parameters, arguments, op, dir, path)                                                   \
    int name parameters {                                                                                   \
        char full[PATH_MAX];                                                                                \
        pthread_mutex_lock(&lock);                                                                          \
        int result = REAL(name) arguments;                                                                  \
        int error = errno;                                                                                  \
        if (result == 0 && below(dir, path, full))                                                          \
            note(op, -1, 0, full, strlen(full), "", 0);                                                     \
        pthread_mutex_unlock(&lock);                                                                        \
        errno = error;                                                                                      \
        return result;                                                                                      \
    }
NAMES(unlink, (const char *path), (path), 'U', AT_FDCWD, path)
NAMES(unlinkat, (int dir, const char *path, int flags), (dir, path, flags), 'U', dir, path)
NAMES(rmdir, (const char *path), (path), 'U', AT_FDCWD, path)
NAMES(mkdir, (const char *path, mode_t mode), (path, mode), 'M', AT_FDCWD, path)
NAMES(mkdirat, (int dir, const char *path, mode_t mode), (dir, path, mode), 'M', dir, path)

#define RENAMES(name, parameters, arguments, from_dir, from, to_dir, to)                                    \
    int name parameters {                                                                                   \
        char one[PATH_MAX], other[PATH_MAX];                                                                \
        pthread_mutex_lock(&lock);                                                                          \
        int result = REAL(name) arguments;                                                                  \
        int error = errno;                                                                                  \
        if (result == 0 && below(from_dir, from, one) && below(to_dir, to, other))                          \
            note('R', -1, 0, one, strlen(one), other, strlen(other));                                       \
        pthread_mutex_unlock(&lock);                                                                        \
        errno = error;                                                                                      \
        return result;                                                                                      \
    }
RENAMES(rename, (const char *from, const char *to), (from, to), AT_FDCWD, from, AT_FDCWD, to)
RENAMES(renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), a, from, b, to)
