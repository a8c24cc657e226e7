/* A ball through a ReLU (interval.py) and its gradient, every entry read once. */

#include <stdint.h>

#define FEW 16384 /* entries below which threads cost more than they save */

#define KERNELS(T, NAME)                                                                                               \
                                                                                                                       \
    /* Ends of the pre-activation, and the smallest ball around their images. */                                       \
    void rectify_##NAME(int64_t n, const T *center, const T *radius, T *l, T *u, T *c, T *r, int64_t threads) {        \
        _Pragma("omp parallel for simd num_threads(threads) if (parallel : n > FEW)") for (int64_t j = 0; j < n;       \
                                                                                           j++) {                      \
            const T low = center[j] - radius[j], high = center[j] + radius[j];                                         \
            const T a = low < 0 ? 0 : low, b = high < 0 ? 0 : high;                                                    \
            l[j] = low;                                                                                                \
            u[j] = high;                                                                                               \
            c[j] = (a + b) * (T)0.5;                                                                                   \
            r[j] = (b - a) * (T)0.5;                                                                                   \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* Gradients by those of the ends, which may be null, and of the ball; that of relu at 0 is 0. */                  \
    void rectify_back_##NAME(int64_t n, const T *l, const T *u, const T *to_l, const T *to_u, const T *to_c,           \
                             const T *to_r, T *to_center, T *to_radius, int64_t threads) {                             \
        _Pragma("omp parallel for simd num_threads(threads) if (parallel : n > FEW)") for (int64_t j = 0; j < n;       \
                                                                                           j++) {                      \
            const T c = to_c ? to_c[j] * (T)0.5 : 0, r = to_r ? to_r[j] * (T)0.5 : 0;                                  \
            const T low = (l[j] <= 0 ? 0 : c - r) + (to_l ? to_l[j] : 0);                                               \
            const T high = (u[j] <= 0 ? 0 : c + r) + (to_u ? to_u[j] : 0);                                              \
            to_center[j] = high + low;                                                                                 \
            to_radius[j] = high - low;                                                                                 \
        }                                                                                                              \
    }

KERNELS(float, f32)
KERNELS(double, f64)
