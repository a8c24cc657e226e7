/* Rows through parallel lines (band_step.py), both ends from one read, and the gradient.

Rows a [batch or 1, k, n] (shared: 1), slopes and ends [batch, n]. Without slopes (a null pointer): the range over a
box. Low takes the lower end where a coefficient is positive and the upper one where it is negative, high the other. */

#include <stdint.h>
#include <string.h>

#define FEW 16384 /* entries below which threads cost more than they save */

#define KERNELS(T, NAME)                                                                                               \
                                                                                                                       \
    void band_##NAME(int64_t batch, int64_t k, int64_t n, int64_t shared, const T *a, const T *slope, const T *lower,  \
                     const T *upper, T *pulled, T *low, T *high, int64_t threads) {                                    \
        _Pragma("omp parallel for num_threads(threads) if (batch * k * n > FEW)") for (int64_t r = 0; r < batch * k;   \
                                                                                       r++) {                          \
            const int64_t e = r / k * n, at = (shared ? r % k : r) * n;                                                \
            T below = 0, above = 0;                                                                                    \
            if (slope) {                                                                                               \
                _Pragma("omp simd") for (int64_t j = 0; j < n; j++) pulled[r * n + j] = a[at + j] * slope[e + j];      \
            }                                                                                                          \
            _Pragma("omp simd reduction(+ : below, above)") for (int64_t j = 0; j < n; j++) {                          \
                const T up = a[at + j] > 0 ? a[at + j] : 0, down = a[at + j] - up;                                     \
                below += up * lower[e + j] + down * upper[e + j];                                                      \
                above += up * upper[e + j] + down * lower[e + j];                                                      \
            }                                                                                                          \
            low[r] = below, high[r] = above;                                                                           \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* Gradients in rows of each example's own, in slopes and in ends; a null pointer: not wanted. */                  \
    void band_back_##NAME(int64_t batch, int64_t k, int64_t n, int64_t shared, const T *a, const T *slope,             \
                          const T *lower, const T *upper, const T *grad, const T *to_low, const T *to_high, T *to_a,   \
                          T *to_slope, T *to_lower, T *to_upper, int64_t threads) {                                    \
        _Pragma("omp parallel for num_threads(threads) if (batch * k * n > FEW)") for (int64_t b = 0; b < batch;       \
                                                                                       b++) {                          \
            const int64_t e = b * n;                                                                                   \
            if (to_slope) memset(to_slope + e, 0, n * sizeof(T));                                                      \
            if (to_lower) memset(to_lower + e, 0, n * sizeof(T)), memset(to_upper + e, 0, n * sizeof(T));              \
            for (int64_t i = 0; i < k; i++) {                                                                          \
                const int64_t r = b * k + i, at = (shared ? i : r) * n, out = r * n;                                   \
                const T p = to_low[r], q = to_high[r], half = (p + q) * (T)0.5;                                        \
                if (to_a) {                                                                                            \
                    _Pragma("omp simd") for (int64_t j = 0; j < n; j++) {                                              \
                        const T x = a[at + j], l = x > 0 ? p : (x < 0 ? q : half), u = p + q - l;                      \
                        to_a[out + j] = l * lower[e + j] + u * upper[e + j];                                           \
                    }                                                                                                  \
                }                                                                                                      \
                if (to_a && slope) {                                                                                   \
                    _Pragma("omp simd") for (int64_t j = 0; j < n; j++) to_a[out + j] += slope[e + j] * grad[out + j]; \
                }                                                                                                      \
                if (to_slope) {                                                                                        \
                    _Pragma("omp simd") for (int64_t j = 0; j < n; j++) to_slope[e + j] += a[at + j] * grad[out + j];  \
                }                                                                                                      \
                if (to_lower) {                                                                                        \
                    _Pragma("omp simd") for (int64_t j = 0; j < n; j++) {                                              \
                        const T up = a[at + j] > 0 ? a[at + j] : 0, down = a[at + j] - up;                             \
                        to_lower[e + j] += p * up + q * down;                                                          \
                        to_upper[e + j] += p * down + q * up;                                                          \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* Gradient in shared rows [k, n]: summed over the batch. */                                                       \
    void band_shared_##NAME(int64_t batch, int64_t k, int64_t n, const T *a, const T *slope, const T *lower,           \
                            const T *upper, const T *grad, const T *to_low, const T *to_high, T *to_a,                 \
                            int64_t threads) {                                                                         \
        _Pragma("omp parallel for num_threads(threads) if (batch * k * n > FEW)") for (int64_t i = 0; i < k; i++) {    \
            memset(to_a + i * n, 0, n * sizeof(T));                                                                    \
            for (int64_t b = 0; b < batch; b++) {                                                                      \
                const int64_t e = b * n, out = (b * k + i) * n;                                                        \
                const T p = to_low[b * k + i], q = to_high[b * k + i], half = (p + q) * (T)0.5;                        \
                _Pragma("omp simd") for (int64_t j = 0; j < n; j++) {                                                  \
                    const T x = a[i * n + j], l = x > 0 ? p : (x < 0 ? q : half), u = p + q - l;                       \
                    to_a[i * n + j] += l * lower[e + j] + u * upper[e + j];                                            \
                }                                                                                                      \
                if (slope) {                                                                                           \
                    _Pragma("omp simd") for (int64_t j = 0; j < n; j++) to_a[i * n + j] += slope[e + j] * grad[out + j]; \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

KERNELS(float, f32)
KERNELS(double, f64)
