/* The relaxation step of back-substitution (relax_step.py) and its gradient: every entry of the rows read once.

Rows a [batch or 1, k, n] (shared: 1), lines [batch, n]; positive coefficients take the lower line, others the upper. */

#include <stdint.h>
#include <string.h>

#define FEW 16384 /* entries below which threads cost more than they save */

#define KERNELS(T, NAME)                                                                                               \
                                                                                                                       \
    void pull_##NAME(int64_t batch, int64_t k, int64_t n, int64_t shared, const T *a, const T *ls, const T *li,        \
                     const T *us, const T *ui, T *pulled, T *constant, int64_t threads) {                              \
        _Pragma("omp parallel for num_threads(threads) if (batch * k * n > FEW)") for (int64_t r = 0; r < batch * k;   \
                                                                                       r++) {                          \
            const int64_t e = r / k * n, at = (shared ? r % k : r) * n;                                                \
            T sum = 0;                                                                                                 \
            _Pragma("omp simd reduction(+ : sum)") for (int64_t j = 0; j < n; j++) {                                   \
                const T up = a[at + j] > 0 ? a[at + j] : 0, down = a[at + j] - up;                                     \
                pulled[r * n + j] = up * ls[e + j] + down * us[e + j];                                                 \
                sum += up * li[e + j] + down * ui[e + j];                                                              \
            }                                                                                                          \
            constant[r] = sum;                                                                                         \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* Gradients in the lines [batch, n], which may be null, and in rows of each example's own, likewise. */           \
    void push_##NAME(int64_t batch, int64_t k, int64_t n, int64_t shared, const T *a, const T *ls, const T *li,        \
                     const T *us, const T *ui, const T *grad, const T *column, T *to_a, T *to_ls, T *to_li, T *to_us,  \
                     T *to_ui, int64_t threads) {                                                                      \
        _Pragma("omp parallel for num_threads(threads) if (batch * k * n > FEW)") for (int64_t b = 0; b < batch;       \
                                                                                       b++) {                          \
            const int64_t e = b * n;                                                                                   \
            if (to_ls) {                                                                                               \
                memset(to_ls + e, 0, n * sizeof(T)), memset(to_li + e, 0, n * sizeof(T));                              \
                memset(to_us + e, 0, n * sizeof(T)), memset(to_ui + e, 0, n * sizeof(T));                              \
            }                                                                                                          \
            for (int64_t i = 0; i < k; i++) {                                                                          \
                const int64_t r = b * k + i, at = (shared ? i : r) * n, out = r * n;                                   \
                const T c = column[r];                                                                                 \
                if (to_a) {                                                                                            \
                    _Pragma("omp simd") for (int64_t j = 0; j < n; j++) {                                              \
                        const T x = a[at + j], slope = x > 0 ? ls[e + j] : us[e + j];                                  \
                        to_a[out + j] = slope * grad[out + j] + (x > 0 ? li[e + j] : ui[e + j]) * c;                   \
                    }                                                                                                  \
                }                                                                                                      \
                if (to_ls) {                                                                                           \
                    _Pragma("omp simd") for (int64_t j = 0; j < n; j++) {                                              \
                        const T up = a[at + j] > 0 ? a[at + j] : 0, down = a[at + j] - up, g = grad[out + j];          \
                        to_ls[e + j] += g * up;                                                                        \
                        to_us[e + j] += g * down;                                                                      \
                        to_li[e + j] += c * up;                                                                        \
                        to_ui[e + j] += c * down;                                                                      \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* Gradient in shared rows [k, n]: summed over the batch. */                                                       \
    void shared_##NAME(int64_t batch, int64_t k, int64_t n, const T *a, const T *ls, const T *li, const T *us,         \
                       const T *ui, const T *grad, const T *column, T *to_a, int64_t threads) {                        \
        _Pragma("omp parallel for num_threads(threads) if (batch * k * n > FEW)") for (int64_t i = 0; i < k; i++) {    \
            memset(to_a + i * n, 0, n * sizeof(T));                                                                    \
            for (int64_t b = 0; b < batch; b++) {                                                                      \
                const int64_t e = b * n, out = (b * k + i) * n;                                                        \
                const T c = column[b * k + i];                                                                         \
                _Pragma("omp simd") for (int64_t j = 0; j < n; j++) {                                                  \
                    const T x = a[i * n + j], slope = x > 0 ? ls[e + j] : us[e + j];                                   \
                    to_a[i * n + j] += slope * grad[out + j] + (x > 0 ? li[e + j] : ui[e + j]) * c;                    \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* Least value of each row over the box [lower, upper]. */                                                         \
    void least_##NAME(int64_t batch, int64_t k, int64_t n, int64_t shared, const T *a, const T *lower, const T *upper, \
                      T *value, int64_t threads) {                                                                     \
        _Pragma("omp parallel for num_threads(threads) if (batch * k * n > FEW)") for (int64_t r = 0; r < batch * k;   \
                                                                                       r++) {                          \
            const int64_t e = r / k * n, at = (shared ? r % k : r) * n;                                                \
            T sum = 0;                                                                                                 \
            _Pragma("omp simd reduction(+ : sum)") for (int64_t j = 0; j < n; j++) {                                   \
                const T up = a[at + j] > 0 ? a[at + j] : 0, down = a[at + j] - up;                                     \
                sum += up * lower[e + j] + down * upper[e + j];                                                        \
            }                                                                                                          \
            value[r] = sum;                                                                                            \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* Its gradient in rows of each example's own and in the ends of the box; a null pointer: not wanted. */           \
    void least_back_##NAME(int64_t batch, int64_t k, int64_t n, int64_t shared, const T *a, const T *lower,            \
                           const T *upper, const T *column, T *to_a, T *to_lower, T *to_upper, int64_t threads) {      \
        _Pragma("omp parallel for num_threads(threads) if (batch * k * n > FEW)") for (int64_t b = 0; b < batch;       \
                                                                                       b++) {                          \
            const int64_t e = b * n;                                                                                   \
            if (to_lower) memset(to_lower + e, 0, n * sizeof(T)), memset(to_upper + e, 0, n * sizeof(T));              \
            for (int64_t i = 0; i < k; i++) {                                                                          \
                const int64_t r = b * k + i, at = (shared ? i : r) * n;                                                \
                const T c = column[r];                                                                                 \
                if (to_a) {                                                                                            \
                    _Pragma("omp simd") for (int64_t j = 0; j < n; j++) {                                              \
                        const T x = a[at + j], middle = (lower[e + j] + upper[e + j]) * (T)0.5;                        \
                        to_a[r * n + j] = c * (x > 0 ? lower[e + j] : (x < 0 ? upper[e + j] : middle));                \
                    }                                                                                                  \
                }                                                                                                      \
                if (to_lower) {                                                                                        \
                    _Pragma("omp simd") for (int64_t j = 0; j < n; j++) {                                              \
                        const T up = a[at + j] > 0 ? a[at + j] : 0;                                                    \
                        to_lower[e + j] += c * up;                                                                     \
                        to_upper[e + j] += c * (a[at + j] - up);                                                       \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

KERNELS(float, f32)
KERNELS(double, f64)
