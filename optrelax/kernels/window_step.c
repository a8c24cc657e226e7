/* Windows pulled back through a convolution (window_step.py), and maps cut into windows. Channels come last.

A pixel's coefficients times the weights of one row of the kernel are a run of kw * in numbers next to each other in the
image: tiles of a few pixels by a few vectors stay in registers while the channels are summed. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define BYTES 64
#define TILE 8 /* pixels: with three vectors, 24 of 32 registers */
#else
#define BYTES 32
#define TILE 4 /* 12 of 16 */
#endif

#define FEW 16384 /* numbers below which threads cost more than they save */

#define INLINE static inline __attribute__((always_inline))

#define KERNELS(T, NAME)                                                                                               \
                                                                                                                       \
    typedef T vec_##NAME __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));                           \
                                                                                                                       \
    INLINE void tile_##NAME(const int pixels, const int vectors, int64_t terms, int64_t out, int64_t step, int64_t x,  \
                            int64_t shift, int64_t width, const T *const *a, const T *const *weight, T *image) {       \
        const int lanes = BYTES / sizeof(T);                                                                           \
        vec_##NAME sum[TILE][3];                                                                                       \
        for (int p = 0; p < pixels; p++)                                                                               \
            for (int v = 0; v < vectors; v++) sum[p][v] = (vec_##NAME){0};                                             \
        for (int64_t t = 0; t < terms; t++) {                                                                          \
            const T *from = a[t] + x * out, *w = weight[t] + shift;                                                    \
            for (int64_t c = 0; c < out; c++, w += width)                                                              \
                for (int v = 0; v < vectors; v++) {                                                                    \
                    const vec_##NAME some = *(const vec_##NAME *)(w + v * lanes);                                      \
                    for (int p = 0; p < pixels; p++) sum[p][v] += from[p * out + c] * some;                            \
                }                                                                                                      \
        }                                                                                                              \
        image += x * step + shift;                                                                                     \
        for (int p = 0; p < pixels; p++) /* one pixel's run overlaps the next one's */                                 \
            for (int v = 0; v < vectors; v++) *(vec_##NAME *)(image + p * step + v * lanes) += sum[p][v];              \
    }                                                                                                                  \
                                                                                                                       \
    INLINE void run_##NAME(const int vectors, int64_t wide, int64_t terms, int64_t out, int64_t step, int64_t shift,   \
                           int64_t width, const T *const *a, const T *const *w, T *image) {                            \
        int64_t x = 0;                                                                                                 \
        for (; x + TILE <= wide; x += TILE)                                                                            \
            tile_##NAME(TILE, vectors, terms, out, step, x, shift, width, a, w, image);                                \
        switch (wide - x) {                                                                                            \
            case 7: tile_##NAME(7 % TILE, vectors, terms, out, step, x, shift, width, a, w, image); break;             \
            case 6: tile_##NAME(6 % TILE, vectors, terms, out, step, x, shift, width, a, w, image); break;             \
            case 5: tile_##NAME(5 % TILE, vectors, terms, out, step, x, shift, width, a, w, image); break;             \
            case 4: tile_##NAME(4 % TILE, vectors, terms, out, step, x, shift, width, a, w, image); break;             \
            case 3: tile_##NAME(3, vectors, terms, out, step, x, shift, width, a, w, image); break;                    \
            case 2: tile_##NAME(2, vectors, terms, out, step, x, shift, width, a, w, image); break;                    \
            case 1: tile_##NAME(1, vectors, terms, out, step, x, shift, width, a, w, image); break;                    \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* The transpose of a convolution: a [n, high, wide, out], weight [kh, out, kw * in], found [n, fh, fw, in], the   \
       part of the image that begins at pixel (top, left). */                                                          \
    void spread_##NAME(int64_t n, int64_t high, int64_t wide, int64_t out, int64_t in, int64_t kh, int64_t kw,         \
                       int64_t step_y, int64_t step_x, int64_t apart, int64_t top, int64_t left, int64_t fh,           \
                       int64_t fw, const T *a, const T *weight, T *found, int64_t threads) {                           \
        const int64_t lanes = BYTES / sizeof(T), run = kw * in, vectors = (run + lanes - 1) / lanes;                   \
        const int64_t width = vectors * lanes, row = ((wide - 1) * step_x + kw) * in + width;                          \
        T *packed = calloc(kh * out * width, sizeof(T));                                                               \
        for (int64_t r = 0; r < kh * out; r++) memcpy(packed + r * width, weight + r * run, run * sizeof(T));          \
        _Pragma("omp parallel num_threads(threads) if (n * fh * fw * in > FEW)") {                                     \
            T *image = malloc(row * sizeof(T));                                                                        \
            const T **rows = malloc(kh * sizeof(T *)), **w = malloc(kh * sizeof(T *));                                 \
            _Pragma("omp for") for (int64_t i = 0; i < n * fh; i++) {                                                  \
                const int64_t at = i % fh + top;                                                                       \
                int64_t terms = 0;                                                                                     \
                for (int64_t k = 0; k < kh; k++) {                                                                     \
                    const int64_t y = at - k * apart;                                                                  \
                    if (y < 0 || y % step_y || y / step_y >= high) continue;                                           \
                    rows[terms] = a + (i / fh * high + y / step_y) * wide * out;                                       \
                    w[terms++] = packed + k * out * width;                                                             \
                }                                                                                                      \
                memset(image, 0, row * sizeof(T));                                                                     \
                for (int64_t v = 0, some; terms && v < vectors; v += some) {                                           \
                    some = vectors - v == 4 || vectors - v == 2 ? 2 : vectors - v == 1 ? 1 : 3;                        \
                    if (some == 1)                                                                                     \
                        run_##NAME(1, wide, terms, out, step_x * in, v * lanes, width, rows, w, image);                \
                    else if (some == 2)                                                                                \
                        run_##NAME(2, wide, terms, out, step_x * in, v * lanes, width, rows, w, image);                \
                    else                                                                                               \
                        run_##NAME(3, wide, terms, out, step_x * in, v * lanes, width, rows, w, image);                \
                }                                                                                                      \
                memcpy(found + i * fw * in, image + left * in, fw * in * sizeof(T));                                   \
            }                                                                                                          \
            free(image), free(rows), free(w);                                                                          \
        }                                                                                                              \
        free(packed);                                                                                                  \
    }                                                                                                                  \
                                                                                                                       \
    /* Windows [batch, places, kh, kw, c] of maps [maps, high, wide, c] (maps: batch or 1) at corners [batch or 1,     \
       places, 2]; zeros beyond the edges. back: their sum into maps [batch, ...], cleared here. */                    \
    void gather_##NAME(int64_t batch, int64_t maps, int64_t lists, int64_t places, int64_t high, int64_t wide,         \
                       int64_t c, int64_t kh, int64_t kw, int64_t back, const int64_t *corners, T *map, T *windows,    \
                       int64_t threads) {                                                                              \
        const int64_t size = kh * kw * c;                                                                              \
        if (back) memset(map, 0, maps * high * wide * c * sizeof(T));                                                  \
        _Pragma("omp parallel for num_threads(threads) if ((!back || maps > 1) && batch * places * size > FEW)")       \
        for (int64_t b = 0; b < batch; b++)                                                                            \
            for (int64_t p = 0; p < places; p++) {                                                                     \
                const int64_t *corner = corners + ((lists > 1 ? b : 0) * places + p) * 2;                              \
                const int64_t x = corner[1], from = x < 0 ? -x : 0, to = x + kw > wide ? wide - x : kw;                \
                T *window = windows + (b * places + p) * size;                                                         \
                if (!back) memset(window, 0, size * sizeof(T));                                                        \
                if (from >= to) continue;                                                                              \
                for (int64_t i = 0; i < kh; i++) {                                                                     \
                    const int64_t y = corner[0] + i, count = (to - from) * c;                                          \
                    if (y < 0 || y >= high) continue;                                                                  \
                    T *m = map + (((maps > 1 ? b : 0) * high + y) * wide + x + from) * c, *w = window + (i * kw + from) * c;\
                    if (!back) memcpy(w, m, count * sizeof(T));                                                        \
                    else                                                                                               \
                        for (int64_t j = 0; j < count; j++) m[j] += w[j];                                              \
                }                                                                                                      \
            }                                                                                                          \
    }

KERNELS(float, f32)
KERNELS(double, f64)
