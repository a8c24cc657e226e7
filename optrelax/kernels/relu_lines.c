/* The lines of a ReLU (relu_lines.py) and their gradient, every entry read once. */

#include <stdint.h>

enum { FLAT, STEEP, NEARER, CHORD }; /* lines below; of NEARER a tie takes the steep one */
#define EXPORT(name) const int64_t constant_##name = name; /* for Python */
EXPORT(FLAT)
EXPORT(STEEP)
EXPORT(NEARER)
EXPORT(CHORD)

#define FEW 16384 /* entries below which threads cost more than they save */

#define KERNELS(T, NAME)                                                                                               \
                                                                                                                       \
    /* below: 0 the flat line, 1 the steep one, 2 the nearer (a tie takes the steep one), 3 parallel to the chord. */  \
    void lines_##NAME(int64_t n, int64_t below, const T *l, const T *u, T *lower, T *upper, T *intercept, int64_t threads) {\
        _Pragma("omp parallel for simd num_threads(threads) if (parallel : n > FEW)") for (int64_t j = 0; j < n; j++) {\
            const int crosses = l[j] < 0 && u[j] > 0;                                                                  \
            const T run = crosses ? u[j] - l[j] : 1;                                                                   \
            /* An end that is NaN makes a line that is. */                                                             \
            const T exact = l[j] >= 0 ? 1 : (u[j] <= 0 ? 0 : l[j] + u[j]);                                             \
            /* A width that overflows is taken at half its size. */                                                    \
            const T slope = run * 0 == 0 ? u[j] / run : u[j] * (T)0.5 / (u[j] * (T)0.5 - l[j] * (T)0.5);               \
            const T flat = below == FLAT ? 0 : (below == STEEP ? 1 : (l[j] + u[j] >= 0 ? 1 : 0));                             \
            const T above = crosses ? slope : exact;                                                                   \
            upper[j] = above;                                                                                          \
            intercept[j] = crosses ? -slope * l[j] : 0;                                                                \
            lower[j] = below == CHORD ? above : (crosses ? flat : exact);                                                  \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* Gradients by those of the upper slope and intercept; none of the slope where 1 / (u - l) may overflow. */       \
    void lines_back_##NAME(int64_t n, double least, const T *l, const T *u, const T *to_slope, const T *to_intercept, T *to_l,\
                      T *to_u, int64_t threads) {                                                                      \
        _Pragma("omp parallel for simd num_threads(threads) if (parallel : n > FEW)") for (int64_t j = 0; j < n; j++) {\
            const int crosses = l[j] < 0 && u[j] > 0;                                                                  \
            const T run = crosses ? u[j] - l[j] : 1;                                                                   \
            const T slope = run * 0 == 0 ? u[j] / run : u[j] * (T)0.5 / (u[j] * (T)0.5 - l[j] * (T)0.5);               \
            const T a = to_slope ? to_slope[j] : 0, b = to_intercept ? to_intercept[j] : 0;                            \
            const T through = run > (T)least ? (a - b * l[j]) / run : 0;                                               \
            to_l[j] = crosses ? through * slope - b * slope : 0;                                                       \
            to_u[j] = crosses ? through * (-l[j] / run) : 0;                                                           \
        }                                                                                                              \
    }

KERNELS(float, f32)
KERNELS(double, f64)
