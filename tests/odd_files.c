/* A file system like NFS or Lustre on a bad day, in front of a folder: preload it with LD_PRELOAD.

ODD_FOLDER  the folder; other paths are left alone
ODD_NODE    the node that this process is said to be on
ODD_DELAY   microseconds that each metadata operation takes longer
ODD_LATE    milliseconds for which a process of another node does not see a new file, from its first look at it, as
            if an earlier look's answer were kept: ENOENT, and no entry in listings
ODD_FAULTS  one in so many opens, stats and reads fails, with ESTALE or EIO; the same path and call then passes for a while
ODD_LOG     a file that gets a line for every fault and every name that was not seen yet

A new name carries "NODE:TIME" in an extended attribute. A name that replaces another one is seen at once, as its
directory is known to have it. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define ATTRIBUTE "user.odd"
#define FILES 65536
#define REMEMBERED 64
#define LOOKED 4096
#define NEW 60000
#define HASH 1469598103934665603ULL

static unsigned char watched[FILES];
static uint64_t failed[REMEMBERED];
static unsigned failures;
static struct { uint64_t key; long long time; } looked[LOOKED];

static long number(const char *name) {
    const char *value = getenv(name);
    return value ? atol(value) : 0;
}

static long long now(void) {
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    return time.tv_sec * 1000LL + time.tv_nsec / 1000000;
}

static void tell(const char *what, const char *path) {
    const char *log = getenv("ODD_LOG");
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s %s\n", what, path), saved = errno;
    int file = log ? syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT, 0600) : -1;
    if (file >= 0) {
        if (syscall(SYS_write, file, line, length) < 0) abort();
        syscall(SYS_close, file);
    }
    errno = saved;
}

static uint64_t hashed(uint64_t key, const char *text) {
    for (; *text; text++) key = (key ^ *text) * 1099511628211ULL;
    return key;
}

/* The absolute path, where it lies in the folder; else NULL. */
static const char *inside(int directory, const char *path, char *whole) {
    const char *folder = getenv("ODD_FOLDER");
    if (!folder || !path || !*path) return NULL;
    if (*path == '/') {
        snprintf(whole, PATH_MAX, "%s", path);
    } else {
        char link[64], base[PATH_MAX];
        ssize_t length;
        if (directory == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        length = syscall(SYS_readlink, link, base, sizeof base - 1);
        if (length < 0) return NULL;
        base[length] = 0;
        if (snprintf(whole, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return NULL;
    }
    size_t length = strlen(folder);
    return strncmp(whole, folder, length) == 0 && (whole[length] == '/' || !whole[length]) ? whole : NULL;
}

/* A name that a process opens to write is known to it from then on. */
static int is_late(const char *path, int opens_it) {
    char value[128];
    ssize_t length = getxattr(path, ATTRIBUTE, value, sizeof value - 1);
    if (length <= 0) return 0;
    value[length] = 0;
    char *time = strrchr(value, ':');
    if (!time) return 0;
    *time++ = 0;
    const char *node = getenv("ODD_NODE");
    if (!strcmp(value, node ? node : "") || now() - atoll(time) > NEW) return 0;
    uint64_t key = hashed(hashed(HASH, path), time);
    int place = key % LOOKED;
    if (looked[place].key != key) looked[place].key = key, looked[place].time = now();
    if (opens_it) looked[place].time = 0;
    return now() - looked[place].time < number("ODD_LATE");
}

static void mark(const char *path, int is_new) {
    char value[128];
    struct stat64 status;
    const char *node = getenv("ODD_NODE");
    int saved = errno;
    if (syscall(SYS_newfstatat, AT_FDCWD, path, &status, 0) == 0 && S_ISDIR(status.st_mode)) is_new = 0;
    snprintf(value, sizeof value, "%s:%lld", node ? node : "", is_new ? now() : 0);
    setxattr(path, ATTRIBUTE, value, strlen(value), 0);
    errno = saved;
}

static int exists(const char *path) {
    int saved = errno, found = syscall(SYS_faccessat, AT_FDCWD, path, F_OK) == 0;
    errno = saved;
    return found;
}

static int fails(const char *call, const char *path, int error) {
    static uint64_t state;
    long one_in = number("ODD_FAULTS");
    if (!one_in) return 0;
    state = (state ? state : 88172645463325252ULL) ^ ((uint64_t)getpid() << 20);
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    if (state % one_in) return 0;
    uint64_t key = hashed(hashed(HASH, call), path);
    for (int place = 0; place < REMEMBERED; place++) if (failed[place] == key) return 0;
    failed[failures++ % REMEMBERED] = key;
    char what[64];
    snprintf(what, sizeof what, "%s-%s", call, error == ESTALE ? "ESTALE" : "EIO");
    tell(what, path);
    errno = error;
    return 1;
}

/* Whether a look at a name fails; with the delay of every metadata operation. */
static int unseen(const char *call, int directory, const char *name, int makes_it) {
    char whole[PATH_MAX];
    const char *path = inside(directory, name, whole);
    if (!path) return 0;
    usleep(number("ODD_DELAY"));
    if (is_late(path, makes_it)) {
        tell("late", path);
        errno = ENOENT;
        return 1;
    }
    return fails(call, path, ESTALE);
}

static int opened(int file, int directory, const char *name, int flags, int was_there) {
    char whole[PATH_MAX];
    const char *path = inside(directory, name, whole);
    if (file >= 0 && file < FILES) {
        struct stat64 status;
        watched[file] = path && syscall(SYS_fstat, file, &status) == 0 && S_ISREG(status.st_mode);
        if (path && (flags & O_CREAT) && !was_there) mark(path, 1);
    }
    return file;
}

static int was_there(int directory, const char *name, int flags) {
    char whole[PATH_MAX];
    const char *path = flags & O_CREAT ? inside(directory, name, whole) : NULL;
    return !path || exists(path);
}

#define OPEN(function, declared, directory, called)                                     \
    int function declared {                                                             \
        mode_t mode = 0;                                                                \
        if (flags & (O_CREAT | O_TMPFILE)) {                                            \
            va_list rest;                                                               \
            va_start(rest, flags);                                                      \
            mode = va_arg(rest, mode_t);                                                \
            va_end(rest);                                                               \
        }                                                                               \
        REAL(function);                                                                 \
        if (unseen("open", directory, name, flags & O_CREAT)) return -1;                \
        int there = was_there(directory, name, flags);                                  \
        return opened(real called, directory, name, flags, there);                      \
    }

OPEN(open, (const char *name, int flags, ...), AT_FDCWD, (name, flags, mode))
OPEN(open64, (const char *name, int flags, ...), AT_FDCWD, (name, flags, mode))
OPEN(openat, (int at, const char *name, int flags, ...), at, (at, name, flags, mode))
OPEN(openat64, (int at, const char *name, int flags, ...), at, (at, name, flags, mode))

#define FOPEN(function)                                                                        \
    FILE *function(const char *restrict name, const char *restrict mode) {                     \
        REAL(function);                                                                        \
        int makes = *mode != 'r', there = was_there(AT_FDCWD, name, makes ? O_CREAT : 0);      \
        if (unseen("open", AT_FDCWD, name, makes)) return NULL;                                \
        FILE *file = real(name, mode);                                                         \
        if (file) opened(fileno(file), AT_FDCWD, name, makes ? O_CREAT : 0, there);            \
        return file;                                                                           \
    }

FOPEN(fopen)
FOPEN(fopen64)

#define LOOK(function, declared, directory, called)                          \
    int function declared {                                                  \
        REAL(function);                                                      \
        return unseen("stat", directory, name, 0) ? -1 : real called;        \
    }

LOOK(stat, (const char *restrict name, struct stat *restrict found), AT_FDCWD, (name, found))
LOOK(lstat, (const char *restrict name, struct stat *restrict found), AT_FDCWD, (name, found))
LOOK(stat64, (const char *restrict name, struct stat64 *restrict found), AT_FDCWD, (name, found))
LOOK(lstat64, (const char *restrict name, struct stat64 *restrict found), AT_FDCWD, (name, found))
LOOK(fstatat, (int at, const char *restrict name, struct stat *restrict found, int flags), at, (at, name, found, flags))
LOOK(fstatat64, (int at, const char *restrict name, struct stat64 *restrict found, int flags), at,
     (at, name, found, flags))
LOOK(statx, (int at, const char *restrict name, int flags, unsigned mask, struct statx *restrict found), at,
     (at, name, flags, mask, found))
LOOK(access, (const char *name, int mode), AT_FDCWD, (name, mode))
LOOK(faccessat, (int at, const char *name, int mode, int flags), at, (at, name, mode, flags))

static int named(int done, int directory, const char *name, int was_there) {
    char whole[PATH_MAX];
    const char *path = done == 0 ? inside(directory, name, whole) : NULL;
    if (path) mark(path, !was_there);
    return done;
}

#define NAME(function, declared, directory, called)                     \
    int function declared {                                             \
        REAL(function);                                                 \
        int there = was_there(directory, to, O_CREAT);                  \
        usleep(number("ODD_DELAY"));                                    \
        return named(real called, directory, to, there);                \
    }

NAME(rename, (const char *from, const char *to), AT_FDCWD, (from, to))
NAME(renameat, (int at, const char *from, int other, const char *to), other, (at, from, other, to))
NAME(mkdir, (const char *to, mode_t mode), AT_FDCWD, (to, mode))
NAME(link, (const char *from, const char *to), AT_FDCWD, (from, to))

#define LIST(function, entry)                                                       \
    struct entry *function(DIR *listing) {                                          \
        REAL(function);                                                             \
        struct entry *found;                                                        \
        char whole[PATH_MAX];                                                       \
        while ((found = real(listing))) {                                           \
            const char *path = inside(dirfd(listing), found->d_name, whole);        \
            if (!path || *found->d_name == '.' || !is_late(path, 0)) break;            \
            tell("unlisted", path);                                                 \
        }                                                                           \
        return found;                                                               \
    }

LIST(readdir, dirent)
LIST(readdir64, dirent64)

static int spoiled(const char *call, int file) {
    char link[64], path[PATH_MAX];
    if (file < 0 || file >= FILES || !watched[file]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = syscall(SYS_readlink, link, path, sizeof path - 1);
    path[length > 0 ? length : 0] = 0;
    return fails(call, path, EIO);
}

ssize_t read(int file, void *buffer, size_t size) {
    REAL(read);
    return spoiled("read", file) ? -1 : real(file, buffer, size);
}

ssize_t pread(int file, void *buffer, size_t size, off_t offset) {
    REAL(pread);
    return spoiled("read", file) ? -1 : real(file, buffer, size, offset);
}

ssize_t pread64(int file, void *buffer, size_t size, off64_t offset) {
    REAL(pread64);
    return spoiled("read", file) ? -1 : real(file, buffer, size, offset);
}

ssize_t preadv(int file, const struct iovec *buffers, int count, off_t offset) {
    REAL(preadv);
    return spoiled("read", file) ? -1 : real(file, buffers, count, offset);
}

ssize_t preadv64(int file, const struct iovec *buffers, int count, off64_t offset) {
    REAL(preadv64);
    return spoiled("read", file) ? -1 : real(file, buffers, count, offset);
}

int close(int file) {
    REAL(close);
    if (file >= 0 && file < FILES) watched[file] = 0;
    return real(file);
}
