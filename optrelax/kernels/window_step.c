/* Windows pulled back through a convolution and an activation (window_step.py), and maps cut into windows. Channels come
last. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef __clang__
#pragma GCC optimize("fp-contract=fast") /* -std=c11 would keep products and sums apart */
#endif

#define FEW 16384 /* numbers below which threads cost more than they save */

#include "window_products.h"

#define BLOCK 16 /* rows that are relaxed together: of one place, their lines stay in the first cache */

/* Images, whose rows follow each other as those of the map do: a few long runs instead of many short ones. */
#define WHOLE (kh == high && kw == wide && !(step_y | step_x | offset_y | offset_x))

#define KERNELS(T, NAME)                                                                                               \
                                                                                                                       \
    /* Rows pulled through an activation: windows [n, kh, kw, c] of maps [batch, high, wide, c], row r at pixel        \
       place[r] * step + offset of example place[r][0]. a: `given` rows, row which[r] where `which` is given, else     \
       row r. Without slopes the rows end in a box, whose ends are the intercepts. w [n, kh, kw, c], where given: a    \
       row's own lower lines have the slope ls + w ds and the intercept li + w di. */                                  \
    void relax_##NAME(int64_t n, int64_t given, int64_t kh, int64_t kw, int64_t c, int64_t high, int64_t wide,         \
                      int64_t step_y, int64_t step_x, int64_t offset_y, int64_t offset_x, const int64_t *place,        \
                      const int64_t *which, const T *a, const T *ls, const T *li, const T *us, const T *ui, const T *w,\
                      const T *ds, const T *di, T *pulled, T *constant, int64_t threads) {                             \
        const int64_t size = kh * kw * c;                                                                              \
        if (WHOLE) kw *= kh, wide *= high, kh = high = 1;                                                              \
        _Pragma("omp parallel for num_threads(threads) if (n * size > FEW)") for (int64_t b = 0; b < n; b += BLOCK) {  \
            const int64_t last = b + BLOCK < n ? b + BLOCK : n;                                                        \
            for (int64_t i = 0; i < kh; i++)                                                                           \
                for (int64_t r = b; r < last; r++) {                                                                   \
                    const int64_t y = place[3 * r + 1] * step_y + offset_y + i, x = place[3 * r + 2] * step_x + offset_x;\
                    const int64_t begin = x < 0 ? -x : 0, end = x + kw > wide ? wide - x : kw;                         \
                    const T *from = a + (which ? which[r] : r) * size + i * kw * c;                                    \
                    const T *own = w ? w + r * size + i * kw * c : 0;                                                  \
                    T *to = pulled + r * size + i * kw * c, sum = 0;                                                   \
                    if (y < 0 || y >= high || begin >= end) {                                                          \
                        if (ls) memset(to, 0, kw * c * sizeof(T));                                                     \
                        continue;                                                                                      \
                    }                                                                                                  \
                    const int64_t e = ((place[3 * r] * high + y) * wide + x) * c;                                      \
                    if (ls) memset(to, 0, begin * c * sizeof(T)), memset(to + end * c, 0, (kw - end) * c * sizeof(T)); \
                    if (own) {                                                                                         \
                        _Pragma("omp simd reduction(+ : sum)") for (int64_t j = begin * c; j < end * c; j++) {         \
                            const T up = from[j] > 0 ? from[j] : 0, down = from[j] - up;                               \
                            to[j] = up * (ls[e + j] + own[j] * ds[e + j]) + down * us[e + j];                          \
                            sum += up * (li[e + j] + own[j] * di[e + j]) + down * ui[e + j];                           \
                        }                                                                                              \
                    } else if (ls) {                                                                                   \
                        _Pragma("omp simd reduction(+ : sum)") for (int64_t j = begin * c; j < end * c; j++) {         \
                            const T up = from[j] > 0 ? from[j] : 0, down = from[j] - up;                               \
                            to[j] = up * ls[e + j] + down * us[e + j];                                                 \
                            sum += up * li[e + j] + down * ui[e + j];                                                  \
                        }                                                                                              \
                    } else {                                                                                           \
                        _Pragma("omp simd reduction(+ : sum)") for (int64_t j = begin * c; j < end * c; j++) {         \
                            const T up = from[j] > 0 ? from[j] : 0, down = from[j] - up;                               \
                            sum += up * li[e + j] + down * ui[e + j];                                                  \
                        }                                                                                              \
                    }                                                                                                  \
                    constant[r] += sum;                                                                                \
                }                                                                                                      \
        }                                                                                                              \
    }                                                                                                                  \
    /* Its gradient: grad as pulled, column [n] -> to_a [n, kh, kw, c], which may be grad itself, and maps, added up   \
       (null: not wanted). A thread takes every so-many-th row of the maps, so that no two write to one place. */      \
    void relax_back_##NAME(int64_t n, int64_t given, int64_t kh, int64_t kw, int64_t c, int64_t high, int64_t wide,    \
                           int64_t step_y, int64_t step_x, int64_t offset_y, int64_t offset_x, const int64_t *place,   \
                           const int64_t *which, const T *a, const T *ls, const T *li, const T *us, const T *ui,       \
                           const T *w, const T *ds, const T *di, const T *grad, const T *column, T *to_a, T *to_ls,    \
                           T *to_li, T *to_us, T *to_ui, T *to_w, T *to_ds, T *to_di, int64_t threads) {               \
        const int64_t size = kh * kw * c;                                                                              \
        if (WHOLE && kh * kw % threads == 0) kw = wide = kh * kw / threads, kh = high = threads;                       \
        _Pragma("omp parallel for schedule(static, 1) num_threads(threads) if (n * size > FEW)")                       \
        for (int64_t t = 0; t < threads; t++)                                                                          \
            for (int64_t b = 0; b < n; b += BLOCK) {                                                                   \
                const int64_t last = b + BLOCK < n ? b + BLOCK : n;                                                    \
                for (int64_t i = 0; i < kh; i++)                                                                       \
                    for (int64_t r = b; r < last; r++) {                                                               \
                        const int64_t y = place[3 * r + 1] * step_y + offset_y + i;                                    \
                        const int64_t x = place[3 * r + 2] * step_x + offset_x;                                        \
                        if (((y % threads) + threads) % threads != t) continue;                                        \
                        const int64_t begin = x < 0 ? -x : 0, end = x + kw > wide ? wide - x : kw;                     \
                        const T *from = a + (which ? which[r] : r) * size + i * kw * c;                                \
                        const T *g = grad ? grad + r * size + i * kw * c : 0, q = column[r];                           \
                        T *to = to_a + r * size + i * kw * c;                                                          \
                        if (y < 0 || y >= high || begin >= end) {                                                      \
                            memset(to, 0, kw * c * sizeof(T));                                                         \
                            continue;                                                                                  \
                        }                                                                                              \
                        const int64_t e = ((place[3 * r] * high + y) * wide + x) * c;                                  \
                        if (w) {                                                                                       \
                            const T *own = w + r * size + i * kw * c;                                                  \
                            T *own_to = to_w ? to_w + r * size + i * kw * c : 0;                                       \
                            for (int64_t j = begin * c; own_to && j < end * c; j++)                                    \
                                own_to[j] = (from[j] > 0 ? from[j] : 0) * (ds[e + j] * g[j] + di[e + j] * q);          \
                            for (int64_t j = begin * c; to_us && j < end * c; j++) {                                   \
                                const T down = from[j] > 0 ? 0 : from[j];                                              \
                                to_us[e + j] += g[j] * down, to_ui[e + j] += q * down;                                 \
                            }                                                                                          \
                            for (int64_t j = begin * c; to_ls && j < end * c; j++) {                                   \
                                const T up = from[j] > 0 ? from[j] : 0;                                                \
                                to_ls[e + j] += g[j] * up, to_li[e + j] += q * up;                                     \
                                to_ds[e + j] += g[j] * up * own[j], to_di[e + j] += q * up * own[j];                   \
                            }                                                                                          \
                            _Pragma("omp simd") for (int64_t j = begin * c; j < end * c; j++) {                        \
                                const T below = ls[e + j] + own[j] * ds[e + j], under = li[e + j] + own[j] * di[e + j];\
                                to[j] = (from[j] > 0 ? below : us[e + j]) * g[j] + (from[j] > 0 ? under : ui[e + j]) * q;\
                            }                                                                                          \
                            memset(to, 0, begin * c * sizeof(T)), memset(to + end * c, 0, (kw - end) * c * sizeof(T)); \
                            continue;                                                                                  \
                        }                                                                                              \
                        if (ls && to_ls) {                                                                             \
                            _Pragma("omp simd") for (int64_t j = begin * c; j < end * c; j++) {                        \
                                const T up = from[j] > 0 ? from[j] : 0, down = from[j] - up;                           \
                                to_ls[e + j] += g[j] * up, to_us[e + j] += g[j] * down;                                \
                            }                                                                                          \
                        }                                                                                              \
                        if (to_li) {                                                                                   \
                            _Pragma("omp simd") for (int64_t j = begin * c; j < end * c; j++) {                        \
                                const T up = from[j] > 0 ? from[j] : 0, down = from[j] - up;                           \
                                to_li[e + j] += q * up, to_ui[e + j] += q * down;                                      \
                            }                                                                                          \
                        }                                                                                              \
                        if (ls) {                                                                                      \
                            _Pragma("omp simd") for (int64_t j = begin * c; j < end * c; j++) {                        \
                                const T slope = from[j] > 0 ? ls[e + j] : us[e + j];                                   \
                                to[j] = slope * g[j] + (from[j] > 0 ? li[e + j] : ui[e + j]) * q;                      \
                            }                                                                                          \
                        } else {                                                                                       \
                            _Pragma("omp simd") for (int64_t j = begin * c; j < end * c; j++) {                        \
                                const T middle = (li[e + j] + ui[e + j]) * (T)0.5;                                     \
                                to[j] = q * (from[j] > 0 ? li[e + j] : (from[j] < 0 ? ui[e + j] : middle));            \
                            }                                                                                          \
                        }                                                                                              \
                        memset(to, 0, begin * c * sizeof(T)), memset(to + end * c, 0, (kw - end) * c * sizeof(T));     \
                    }                                                                                                  \
            }                                                                                                          \
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

PRODUCTS(float, f32)
KERNELS(float, f32)
PRODUCTS(double, f64)
KERNELS(double, f64)
