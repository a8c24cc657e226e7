/* Rows pulled back through a convolution, and the two gradients of that (convolutions.py).

Planes: an image of stride s is cut into s x s phases, each of the convolution's own resolution and row pitch, with
margins of zeros. A tap of the kernel is then a shift of a whole plane, and every loop runs over contiguous memory. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int64_t n, out, in, groups;              /* images; channels of the rows and of what they are pulled to */
    int64_t high, wide, rows, columns;       /* the rows' own resolution; that of what they are pulled to */
    int64_t kh, kw, sy, sx, py, px, dy, dx;  /* kernel, stride, padding, dilation */
    int64_t low_y, low_x, pitch, lines, length, plane; /* least shift; layout of a plane; entries it is good for */
} Shape;

static int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

static Shape layout(const int64_t *g) {
    Shape s = {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10], g[11], g[12], g[13], g[14], g[15]};
    const int64_t high_y = floor_div((s.kh - 1) * s.dy - s.py, s.sy), high_x = floor_div((s.kw - 1) * s.dx - s.px, s.sx);
    s.low_y = floor_div(-s.py, s.sy), s.low_x = floor_div(-s.px, s.sx);
    s.pitch = s.wide + high_x - s.low_x;
    s.lines = s.high + high_y - s.low_y;
    s.length = s.lines * s.pitch;
    s.plane = (2 * s.lines + 2) * s.pitch; /* room for every shift on both sides */
    return s;
}

/* Where tap (ky, kx) of a phase image lies against the rows' plane: the phase, and the shift in entries. */
static int64_t phase_of(const Shape *s, int64_t ky, int64_t kx, int64_t *shift) {
    const int64_t ty = ky * s->dy - s->py, tx = kx * s->dx - s->px;
    const int64_t qy = floor_div(ty, s->sy), qx = floor_div(tx, s->sx);
    *shift = (qy - s->low_y) * s->pitch + qx - s->low_x;
    return (ty - qy * s->sy) * s->sx + tx - qx * s->sx;
}

#define KERNELS(T, NAME)                                                                                               \
    /* to[j] = sum over k of w[k] from[k][j] */                                                                        \
    static void combine_##NAME(int64_t n, int64_t terms, const T *w, const T *const *from, T *restrict to) {           \
        memset(to, 0, n * sizeof(T));                                                                                  \
        int64_t k = 0;                                                                                                 \
        for (; k + 4 <= terms; k += 4) {                                                                               \
            const T w0 = w[k], w1 = w[k + 1], w2 = w[k + 2], w3 = w[k + 3];                                            \
            const T *restrict a = from[k], *restrict b = from[k + 1], *restrict c = from[k + 2],                       \
                    *restrict d = from[k + 3];                                                                         \
            _Pragma("omp simd") for (int64_t j = 0; j < n; j++)                                                        \
                to[j] += (w0 * a[j] + w1 * b[j]) + (w2 * c[j] + w3 * d[j]);                                            \
        }                                                                                                              \
        for (; k < terms; k++) {                                                                                       \
            const T w0 = w[k];                                                                                         \
            const T *restrict a = from[k];                                                                             \
            _Pragma("omp simd") for (int64_t j = 0; j < n; j++) to[j] += w0 * a[j];                                    \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* Rows [out, high, wide] into planes with a margin of zeros in front and behind. */                               \
    static void pad_##NAME(const Shape *s, const T *rows, T *planes) {                                                 \
        memset(planes, 0, s->out * s->plane * sizeof(T));                                                              \
        for (int64_t o = 0; o < s->out; o++)                                                                           \
            for (int64_t y = 0; y < s->high; y++)                                                                      \
                memcpy(planes + o * s->plane + s->length + y * s->pitch, rows + (o * s->high + y) * s->wide,           \
                       s->wide * sizeof(T));                                                                           \
    }                                                                                                                  \
                                                                                                                       \
    /* An image [in, rows, columns] into its phases. */                                                                \
    static void split_##NAME(const Shape *s, const T *image, T *planes) {                                              \
        const int64_t phases = s->sy * s->sx;                                                                          \
        memset(planes, 0, s->in * phases * s->plane * sizeof(T));                                                      \
        for (int64_t i = 0; i < s->in; i++)                                                                            \
            for (int64_t y = 0; y < s->rows; y++) {                                                                    \
                const int64_t line = y / s->sy - s->low_y;                                                             \
                if (line >= s->lines) continue; /* no tap reads it */                                                  \
                for (int64_t p = 0; p < s->sx; p++) {                                                                  \
                    const T *from = image + (i * s->rows + y) * s->columns + p;                                        \
                    T *to = planes + (i * phases + y % s->sy * s->sx + p) * s->plane + line * s->pitch - s->low_x;     \
                    const int64_t count = (s->columns - p + s->sx - 1) / s->sx, room = s->pitch + s->low_x;            \
                    for (int64_t x = 0; x < count && x < room; x++) to[x] = from[x * s->sx];                           \
                }                                                                                                      \
            }                                                                                                          \
    }                                                                                                                  \
                                                                                                                       \
    /* image[n] = transpose of the convolution of rows[n] */                                                           \
    void pull_##NAME(const int64_t *geometry, const T *rows, const T *weight, T *image, int64_t threads) {             \
        const Shape s = layout(geometry);                                                                              \
        const int64_t each_in = s.in / s.groups, each_out = s.out / s.groups, taps = s.kh * s.kw;                      \
        _Pragma("omp parallel num_threads(threads) if (s.n > 1)") {                                                    \
            T *padded = malloc(s.out * s.plane * sizeof(T)), *phase = malloc(s.length * sizeof(T));                    \
            T *w = malloc(each_out * taps * sizeof(T));                                                                \
            const T **from = malloc(each_out * taps * sizeof(T *));                                                    \
            _Pragma("omp for schedule(static)") for (int64_t n = 0; n < s.n; n++) {                                    \
                pad_##NAME(&s, rows + n * s.out * s.high * s.wide, padded);                                            \
                for (int64_t i = 0; i < s.in; i++) {                                                                   \
                    T *to = image + (n * s.in + i) * s.rows * s.columns;                                               \
                    const int64_t first = i / each_in * each_out;                                                      \
                    for (int64_t p = 0; p < s.sy * s.sx; p++) {                                                        \
                        int64_t terms = 0, shift;                                                                      \
                        for (int64_t ky = 0; ky < s.kh; ky++)                                                          \
                            for (int64_t kx = 0; kx < s.kw; kx++) {                                                    \
                                if (phase_of(&s, ky, kx, &shift) != p) continue;                                       \
                                for (int64_t o = first; o < first + each_out; o++, terms++) {                          \
                                    w[terms] = weight[((o * each_in + i % each_in) * s.kh + ky) * s.kw + kx];          \
                                    from[terms] = padded + o * s.plane + s.length - shift;                             \
                                }                                                                                      \
                            }                                                                                          \
                        combine_##NAME(s.length, terms, w, from, phase);                                               \
                        const int64_t y0 = p / s.sx, x0 = p % s.sx;                                                    \
                        for (int64_t y = y0; y < s.rows; y += s.sy) {                                                  \
                            const int64_t line = y / s.sy - s.low_y;                                                   \
                            const T *at = phase + line * s.pitch - s.low_x;                                            \
                            for (int64_t x = x0, j = 0; x < s.columns; x += s.sx, j++)                                 \
                                to[y * s.columns + x] = line < s.lines && j < s.pitch + s.low_x ? at[j] : 0;           \
                        }                                                                                              \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
            free(padded), free(phase), free(w), free((void *)from);                                                    \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* Gradients by that of the image: in the rows (the convolution itself), in the weight; null: not wanted. */       \
    void pull_back_##NAME(const int64_t *geometry, const T *rows, const T *weight, const T *image, T *to_rows,         \
                          T *to_weight, int64_t threads) {                                                             \
        const Shape s = layout(geometry);                                                                              \
        const int64_t each_in = s.in / s.groups, each_out = s.out / s.groups, taps = s.kh * s.kw;                      \
        const int64_t terms = each_in * taps, span = s.high * s.pitch, phases = s.sy * s.sx;                           \
        T *parts = to_weight ? calloc(threads * s.out * terms, sizeof(T)) : 0;                                         \
        _Pragma("omp parallel for schedule(static) num_threads(threads)") for (int64_t t = 0; t < threads; t++) {      \
            T *planes = malloc(s.in * phases * s.plane * sizeof(T)), *one = malloc(span * sizeof(T));                  \
            T *padded = malloc(s.out * s.plane * sizeof(T));                                                           \
            const T **from = malloc(terms * sizeof(T *));                                                              \
            for (int64_t n = t * s.n / threads; n < (t + 1) * s.n / threads; n++) {                                    \
                split_##NAME(&s, image + n * s.in * s.rows * s.columns, planes);                                       \
                if (to_weight) pad_##NAME(&s, rows + n * s.out * s.high * s.wide, padded);                             \
                for (int64_t o = 0; o < s.out; o++) {                                                                  \
                    int64_t k = 0, shift;                                                                              \
                    for (int64_t i = o / each_out * each_in; i < (o / each_out + 1) * each_in; i++)                    \
                        for (int64_t ky = 0; ky < s.kh; ky++)                                                          \
                            for (int64_t kx = 0; kx < s.kw; kx++, k++) {                                               \
                                const int64_t p = phase_of(&s, ky, kx, &shift);                                        \
                                from[k] = planes + (i * phases + p) * s.plane + shift;                                 \
                            }                                                                                          \
                    if (to_rows) {                                                                                     \
                        combine_##NAME(span, terms, weight + o * terms, from, one);                                    \
                        for (int64_t y = 0; y < s.high; y++)                                                           \
                            memcpy(to_rows + ((n * s.out + o) * s.high + y) * s.wide, one + y * s.pitch,               \
                                   s.wide * sizeof(T));                                                                \
                    }                                                                                                  \
                    if (to_weight) {                                                                                   \
                        const T *restrict a = padded + o * s.plane + s.length;                                         \
                        T *total = parts + (t * s.out + o) * terms;                                                    \
                        for (k = 0; k + 4 <= terms; k += 4) {                                                          \
                            const T *restrict b = from[k], *restrict c = from[k + 1], *restrict d = from[k + 2],       \
                                    *restrict e = from[k + 3];                                                         \
                            T s0 = 0, s1 = 0, s2 = 0, s3 = 0;                                                          \
                            _Pragma("omp simd reduction(+ : s0, s1, s2, s3)") for (int64_t j = 0; j < span; j++) {     \
                                s0 += a[j] * b[j], s1 += a[j] * c[j], s2 += a[j] * d[j], s3 += a[j] * e[j];            \
                            }                                                                                          \
                            total[k] += s0, total[k + 1] += s1, total[k + 2] += s2, total[k + 3] += s3;                \
                        }                                                                                              \
                        for (; k < terms; k++) {                                                                       \
                            const T *restrict b = from[k];                                                             \
                            T sum = 0;                                                                                 \
                            _Pragma("omp simd reduction(+ : sum)") for (int64_t j = 0; j < span; j++)                  \
                                sum += a[j] * b[j];                                                                    \
                            total[k] += sum;                                                                           \
                        }                                                                                              \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
            free(planes), free(one), free(padded), free((void *)from);                                                 \
        }                                                                                                              \
        if (to_weight) {                                                                                               \
            memset(to_weight, 0, s.out * terms * sizeof(T));                                                           \
            for (int64_t t = 0; t < threads; t++)                                                                      \
                for (int64_t j = 0; j < s.out * terms; j++) to_weight[j] += parts[t * s.out * terms + j];              \
        }                                                                                                              \
        free(parts);                                                                                                   \
    }

KERNELS(float, f32)
KERNELS(double, f64)
