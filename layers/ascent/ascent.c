/* Passes over vectors of the dual ascent layer by layer (layers/ascent/layer_ascent.py), one a layer and direction.

R problems stand in rows. Lines (s0, ds, sa, ia), center and radius belong to E examples: problem r reads row ex[r].
Every function is the same computation as its namesake in EagerPasses. */

#include <math.h>
#include <stdint.h>

#define FEW 16384 /* entries below which threads cost more than they save */

#define KERNELS(T, NAME, SQRT, COPYSIGN)                                                                               \
                                                                                                                       \
    /* Coefficients A of a layer's values become those of its pre-activations, nu; value[r] gains the intercepts. */   \
    void backward_##NAME(int64_t R, int64_t n, int64_t E, const int64_t *ex, const T *A, const T *w, const T *s0,      \
                         const T *ds, const T *sa, const T *ia, const T *m, T *nu, const T *before, T *value,          \
                         int64_t threads) {                                                                            \
        _Pragma("omp parallel for num_threads(threads) if (R * n > FEW)") for (int64_t r = 0; r < R; r++) {            \
            const int64_t at = r * n, e = ex[r] * n;                                                                   \
            T sum = 0;                                                                                                 \
            _Pragma("omp simd reduction(+ : sum)") for (int64_t j = 0; j < n; j++) {                                   \
                const T a = A[at + j], up = a > 0 ? a : 0, down = a - up;                                              \
                const T x = up * (s0[e + j] + ds[e + j] * w[at + j]) + down * sa[e + j];                               \
                nu[at + j] = x;                                                                                        \
                sum += down * ia[e + j] + x * m[j];                                                                    \
            }                                                                                                          \
            value[r] = before[r] + sum;                                                                                \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* The corner v of the box with the least a.v, its average, and whether the value is the best so far. */           \
    void corner_##NAME(int64_t R, int64_t d, int64_t E, const int64_t *ex, const T *a, const T *center,                \
                       const T *radius, double rate, T *v, T *mean, T *value, T *best, uint8_t *better,                \
                       int64_t threads) {                                                                              \
        _Pragma("omp parallel for num_threads(threads) if (R * d > FEW)") for (int64_t r = 0; r < R; r++) {            \
            const int64_t at = r * d, e = ex[r] * d;                                                                   \
            const T share = (T)rate;                                                                                   \
            T sum = 0;                                                                                                 \
            _Pragma("omp simd reduction(+ : sum)") for (int64_t j = 0; j < d; j++) {                                   \
                const T x = center[e + j] - COPYSIGN(radius[e + j], a[at + j]);                                        \
                v[at + j] = x;                                                                                         \
                mean[at + j] += share * (x - mean[at + j]);                                                            \
                sum += a[at + j] * x;                                                                                  \
            }                                                                                                          \
            value[r] += sum;                                                                                           \
            better[r] = value[r] > best[r];                                                                            \
            if (better[r]) best[r] = value[r];                                                                         \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* Values y of a layer on the lines its coefficients took; averages; the step of Adam on its weights w. */         \
    void forward_##NAME(int64_t R, int64_t n, int64_t E, const int64_t *ex, const T *p, const T *m, const T *A, T *w,  \
                        const T *s0, const T *ds, const T *sa, const T *ia, T *y, T *taken, T *mean, double rate,      \
                        T *moment, T *square, const uint8_t *better, T *best, double first, double second,             \
                        double correction, double step, double tiny, int64_t threads) {                                \
        _Pragma("omp parallel for num_threads(threads) if (R * n > FEW)") for (int64_t r = 0; r < R; r++) {            \
            const int64_t at = r * n, e = ex[r] * n;                                                                   \
            const T share = (T)rate, b1 = (T)(1 - first), b2 = (T)second, c2 = (T)(1 - second);                        \
            const T fix = (T)correction, size = (T)step, least = (T)tiny;                                              \
            if (better[r])                                                                                             \
                for (int64_t j = 0; j < n; j++) best[at + j] = w[at + j];                                              \
            if (mean)                                                                                                  \
                for (int64_t j = 0; j < n; j++) mean[at + j] += share * (p[at + j] - mean[at + j]);                    \
            _Pragma("omp simd") for (int64_t j = 0; j < n; j++) {                                                      \
                const T z = p[at + j] + m[j], a = A[at + j], up = a > 0 ? a : 0, weight = w[at + j];                   \
                const T low = (s0[e + j] + ds[e + j] * weight) * z, high = ia[e + j] + sa[e + j] * z;                  \
                const T lower = a > 0 ? (T)1 : (T)0;                                                                   \
                y[at + j] = a > 0 ? low : high;                                                                        \
                taken[at + j] += share * (lower - taken[at + j]);                                                      \
                const T g = up * ds[e + j] * z;                                                                        \
                const T mo = moment[at + j] + b1 * (g - moment[at + j]);                                               \
                const T sq = b2 * square[at + j] + c2 * g * g;                                                         \
                moment[at + j] = mo;                                                                                   \
                square[at + j] = sq;                                                                                   \
                const T x = weight + size * mo / (SQRT(sq * fix) + least);                                             \
                w[at + j] = x < 0 ? 0 : (x > 1 ? 1 : x);                                                               \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* Feasible values y of a layer: from the hull's floor up by the share of iterations that took the upper line. */  \
    void primal_##NAME(int64_t R, int64_t n, int64_t E, const int64_t *ex, const T *p, const T *m, const T *s0,        \
                       const T *ds, const T *sa, const T *ia, const T *taken, T *y, int64_t threads) {                 \
        _Pragma("omp parallel for num_threads(threads) if (R * n > FEW)") for (int64_t r = 0; r < R; r++) {            \
            const int64_t at = r * n, e = ex[r] * n;                                                                   \
            _Pragma("omp simd") for (int64_t j = 0; j < n; j++) {                                                      \
                const T z = p[at + j] + m[j], flat = s0[e + j] * z, steep = (s0[e + j] + ds[e + j]) * z;               \
                const T low = flat > steep ? flat : steep, high = ia[e + j] + sa[e + j] * z;                           \
                y[at + j] = low + (1 - taken[at + j]) * (high - low);                                                  \
            }                                                                                                          \
        }                                                                                                              \
    }

KERNELS(float, f32, sqrtf, copysignf)
KERNELS(double, f64, sqrt, copysign)
