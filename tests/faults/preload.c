/* Sees, records and breaks what one process does to one directory.
 *
 * Preloaded into the real broker by tests/crash and tests/power, which compile it with `cc` when they run. Everything is chosen by
 * environment variables; files outside DAGORAMA_FAULT_DIR are passed through untouched.
 *
 *   DAGORAMA_FAULT_DIR    absolute path of the directory that is watched
 *   DAGORAMA_FAULT_TRACE  file that receives a record of every operation, in the order in which they took effect (see `record`)
 *   DAGORAMA_FAULT_KILL   n: SIGKILL this process just before its n-th watched call that changes something
 *   DAGORAMA_FAULT_FAIL   kind:n:errno: the n-th call of that kind (write, sync, open, rename) and all later ones of that kind fail so
 *   DAGORAMA_FAULT_DELAY  n: every sync takes n more milliseconds
 *   DAGORAMA_FAULT_COUNT  file that receives the number of watched calls when the process ends by itself
 *
 * A lock makes "record, then do" one step, so the order of the trace is an order in which the operations really happened.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MAX_FDS = 65536 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char watched[4096];
static size_t watched_length;
static int trace_fd = -1;
static long kill_at, fail_at, delay_ms;
static int fail_errno;
static char fail_kind;
static long calls, fail_calls;
static char *paths[MAX_FDS]; /* path below the directory, by descriptor; NULL when it is not watched */
static atomic_bool ready;

static ssize_t (*real_write)(int, const void *, size_t);
static ssize_t (*real_pwrite)(int, const void *, size_t, off_t);
static ssize_t (*real_writev)(int, const struct iovec *, int);
static ssize_t (*real_pwritev)(int, const struct iovec *, int, off_t);
static int (*real_open)(const char *, int, ...);
static int (*real_openat)(int, const char *, int, ...);
static int (*real_close)(int);
static int (*real_fsync)(int);
static int (*real_fdatasync)(int);
static int (*real_ftruncate)(int, off_t);
static int (*real_fallocate)(int, int, off_t, off_t);
static int (*real_rename)(const char *, const char *);
static int (*real_unlink)(const char *);
static int (*real_unlinkat)(int, const char *, int);
static int (*real_mkdir)(const char *, mode_t);
static int (*real_rmdir)(const char *);

__attribute__((constructor)) static void start(void) {
    real_write = dlsym(RTLD_NEXT, "write");
    real_pwrite = dlsym(RTLD_NEXT, "pwrite64");
    real_writev = dlsym(RTLD_NEXT, "writev");
    real_pwritev = dlsym(RTLD_NEXT, "pwritev64");
    real_open = dlsym(RTLD_NEXT, "open64");
    real_openat = dlsym(RTLD_NEXT, "openat64");
    real_close = dlsym(RTLD_NEXT, "close");
    real_fsync = dlsym(RTLD_NEXT, "fsync");
    real_fdatasync = dlsym(RTLD_NEXT, "fdatasync");
    real_ftruncate = dlsym(RTLD_NEXT, "ftruncate64");
    real_fallocate = dlsym(RTLD_NEXT, "fallocate64");
    real_rename = dlsym(RTLD_NEXT, "rename");
    real_unlink = dlsym(RTLD_NEXT, "unlink");
    real_unlinkat = dlsym(RTLD_NEXT, "unlinkat");
    real_mkdir = dlsym(RTLD_NEXT, "mkdir");
    real_rmdir = dlsym(RTLD_NEXT, "rmdir");
    const char *text = getenv("DAGORAMA_FAULT_DIR");
    if (text == NULL) return;
    watched_length = strlen(text);
    memcpy(watched, text, watched_length + 1);
    if ((text = getenv("DAGORAMA_FAULT_TRACE")) != NULL) {
        trace_fd = real_open(text, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        if (trace_fd < 0) abort();
    }
    if ((text = getenv("DAGORAMA_FAULT_KILL")) != NULL) kill_at = atol(text);
    if ((text = getenv("DAGORAMA_FAULT_DELAY")) != NULL) delay_ms = atol(text);
    if ((text = getenv("DAGORAMA_FAULT_FAIL")) != NULL) {
        fail_kind = text[0];
        const char *colon = strchr(text, ':');
        if (colon == NULL) abort();
        fail_at = atol(colon + 1);
        colon = strchr(colon + 1, ':');
        if (colon == NULL) abort();
        fail_errno = atoi(colon + 1);
    }
    ready = true;
}

__attribute__((destructor)) static void stop(void) {
    const char *text = getenv("DAGORAMA_FAULT_COUNT");
    if (!ready || text == NULL) return;
    int fd = real_open(text, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd >= 0) {
        dprintf(fd, "%ld %ld\n", calls, fail_calls);
        real_close(fd);
    }
}

/* The path below the directory, or NULL. Also the siblings `<dir>.*`, in which a new store is built. */
static const char *below(const char *path) {
    if (!ready || path == NULL || strncmp(path, watched, watched_length) != 0) return NULL;
    const char *rest = path + watched_length;
    return *rest == '/' || *rest == '.' || *rest == 0 ? rest : NULL;
}

static const char *path_of(int fd) { return ready && fd >= 0 && fd < MAX_FDS ? paths[fd] : NULL; }

/* One record of the trace:
 *   u8 kind, u8 0, u16 length of path, u16 length of second path, u16 0, u64 offset, u64 length of data, path, second path, data
 * kinds: W write, T truncate, P punch or allocate, S file sync done, D directory sync done, C create, R rename, U unlink, M mkdir, X rmdir */
static void record(char kind, const char *path, const char *second, uint64_t offset, const void *data, uint64_t length) {
    if (trace_fd < 0) return;
    uint8_t head[24] = {0};
    uint16_t path_length = (uint16_t)strlen(path), second_length = second ? (uint16_t)strlen(second) : 0;
    head[0] = (uint8_t)kind;
    memcpy(head + 2, &path_length, 2);
    memcpy(head + 4, &second_length, 2);
    memcpy(head + 8, &offset, 8);
    memcpy(head + 16, &length, 8);
    struct iovec parts[4] = {{head, 24}, {(void *)path, path_length}, {(void *)(second ? second : ""), second_length}, {(void *)data, data ? length : 0}};
    ssize_t want = (ssize_t)(24 + path_length + second_length + (data ? length : 0));
    if (real_writev(trace_fd, parts, 4) != want) abort();
}

/* Counts a call that changes something; kills or fails it when it is its turn. Called with the lock held. */
static int turn(char kind) {
    calls++;
    if (kill_at != 0 && calls == kill_at) {
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
    if (kind != 0 && kind == fail_kind) {
        fail_calls++;
        if (fail_at != 0 && fail_calls >= fail_at) {
            errno = fail_errno;
            return -1;
        }
    }
    return 0;
}

#define LOCKED(type, failed, kind, ...)      \
    do {                                     \
        type result_;                        \
        pthread_mutex_lock(&lock);           \
        if (turn(kind) != 0) {               \
            result_ = (failed);              \
        } else {                             \
            __VA_ARGS__                      \
        }                                    \
        int saved_ = errno;                  \
        pthread_mutex_unlock(&lock);         \
        errno = saved_;                      \
        return result_;                      \
    } while (0)

ssize_t pwrite64(int fd, const void *data, size_t length, off_t offset) {
    const char *path = path_of(fd);
    if (path == NULL) return real_pwrite(fd, data, length, offset);
    LOCKED(ssize_t, -1, 'w', {
        result_ = real_pwrite(fd, data, length, offset);
        if (result_ > 0) record('W', path, NULL, (uint64_t)offset, data, (uint64_t)result_);
    });
}
ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) { return pwrite64(fd, data, length, offset); }

ssize_t write(int fd, const void *data, size_t length) {
    const char *path = path_of(fd);
    if (path == NULL) return real_write(fd, data, length);
    LOCKED(ssize_t, -1, 'w', {
        /* with O_APPEND the position is only known afterwards */
        result_ = real_write(fd, data, length);
        off_t end = lseek(fd, 0, SEEK_CUR);
        if (result_ > 0) record('W', path, NULL, (uint64_t)(end - result_), data, (uint64_t)result_);
    });
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    const char *path = path_of(fd);
    if (path == NULL) return real_writev(fd, parts, n);
    ssize_t total = 0;
    for (int i = 0; i < n; i++) { /* one after the other: a vector may be torn like any other write */
        ssize_t done = write(fd, parts[i].iov_base, parts[i].iov_len);
        if (done < 0) return total > 0 ? total : -1;
        total += done;
        if ((size_t)done < parts[i].iov_len) break;
    }
    return total;
}

ssize_t pwritev64(int fd, const struct iovec *parts, int n, off_t offset) {
    const char *path = path_of(fd);
    if (path == NULL) return real_pwritev(fd, parts, n, offset);
    ssize_t total = 0;
    for (int i = 0; i < n; i++) {
        ssize_t done = pwrite64(fd, parts[i].iov_base, parts[i].iov_len, offset + total);
        if (done < 0) return total > 0 ? total : -1;
        total += done;
        if ((size_t)done < parts[i].iov_len) break;
    }
    return total;
}
ssize_t pwritev(int fd, const struct iovec *parts, int n, off_t offset) { return pwritev64(fd, parts, n, offset); }

static int sync_file(int fd, int (*real)(int)) {
    const char *path = path_of(fd);
    if (path == NULL) return real(fd);
    if (delay_ms > 0) usleep((useconds_t)delay_ms * 1000);
    LOCKED(int, -1, 's', {
        result_ = real(fd);
        struct stat about;
        if (result_ == 0) record(fstat(fd, &about) == 0 && S_ISDIR(about.st_mode) ? 'D' : 'S', path, NULL, 0, NULL, 0);
    });
}
int fdatasync(int fd) { return sync_file(fd, real_fdatasync); }
int fsync(int fd) { return sync_file(fd, real_fsync); }

int ftruncate64(int fd, off_t length) {
    const char *path = path_of(fd);
    if (path == NULL) return real_ftruncate(fd, length);
    LOCKED(int, -1, 'w', {
        result_ = real_ftruncate(fd, length);
        if (result_ == 0) record('T', path, NULL, (uint64_t)length, NULL, 0);
    });
}
int ftruncate(int fd, off_t length) { return ftruncate64(fd, length); }

int fallocate64(int fd, int mode, off_t offset, off_t length) {
    const char *path = path_of(fd);
    if (path == NULL) return real_fallocate(fd, mode, offset, length);
    LOCKED(int, -1, 'w', {
        result_ = real_fallocate(fd, mode, offset, length);
        uint64_t span = (uint64_t)length;
        if (result_ == 0 && (mode & 2) != 0) record('P', path, NULL, (uint64_t)offset, &span, 8); /* FALLOC_FL_PUNCH_HOLE */
    });
}
int fallocate(int fd, int mode, off_t offset, off_t length) { return fallocate64(fd, mode, offset, length); }

static void adopt(int fd, const char *relative) {
    if (fd < 0 || fd >= MAX_FDS) return;
    free(paths[fd]);
    paths[fd] = relative ? strdup(relative) : NULL;
}

static int open_watched(int at, const char *path, int flags, mode_t mode) {
    const char *relative = below(path);
    if (relative == NULL) return at == AT_FDCWD ? real_open(path, flags, mode) : real_openat(at, path, flags, mode);
    struct stat before;
    int changes = (flags & (O_CREAT | O_TRUNC)) != 0;
    LOCKED(int, -1, 'o', {
        int existed = stat(path, &before) == 0;
        if (!changes) calls--; /* only what changes something counts */
        result_ = real_openat(at, path, flags, mode);
        if (result_ >= 0) {
            adopt(result_, relative);
            if (!existed && (flags & O_CREAT)) record('C', relative, NULL, 0, NULL, 0);
            if (existed && (flags & O_TRUNC)) record('T', relative, NULL, 0, NULL, 0);
        }
    });
}

static mode_t mode_of(int flags, va_list arguments) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0; }

#define OPENS(name, at, prefix)                 \
    int name(prefix const char *path, int flags, ...) { \
        va_list arguments;                      \
        va_start(arguments, flags);             \
        mode_t mode = mode_of(flags, arguments); \
        va_end(arguments);                      \
        return open_watched(at, path, flags, mode); \
    }
#define NOTHING
#define FD_FIRST int at,
OPENS(open, AT_FDCWD, NOTHING)
OPENS(open64, AT_FDCWD, NOTHING)
OPENS(openat, at, FD_FIRST)
OPENS(openat64, at, FD_FIRST)

int close(int fd) {
    if (ready && fd >= 0 && fd < MAX_FDS && paths[fd] != NULL) {
        pthread_mutex_lock(&lock);
        adopt(fd, NULL);
        int result = real_close(fd);
        pthread_mutex_unlock(&lock);
        return result;
    }
    return real_close(fd);
}

int rename(const char *from, const char *to) {
    const char *a = below(from), *b = below(to);
    if (a == NULL || b == NULL) return real_rename(from, to);
    LOCKED(int, -1, 'r', {
        result_ = real_rename(from, to);
        if (result_ == 0) {
            size_t length = strlen(a);
            record('R', a, b, 0, NULL, 0);
            for (int fd = 0; fd < MAX_FDS; fd++) { /* open files keep their descriptors under the new name */
                if (paths[fd] != NULL && strncmp(paths[fd], a, length) == 0 && (paths[fd][length] == 0 || paths[fd][length] == '/')) {
                    char moved[8192];
                    snprintf(moved, sizeof moved, "%s%s", b, paths[fd] + length);
                    adopt(fd, moved);
                }
            }
        }
    });
}

#define ONE_PATH(name, kind, call, ...)             \
    int name(__VA_ARGS__) {                         \
        const char *relative = below(path);         \
        if (relative == NULL) return call;          \
        LOCKED(int, -1, 0, {                        \
            result_ = call;                         \
            if (result_ == 0) record(kind, relative, NULL, 0, NULL, 0); \
        });                                         \
    }
ONE_PATH(unlink, 'U', real_unlink(path), const char *path)
ONE_PATH(mkdir, 'M', real_mkdir(path, mode), const char *path, mode_t mode)
ONE_PATH(rmdir, 'X', real_rmdir(path), const char *path)

int unlinkat(int at, const char *name, int flags) {
    char link[64], path[8192];
    if (!ready) return real_unlinkat(at, name, flags);
    if (at == AT_FDCWD || name[0] == '/') {
        snprintf(path, sizeof path, "%s", name);
    } else { /* std::fs::remove_dir_all walks by descriptors */
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t n = readlink(link, path, sizeof path - 1);
        if (n < 0) return real_unlinkat(at, name, flags);
        snprintf(path + n, sizeof path - (size_t)n, "/%s", name);
    }
    const char *relative = below(path);
    if (relative == NULL) return real_unlinkat(at, name, flags);
    LOCKED(int, -1, 0, {
        result_ = real_unlinkat(at, name, flags);
        if (result_ == 0) record(flags & AT_REMOVEDIR ? 'X' : 'U', relative, NULL, 0, NULL, 0);
    });
}
