/* An NVIDIA driver for tests, put before the real one as libcuda.so.1: serves the version of CUDA that FAKE_CUDA names
 * (12040 is 12.4) and has no GPU. The CUDA runtime that is linked into the library asks it. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NO_DEVICE = 100 };

int cuDriverGetVersion(int *version) {
    const char *text = getenv("FAKE_CUDA");
    *version = text != NULL ? atoi(text) : 0;
    return SUCCESS;
}
int cuInit(unsigned flags) {
    (void)flags;
    return NO_DEVICE;
}
static int refuse(void) { return NO_DEVICE; }

int cuGetProcAddress_v2(const char *symbol, void **function, int version, unsigned long long flags, int *found);
int cuGetProcAddress(const char *symbol, void **function, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, NULL);
}
int cuGetProcAddress_v2(const char *symbol, void **function, int version, unsigned long long flags, int *found) {
    (void)flags;
    if (found != NULL) {
        *found = 0;
    }
    if (strcmp(symbol, "cuGetProcAddress") == 0) {
        *function = version < 12000 ? (void *)cuGetProcAddress : (void *)cuGetProcAddress_v2;
    } else if (strcmp(symbol, "cuDriverGetVersion") == 0) {
        *function = (void *)cuDriverGetVersion;
    } else {
        *function = strcmp(symbol, "cuInit") == 0 ? (void *)cuInit : (void *)refuse;
    }
    return SUCCESS;
}
