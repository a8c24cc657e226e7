/* Products of a ball with a matrix: c B with r |B|, and both parts of the matrix's gradient (ball_products.py). What two
products share is read once, and neither |B| nor the parts are written.

A panel of the second factor, COLUMNS vectors wide, is laid out in the order in which it is read; ROWS x COLUMNS vectors
of each product stay in registers.  The file includes itself: its second half is there once for each floating type. */

#ifndef T

#include <stdint.h>
#include <string.h>

/* A product and its sum in one instruction: with -std=c11 a compiler leaves them apart unless told. */
#pragma GCC optimize("fp-contract=fast")

#ifdef __AVX512F__
#define BYTES 64 /* of a vector */
#define ROWS 6
#else
#define BYTES 32
#define ROWS 3
#endif
#define COLUMNS 2
#define DEPTH 512 /* terms of a sum between two visits to memory */
#define SHORT 128 /* examples of a gradient of a matrix, likewise */
#define FEW 65536 /* multiply-adds below which threads cost more than they save */
#define LANES ((int64_t)(BYTES / sizeof(T)))
#define WIDTH (COLUMNS * LANES)
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define ZERO(x) UNROLL for (int t = 0; t < ROWS; t++) UNROLL for (int s = 0; s < COLUMNS; s++) x[t][s] = (V){0};
#define LESS(a, b) ((a) < (b) ? (a) : (b))

#define EXPORT(name) const int64_t constant_##name = name; /* for Python */
EXPORT(SHORT)
EXPORT(ROWS)

#define T float
#define I I32
#define V V32
#define GREATEST INT32_MAX
#define NAME(f) f##_f32
typedef float V32 __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef int32_t I32 __attribute__((vector_size(BYTES), aligned(4), may_alias));
#include "ball_products.c"
#undef T
#undef I
#undef V
#undef GREATEST
#undef NAME

#define T double
#define I I64
#define V V64
#define GREATEST INT64_MAX
#define NAME(f) f##_f64
typedef double V64 __attribute__((vector_size(BYTES), aligned(8), may_alias));
typedef int64_t I64 __attribute__((vector_size(BYTES), aligned(8), may_alias));
#include "ball_products.c"

#else

/* b [k, n], n at most WIDTH, into a panel with `apart` numbers from row to row, zeros behind. */
INLINE void NAME(lay_out)(int64_t k, int64_t n, const T *b, int64_t down, int64_t across, int64_t apart, T *panel) {
    for (int64_t i = 0; i < k; i++) {
        const T *of = b + i * down;
        T *to = panel + i * apart;
        if (across == 1 && n == WIDTH) memcpy(to, of, WIDTH * sizeof(T));
        else {
            for (int64_t j = 0; j < n; j++) to[j] = of[j * across];
            for (int64_t j = n; j < WIDTH; j++) to[j] = 0;
        }
    }
}

INLINE V NAME(read)(const T *from, int64_t count) {
    V x = {0};
    if (count < LANES) memcpy(&x, from, count * sizeof(T));
    else x = *(const V *)from;
    return x;
}

INLINE void NAME(write)(V x, T *to, int64_t count) {
    if (count < LANES) memcpy(to, &x, count * sizeof(T));
    else *(V *)to = x;
}

/* Rows [first, last) of a tile of C and C2, n columns of `wide`: a, a2 [ROWS, k] times the panel and its size, and the
bias; added to what is there if `more`. */
INLINE void NAME(pair_tile)(const int columns, int64_t first, int64_t last, int64_t k, int64_t n, const T *a, const T *a2,
                            int64_t down, const T *panel, const T *bias, int more, T *c, T *c2, int64_t wide) {
    V mid[ROWS][COLUMNS], apart[ROWS][COLUMNS];
    ZERO(mid) ZERO(apart)
    for (int64_t i = 0; i < k; i++) {
        V x[COLUMNS], size[COLUMNS];
        UNROLL for (int s = 0; s < columns; s++) {
            x[s] = *(const V *)(panel + i * WIDTH + s * LANES);
            size[s] = (V)((I)x[s] & GREATEST);
        }
        UNROLL for (int t = 0; t < ROWS; t++) {
            const T by = a[t * down + i], by2 = a2[t * down + i];
            UNROLL for (int s = 0; s < columns; s++) mid[t][s] += by * x[s], apart[t][s] += by2 * size[s];
        }
    }
    UNROLL for (int t = 0; t < ROWS; t++) UNROLL for (int s = 0; s < columns; s++) {
        if (t < first || t >= last) continue;
        const int64_t at = t * wide + s * LANES, left = n - s * LANES;
        V x = mid[t][s], y = apart[t][s];
        if (more) x += NAME(read)(c + at, left), y += NAME(read)(c2 + at, left);
        if (bias) x += NAME(read)(bias + s * LANES, left);
        NAME(write)(x, c + at, left);
        NAME(write)(y, c2 + at, left);
    }
}

/* c [m, n] = a [m, k] B + bias and c2 = a2 |B|; B [k, n] has strides `down` and `across`. */
void NAME(pair)(int64_t m, int64_t n, int64_t k, const T *a, const T *a2, const T *b, int64_t down, int64_t across,
                const T *bias, T *c, T *c2, int64_t threads) {
    const int64_t panels = (n + WIDTH - 1) / WIDTH, bands = (m + ROWS - 1) / ROWS;
    if (bands == 0) return;
    _Pragma("omp parallel for num_threads(threads) if (m * n * k > FEW)")
    for (int64_t part = 0; part < threads; part++) {
        T panel[DEPTH * WIDTH] __attribute__((aligned(64))), few[2][ROWS * DEPTH];
        /* Shares are even to a band of a panel. */
        const int64_t begin = panels * bands * part / threads, end = panels * bands * (part + 1) / threads;
        for (int64_t p = begin / bands; p * bands < end; p++) {
            const int64_t top = begin > p * bands ? begin - p * bands : 0, bottom = LESS(bands, end - p * bands);
            const int64_t j = p * WIDTH, left = LESS(n - j, WIDTH);
            for (int64_t i = 0; i < k; i += DEPTH) {
                const int64_t deep = LESS(k - i, DEPTH);
                NAME(lay_out)(deep, left, b + i * down + j * across, down, across, WIDTH, panel);
                for (int64_t band = top; band < bottom; band++) {
                    /* The last band begins early; of less than a band there is a copy, with rows of zeros. */
                    const int64_t t = m < ROWS ? 0 : LESS(band * ROWS, m - ROWS), last = LESS(m, ROWS);
                    const T *of = a + t * k + i, *of2 = a2 + t * k + i;
                    if (m < ROWS) {
                        memset(few, 0, sizeof few);
                        for (int64_t row = 0; row < m; row++) {
                            memcpy(few[0] + row * DEPTH, of + row * k, deep * sizeof(T));
                            memcpy(few[1] + row * DEPTH, of2 + row * k, deep * sizeof(T));
                        }
                        of = few[0], of2 = few[1];
                    }
                    const int64_t stride = m < ROWS ? DEPTH : k, first = band * ROWS - t, at = t * n + j;
                    const T *with = bias && i == 0 ? bias + j : 0;
                    if (left > LANES)
                        NAME(pair_tile)(COLUMNS, first, last, deep, left, of, of2, stride, panel, with, i > 0, c + at, c2 + at, n);
                    else
                        NAME(pair_tile)(1, first, last, deep, left, of, of2, stride, panel, with, i > 0, c + at, c2 + at, n);
                }
            }
        }
    }
}

/* Rows of a tile of the gradient of W [out, in]: by the transposed gradients of c B and r |B|, k examples of both in
turn, and by the panel, k examples of c and r in turn. */
INLINE void NAME(weight_tile)(const int columns, int64_t last, int64_t k, int64_t n, const T *grads, const T *panel,
                              const T *w, int more, T *to_w, int64_t wide) {
    V mid[ROWS][COLUMNS], apart[ROWS][COLUMNS];
    ZERO(mid) ZERO(apart)
    for (int64_t e = 0; e < k; e++) {
        V x[COLUMNS], y[COLUMNS];
        UNROLL for (int s = 0; s < columns; s++) {
            x[s] = *(const V *)(panel + 2 * e * WIDTH + s * LANES);
            y[s] = *(const V *)(panel + (2 * e + 1) * WIDTH + s * LANES);
        }
        UNROLL for (int t = 0; t < ROWS; t++) {
            const T by = grads[2 * e * ROWS + t], by2 = grads[(2 * e + 1) * ROWS + t];
            UNROLL for (int s = 0; s < columns; s++) mid[t][s] += by * x[s], apart[t][s] += by2 * y[s];
        }
    }
    UNROLL for (int t = 0; t < ROWS; t++) UNROLL for (int s = 0; s < columns; s++) {
        if (t >= last) continue;
        const int64_t at = t * wide + s * LANES, left = n - s * LANES;
        const V x = NAME(read)(w + at, left), y = apart[t][s];
        V found = mid[t][s] + ((V)((I)y & (x > 0)) - (V)((I)y & (x < 0)));
        if (more) found += NAME(read)(to_w + at, left);
        NAME(write)(found, to_w + at, left);
    }
}

/* to_w [out, in] = g^T c + sign(W) o (h^T r): g, h [n, out], c, r [n, in]; room [2, at most SHORT of n, out
rounded up to ROWS]. */
void NAME(to_weight)(int64_t n, int64_t in, int64_t out, const T *w, const T *g, const T *h, const T *c, const T *r,
                     T *room, T *to_w, int64_t threads) {
    const int64_t bands = (out + ROWS - 1) / ROWS, size = 2 * LESS(n, SHORT) * ROWS;
    if (n == 0) memset(to_w, 0, in * out * sizeof(T));
    _Pragma("omp parallel for num_threads(threads) if (n * in * out > FEW)")
    for (int64_t part = 0; part < threads; part++) {
        T panel[2 * SHORT * WIDTH] __attribute__((aligned(64)));
        const int64_t begin = bands * part / threads, end = bands * (part + 1) / threads;
        for (int64_t e = 0; e < n; e += SHORT) {
            const int64_t deep = LESS(n - e, SHORT);
            for (int64_t band = begin; band < end; band++) {
                T *to = room + size * band;
                for (int64_t i = 0; i < deep; i++)
                    for (int64_t t = 0; t < ROWS; t++) {
                        const int64_t o = band * ROWS + t, at = (e + i) * out + o;
                        to[2 * i * ROWS + t] = o < out ? g[at] : 0;
                        to[(2 * i + 1) * ROWS + t] = o < out ? h[at] : 0;
                    }
            }
            for (int64_t j = 0; j < in; j += WIDTH) {
                const int64_t left = LESS(in - j, WIDTH);
                NAME(lay_out)(deep, left, c + e * in + j, in, 1, 2 * WIDTH, panel);
                NAME(lay_out)(deep, left, r + e * in + j, in, 1, 2 * WIDTH, panel + WIDTH);
                for (int64_t band = begin; band < end; band++) {
                    const T *grads = room + size * band;
                    const int64_t last = LESS(out - band * ROWS, ROWS), at = band * ROWS * in + j;
                    if (left > LANES)
                        NAME(weight_tile)(COLUMNS, last, deep, left, grads, panel, w + at, e > 0, to_w + at, in);
                    else
                        NAME(weight_tile)(1, last, deep, left, grads, panel, w + at, e > 0, to_w + at, in);
                }
            }
        }
    }
}

#endif
