/* The C interface of the native CPU back end. Plain C, no Python, no torch: loaded with ctypes.

   Two forms. S6 (heads = 0): a step size for every channel, a decay rate for every channel and state. SSD (heads > 0):
   one of each for a head of Ch / heads neighbouring channels. Below, Q is Ch in S6 and the number of heads in SSD.

   Shapes: Bt batch, L tokens, Ch channels, K routes, N states, R rank of dt. Strides are in elements and may be anything for the
   first axes; the last axis of every array is contiguous. "T" is float (dtype 0) or double (dtype 1). */
#ifndef MEDMAMBA_NATIVE_H
#define MEDMAMBA_NATIVE_H

#include <stdint.h>

#if defined(_WIN32)
#define MEDMAMBA_API __declspec(dllexport)
#else
#define MEDMAMBA_API __attribute__((visibility("default")))
#endif

#define MEDMAMBA_ABI_VERSION 3

#ifdef __cplusplus
extern "C" {
#endif

enum medmamba_status {
    MEDMAMBA_OK = 0,
    MEDMAMBA_BAD_STRUCT = 1,      /* struct_size differs: library and loader are from different versions */
    MEDMAMBA_BAD_SIZE = 2,        /* a negative size, no route, no state, or sizes whose product overflows 64 bits */
    MEDMAMBA_BAD_OPTION = 3,      /* dtype, merge or thread count out of range */
    MEDMAMBA_BAD_POINTER = 4,     /* a required array is null, or not aligned to its element */
    MEDMAMBA_BAD_ORDER = 5,       /* the order table holds an index outside 0..L-1 */
    MEDMAMBA_OUT_OF_MEMORY = 6,   /* scratch memory could not be allocated */
    MEDMAMBA_ISA_UNAVAILABLE = 7, /* MEDMAMBA_NATIVE_ISA names something unknown or not supported by this CPU */
    MEDMAMBA_BAD_STEP = 8,        /* a step size dt' is negative, NaN or infinite (forward; y is then of no use) */
};

typedef struct medmamba_scan {
    int64_t struct_size; /* sizeof(medmamba_scan), set by the caller */
    int64_t batch, length, channels, routes, states;
    int64_t heads;    /* 0: S6; else SSD, a divisor of channels */
    int64_t rank;     /* 0: dt holds step sizes; else dt = z W^T with R = rank (S6 only) */
    int32_t dtype;    /* 0 float, 1 double */
    int32_t softplus; /* dt' = softplus(dt + bias) instead of dt + bias */
    int32_t merge;    /* 0: y (Bt, L, Ch), summed over routes; 1: y (Bt, K, L, Ch) */
    int32_t threads;  /* upper bound; small calls use one */

    const void *x;          /* T (Bt, L, Ch) */
    const void *dt;         /* T (Bt, L, K, Q), or z (Bt, L, K, R) */
    const void *A;          /* T (K, Ch, N), in SSD (K, Q), contiguous */
    const void *B;          /* T (Bt, L, K, N) */
    const void *C;          /* T (Bt, L, K, N) */
    const void *D;          /* T (K, Ch), contiguous, or null */
    const void *dt_bias;    /* T (K, Q), contiguous, or null */
    const void *dt_weight;  /* T (K, Ch, R), contiguous, or null without rank */
    const uint8_t *mask;    /* (Bt, L), contiguous, 0 = the token is skipped, or null */
    const int32_t *order;   /* (K, L), contiguous: route k visits token order[k][p] at step p */
    const uint8_t *starts;  /* (K, L), contiguous, nonzero = state reset before step p, or null */
    int64_t x_stride[2];    /* batch, token */
    int64_t dt_stride[3];   /* batch, token, route */
    int64_t B_stride[3];
    int64_t C_stride[3];

    void *y;          /* forward out, T, contiguous, every element is written */
    void *final_state; /* forward out, T (Bt, K, Ch, N), contiguous, or null */
    void *checkpoint; /* forward out (may be null: inference), backward in; medmamba_scan_checkpoint_size elements */

    const void *dy; /* T, shape of y */
    int64_t dy_stride[3]; /* batch, route (0 for merge = sum), token */
    const void *dfinal_state; /* T (Bt, K, Ch, N), contiguous, or null */
    void *dx;       /* T (Bt, L, Ch), contiguous, as all gradients */
    void *ddt;      /* T (Bt, L, K, Q), or with rank dz (Bt, L, K, R) */
    void *dA;       /* T (K, Ch, N), in SSD (K, Q) */
    void *dB;       /* T (Bt, L, K, N) */
    void *dC;       /* T (Bt, L, K, N) */
    void *dD;       /* T (K, Ch) or null */
    void *ddt_bias; /* T (K, Q) or null */
    void *ddt_weight; /* T (K, Ch, R), null without rank */
} medmamba_scan;

MEDMAMBA_API int32_t medmamba_abi_version(void);
/* Run on the threads of the host's OpenMP runtime from now on: its GOMP_parallel, omp_get_thread_num and
   omp_get_num_threads. Null pointers: on threads of our own. Not to be called while another call runs. */
typedef void (*medmamba_parallel_function)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*medmamba_int_function)(void);
MEDMAMBA_API void medmamba_use_openmp(medmamba_parallel_function parallel, medmamba_int_function thread_number,
                                      medmamba_int_function thread_count);
/* Name of the instruction set in use ("avx512", "avx2", "baseline"), or null if MEDMAMBA_NATIVE_ISA cannot be met. */
MEDMAMBA_API const char *medmamba_isa(void);
MEDMAMBA_API const char *medmamba_status_text(int32_t status);
/* Elements of T that the checkpoint array needs, or -1 for invalid sizes. */
MEDMAMBA_API int64_t medmamba_scan_checkpoint_size(const medmamba_scan *scan);
MEDMAMBA_API int32_t medmamba_scan_forward(const medmamba_scan *scan);
MEDMAMBA_API int32_t medmamba_scan_backward(const medmamba_scan *scan);

#ifdef __cplusplus
}
#endif

#endif
