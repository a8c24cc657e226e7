/* Products with a matrix of signs, by tables: the 16 sums +-x0 +-x1 +-x2 +-x3 of four vectors are made once and looked
up by the signs, four bits at a time ("four Russians", Arlazarov et al. 1970): a load and a sum for four products.

sign_products.py says where they come from.  A tile of WIDTH columns and its tables stay in the first cache. */

#include <stdint.h>
#include <string.h>

#define WIDTH 32                                              /* columns of the result worked on at a time */
#define OF_COLUMNS(T) (16384 / (16 * WIDTH * (int)sizeof(T))) /* tables at a time, by measurement */
#define OF_ROWS(T) (24576 / (16 * WIDTH * (int)sizeof(T)))
#define SPAN 512 /* rows of a weight's gradient that one thread works on */
#define LANES(T) (WIDTH * (int)sizeof(T) / 64)
#define UNROLL _Pragma("GCC unroll 8")

#define EXPORT(name) const int64_t constant_##name = name; /* for Python */
#define TABLES 64 /* coefficients are filled up to a multiple: whole tables, in either type */
EXPORT(WIDTH)
EXPORT(TABLES)

typedef float V32 __attribute__((vector_size(64), aligned(4), may_alias));
typedef double V64 __attribute__((vector_size(64), aligned(8), may_alias));

#define KERNELS(T, V, NAME)                                                                                            \
                                                                                                                       \
    static void tables_##NAME(int64_t count, const T *v, int64_t stride, const T *scale, T *tables) {                  \
        for (int64_t c = 0; c < count; c++) {                                                                          \
            T *to = tables + c * 16 * WIDTH, x[4][WIDTH];                                                              \
            for (int t = 0; t < 4; t++)                                                                                \
                for (int i = 0; i < WIDTH; i++) x[t][i] = scale[4 * c + t] * v[(4 * c + t) * stride + i];              \
            for (int i = 0; i < WIDTH; i++) to[i] = (x[0][i] + x[1][i]) + (x[2][i] + x[3][i]);                         \
            for (int t = 0; t < 4; t++)                                                                                \
                for (int s = 0; s < 1 << t; s++)                                                                       \
                    for (int i = 0; i < WIDTH; i++) to[((1 << t) + s) * WIDTH + i] = to[s * WIDTH + i] - 2 * x[t][i];  \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* Rows p [batch, k, n] over the box center +- radius [batch, n]: their middles and spreads [batch, k], the signs  \
    of four rows a byte [batch, k / 4, n] (a bit is 1 where negative), and how many entries of each row are 0. */      \
    void ends_##NAME(int64_t batch, int64_t k, int64_t n, const T *p, const T *center, const T *radius, T *middle,     \
                   T *spread, uint8_t *signs, int32_t *zeros, int64_t threads) {                                       \
        const int64_t quads = (k + 3) / 4;                                                                             \
        _Pragma("omp parallel for num_threads(threads) collapse(2)") for (int64_t b = 0; b < batch; b++)              \
        for (int64_t q = 0; q < quads; q++) {                                                                          \
            const T *c = center + b * n, *r = radius + b * n;                                                          \
            uint8_t *to = signs + (b * quads + q) * n;                                                                 \
            const int64_t rows = k - 4 * q < 4 ? k - 4 * q : 4;                                                        \
            memset(to, 0, n);                                                                                          \
            for (int64_t t = 0; t < rows; t++) {                                                                       \
                const int64_t row = b * k + 4 * q + t;                                                                 \
                const T *of = p + row * n;                                                                             \
                T mid = 0, apart = 0;                                                                                  \
                int32_t none = 0;                                                                                      \
                _Pragma("omp simd reduction(+ : mid, apart, none)") for (int64_t j = 0; j < n; j++) {                 \
                    const T x = of[j];                                                                                 \
                    mid += x * c[j];                                                                                   \
                    apart += (x < 0 ? -x : x) * r[j];                                                                  \
                    none += x == 0;                                                                                    \
                    to[j] |= (x < 0) << t;                                                                             \
                }                                                                                                      \
                middle[row] = mid;                                                                                     \
                spread[row] = apart;                                                                                   \
                zeros[row] = none;                                                                                     \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* out [batch, k, m] = to_middle (center W^T) + to_spread (signs o radius) W^T.  w [n', m'] is W^T, and radius     \
    [batch, n'], filled up with zeros to whole tables; index and sums are room for each thread's example and tile. */  \
    void to_rows_##NAME(int64_t batch, int64_t k, int64_t n, int64_t full, int64_t m, const uint8_t *signs, const T *w,\
                      const T *radius, const T *centered, const T *to_middle, const T *to_spread, uint8_t *index,      \
                      T *sums, T *out, int64_t threads) {                                                              \
        const int64_t quads = (k + 3) / 4, chunks = full / 4, wide = (m + WIDTH - 1) / WIDTH * WIDTH;                  \
        _Pragma("omp parallel for num_threads(threads)") for (int64_t part = 0; part < threads; part++) {             \
            uint8_t *at = index + part * 4 * quads * chunks;                                                           \
            T *sum = sums + part * k * WIDTH, tables[OF_COLUMNS(T) * 16 * WIDTH] __attribute__((aligned(64)));         \
            memset(at, 0, 4 * quads * chunks);                                                                         \
            for (int64_t b = batch * part / threads; b < batch * (part + 1) / threads; b++) {                          \
                /* The bits of four columns of one row, from those of four rows of each column. */                     \
                for (int64_t row = 0; row < 4 * quads; row++) {                                                        \
                    const uint8_t *of = signs + (b * quads + row / 4) * n;                                             \
                    uint8_t *to = at + row * chunks;                                                                   \
                    for (int64_t c = 0; c < n / 4; c++) {                                                              \
                        const uint8_t *x = of + 4 * c;                                                                 \
                        const int t = row % 4;                                                                         \
                        to[c] = (x[0] >> t & 1) | (x[1] >> t & 1) << 1 | (x[2] >> t & 1) << 2 | (x[3] >> t & 1) << 3;  \
                    }                                                                                                  \
                    for (int64_t j = n / 4 * 4; j < n; j++) {                                                          \
                        if (j % 4 == 0) to[j / 4] = 0;                                                                 \
                        to[j / 4] |= (of[j] >> row % 4 & 1) << j % 4;                                                  \
                    }                                                                                                  \
                }                                                                                                      \
                for (int64_t i = 0; i < wide; i += WIDTH) {                                                            \
                    memset(sum, 0, k * WIDTH * sizeof(T));                                                             \
                    for (int64_t c = 0; c < chunks; c += OF_COLUMNS(T)) {                                              \
                        tables_##NAME(OF_COLUMNS(T), w + 4 * c * wide + i, wide, radius + b * full + 4 * c, tables);   \
                        for (int64_t j = 0; j < k; j++) {                                                              \
                            const uint8_t *which = at + j * chunks + c;                                                \
                            V *to = (V *)(sum + j * WIDTH), total[LANES(T)];                                           \
                            UNROLL for (int s = 0; s < LANES(T); s++) total[s] = to[s];                                \
                            UNROLL for (int t = 0; t < OF_COLUMNS(T); t++) {                                           \
                                const V *x = (const V *)(tables + (t * 16 + which[t]) * WIDTH);                        \
                                UNROLL for (int s = 0; s < LANES(T); s++) total[s] += x[s];                            \
                            }                                                                                          \
                            UNROLL for (int s = 0; s < LANES(T); s++) to[s] = total[s];                                \
                        }                                                                                              \
                    }                                                                                                  \
                    const int64_t most = m - i < WIDTH ? m - i : WIDTH;                                                \
                    for (int64_t j = 0; j < k; j++) {                                                                  \
                        const T g = to_middle[b * k + j], h = to_spread[b * k + j];                                    \
                        T *to = out + (b * k + j) * m + i;                                                             \
                        const T *c = centered + b * m + i, *x = sum + j * WIDTH;                                       \
                        for (int64_t s = 0; s < most; s++) to[s] = g * c[s] + h * x[s];                                \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* out [n, m'] = sum over examples of radius o signs^T (to_spread o a), m' a multiple of WIDTH. */                 \
    void to_weight_##NAME(int64_t batch, int64_t k, int64_t n, int64_t m, const uint8_t *signs, const T *a,            \
                        const T *radius, const T *to_spread, T *out, int64_t threads) {                                \
        const int64_t quads = (k + 3) / 4, wide = (m + WIDTH - 1) / WIDTH * WIDTH, spans = (n + SPAN - 1) / SPAN;      \
        _Pragma("omp parallel for num_threads(threads) collapse(2) schedule(dynamic)")                                \
        for (int64_t i = 0; i < wide; i += WIDTH)                                                                      \
        for (int64_t span = 0; span < spans; span++) {                                                                 \
            const int64_t most = m - i < WIDTH ? m - i : WIDTH;                                                        \
            const int64_t begin = span * SPAN, end = begin + SPAN < n ? begin + SPAN : n;                              \
            T tables[OF_ROWS(T) * 16 * WIDTH] __attribute__((aligned(64)));                                            \
            T rows[OF_ROWS(T) * 4 * WIDTH], scale[OF_ROWS(T) * 4];                                                     \
            for (int64_t j = begin; j < end; j++) memset(out + j * wide + i, 0, WIDTH * sizeof(T));                    \
            for (int64_t b = 0; b < batch; b++)                                                                        \
            for (int64_t q = 0; q < quads; q += OF_ROWS(T)) {                                                          \
                const int64_t count = quads - q < OF_ROWS(T) ? quads - q : OF_ROWS(T);                                 \
                for (int64_t j = 0; j < 4 * count; j++) {                                                              \
                    const int64_t row = 4 * q + j;                                                                     \
                    scale[j] = row < k ? to_spread[b * k + row] : 0;                                                   \
                    for (int64_t s = 0; s < WIDTH; s++)                                                                \
                        rows[j * WIDTH + s] = row < k && s < most ? a[(b * k + row) * m + i + s] : 0;                  \
                }                                                                                                      \
                tables_##NAME(count, rows, WIDTH, scale, tables);                                                      \
                const uint8_t *of = signs + (b * quads + q) * n;                                                       \
                for (int64_t j = begin; j < end; j++) {                                                                \
                    const V *x = (const V *)(tables + of[j] * WIDTH);                                                  \
                    V *to = (V *)(out + j * wide + i), total[LANES(T)];                                                \
                    UNROLL for (int s = 0; s < LANES(T); s++) total[s] = x[s];                                         \
                    if (count == OF_ROWS(T)) {                                                                         \
                        UNROLL for (int t = 1; t < OF_ROWS(T); t++) {                                                  \
                            x = (const V *)(tables + (t * 16 + of[t * n + j]) * WIDTH);                                \
                            UNROLL for (int s = 0; s < LANES(T); s++) total[s] += x[s];                                \
                        }                                                                                              \
                    } else {                                                                                           \
                        for (int64_t t = 1; t < count; t++) {                                                          \
                            x = (const V *)(tables + (t * 16 + of[t * n + j]) * WIDTH);                                \
                            UNROLL for (int s = 0; s < LANES(T); s++) total[s] += x[s];                                \
                        }                                                                                              \
                    }                                                                                                  \
                    UNROLL for (int s = 0; s < LANES(T); s++) to[s] += radius[b * n + j] * total[s];                   \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

KERNELS(float, V32, f32)
KERNELS(double, V64, f64)
