/* A ball through a ReLU (interval.py) and its gradient, every entry read once. */

#include <math.h>
#include <stdint.h>

#define FEW 65536 /* entries below which threads cost more than they save */

#define KERNELS(T, NAME)                                                                                               \
                                                                                                                       \
    /* The smallest ball around the images; may work in place. active: 1 where the lower end passes, 2 where the upper \
    does. */                                                                                                           \
    void rectify_##NAME(int64_t n, const T *center, const T *radius, T *c, T *r, int8_t *active, int64_t threads) {    \
        _Pragma("omp parallel for simd num_threads(threads) if (parallel : n > FEW)") for (int64_t j = 0; j < n; j++) {\
            const T low = center[j] - radius[j], high = center[j] + radius[j];                                         \
            /* What overflowed bounds nothing: a lower end that is NaN or inf is -inf, such an upper end inf. */       \
            const T a = low > 0 && low * 0 == 0 ? low : 0;                                                             \
            const T b = high * 0 == 0 ? (high < 0 ? 0 : high) : (T)INFINITY;                                           \
            c[j] = (a + b) * (T)0.5;                                                                                   \
            r[j] = (b - a) * (T)0.5;                                                                                   \
            active[j] = (a > 0 ? 1 : 0) | (high > 0 && high * 0 == 0 ? 2 : 0);                                         \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* Gradients by those of the ball; that of relu at 0 is 0. */                                                      \
    void rectify_back_##NAME(int64_t n, const int8_t *active, const T *to_c, const T *to_r, T *to_center, T *to_radius,\
                        int64_t threads) {                                                                             \
        _Pragma("omp parallel for simd num_threads(threads) if (parallel : n > FEW)") for (int64_t j = 0; j < n; j++) {\
            const T c = to_c[j] * (T)0.5, r = to_r[j] * (T)0.5;                                                        \
            const T low = active[j] & 1 ? c - r : 0, high = active[j] & 2 ? c + r : 0;                                 \
            to_center[j] = high + low;                                                                                 \
            to_radius[j] = high - low;                                                                                 \
        }                                                                                                              \
    }

KERNELS(float, f32)
KERNELS(double, f64)
