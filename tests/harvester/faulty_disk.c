/* Preloaded into a process: the FAULT_NTH call of FAULT_CALL on a path that holds FAULT_UNDER fails with
 * FAULT_ERRNO, and so do all later ones while FAULT_STAYS is set. Calls: open, write, fsync, rename, unlink,
 * truncate, mkdir, or any of them. With FAULT_ERRNO=kill the process is killed before the call.
 * With FAULT_AFTER every later write and fsync on such a path is told in that file, a line each. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long seen;

static atomic_int failed;

static void tell(const char *call, const char *path) {
  const char *after = getenv("FAULT_AFTER"), *under = getenv("FAULT_UNDER");
  if (!after || !failed || !under || !path || !strstr(path, under)) return;
  FILE *out = fopen(after, "a");
  if (!out) return;
  fprintf(out, "%s %s\n", call, path);
  fclose(out);
}

static int hit(const char *call, const char *path) {
  const char *under = getenv("FAULT_UNDER"), *wanted = getenv("FAULT_CALL");
  if (!under || !wanted || (strcmp(wanted, "any") && strcmp(call, wanted)) || !path || !strstr(path, under)) return 0;
  long nth = atol(getenv("FAULT_NTH")), now = atomic_fetch_add(&seen, 1) + 1;
  if (!(now == nth || (getenv("FAULT_STAYS") && now > nth))) return 0;
  failed = 1;
  if (!strcmp(getenv("FAULT_ERRNO"), "kill")) raise(SIGKILL);
  errno = atoi(getenv("FAULT_ERRNO"));
  return 1;
}

static int hit_fd(const char *call, int fd) {
  char link[64], path[4096];
  const char *wanted = getenv("FAULT_CALL");
  if (!wanted || (strcmp(wanted, "any") && strcmp(call, wanted) && !failed)) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  tell(call, path);
  return hit(call, path);
}

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))
#define OPEN(name)                                                   \
  int name(const char *path, int flags, ...) {                       \
    va_list list; va_start(list, flags);                             \
    mode_t mode = va_arg(list, mode_t); va_end(list);                \
    return hit("open", path) ? -1 : REAL(name)(path, flags, mode);   \
  }
OPEN(open)
OPEN(open64)
#define WRITE(name, ...) return hit_fd("write", fd) ? -1 : REAL(name)(__VA_ARGS__)
ssize_t write(int fd, const void *b, size_t n) { WRITE(write, fd, b, n); }
ssize_t writev(int fd, const struct iovec *v, int n) { WRITE(writev, fd, v, n); }
ssize_t pwrite(int fd, const void *b, size_t n, off_t at) { WRITE(pwrite, fd, b, n, at); }
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t at) { WRITE(pwrite64, fd, b, n, at); }
int fsync(int fd) { return hit_fd("fsync", fd) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return hit_fd("fsync", fd) ? -1 : REAL(fdatasync)(fd); }
int rename(const char *a, const char *b) { return hit("rename", a) ? -1 : REAL(rename)(a, b); }
int unlink(const char *path) { return hit("unlink", path) ? -1 : REAL(unlink)(path); }
int mkdir(const char *path, mode_t mode) { return hit("mkdir", path) ? -1 : REAL(mkdir)(path, mode); }
int ftruncate(int fd, off_t size) { return hit_fd("truncate", fd) ? -1 : REAL(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { return hit_fd("truncate", fd) ? -1 : REAL(ftruncate64)(fd, size); }
