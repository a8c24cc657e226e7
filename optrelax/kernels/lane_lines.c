/* Blocks through an activation, and its gradients (lane_step.py, lane_views.h). */

#include "lane_views.h"

#define KERNELS(T, NAME)                                                                                               \
    /* Lists of the channels whose lines are not 0, of which none can be a line of anything but 0. */                  \
    void keep_##NAME(int64_t pixels, int64_t c, const T *ls, const T *li, const T *us, const T *ui, int32_t *list,     \
                     int64_t threads) {                                                                                \
        for (int64_t p = 0; p < pixels; p++) {                                                                         \
            int32_t *to = list + p * (c + 1), n = 0;                                                                   \
            for (int64_t j = p * c; j < (p + 1) * c; j++)                                                              \
                if (ls[j] != 0 || li[j] != 0 || us[j] != 0 || ui[j] != 0) to[++n] = j - p * c;                         \
            to[0] = n;                                                                                                 \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    typedef struct {                                                                                                   \
        int64_t blocks, lanes, rows, columns, channels, clear;                                                         \
        VIEW(map)                                                                                                      \
        const int32_t *kept;                                                                                           \
        const int64_t *place;                                                                                          \
        const T *a, *ls, *li, *us, *ui, *grad;                                                                         \
        T *column, *found, *to_ls, *to_li, *to_us, *to_ui;                                                             \
    } Relaxation_##NAME;                                                                                               \
    const int64_t size_of_relax_##NAME = sizeof(Relaxation_##NAME),                                                    \
                  size_of_relax_back_##NAME = sizeof(Relaxation_##NAME);                                               \
                                                                                                                       \
    INLINE View view_##NAME(const Relaxation_##NAME *g) {                                                              \
        return (View){g->rows, g->columns, g->channels, g->map_high, g->map_wide, g->map_step_y, g->map_step_x,        \
                      g->map_offset_y, g->map_offset_x, g->kept};                                                      \
    }                                                                                                                  \
                                                                                                                       \
    INLINE void relaxed_##NAME(const int lanes, const Relaxation_##NAME *g, const View *v, const int32_t *all,         \
                               int64_t b) {                                                                            \
        const int64_t *place = g->place + 3 * b, c = g->channels;                                                      \
        T total[2 * LANES_##NAME] = {0};                                                                               \
        for (int64_t r = 0; r < g->rows; r++)                                                                          \
            for (int64_t z = 0; z < g->columns; z++) {                                                                 \
                const int64_t y = top_of(v, place) + r, x = left_of(v, place) + z;                                     \
                const int64_t pixel = (b * g->rows + r) * g->columns + z;                                              \
                const int inside = y >= 0 && y < v->high && x >= 0 && x < v->wide;                                     \
                const int64_t e = ((place[0] * v->high + y) * v->wide + x) * c;                                        \
                const int32_t *list = inside ? listed(v, all, place[0], y, x) : none;                                  \
                int64_t next = 0;                                                                                      \
                for (int64_t i = 1; i <= list[0]; i++) {                                                               \
                    const int64_t j = list[i];                                                                         \
                    const T *from = g->a + (pixel * c + j) * lanes, li = g->li[e + j], ui = g->ui[e + j];              \
                    if (!g->ls) {                                                                                      \
                        _Pragma("omp simd") for (int k = 0; k < lanes; k++) {                                          \
                            const T up = from[k] > 0 ? from[k] : 0;                                                    \
                            total[k] += up * li + (from[k] - up) * ui;                                                 \
                        }                                                                                              \
                        continue;                                                                                      \
                    }                                                                                                  \
                    const T ls = g->ls[e + j], us = g->us[e + j];                                                      \
                    T *to = g->found + (pixel * c + j) * lanes;                                                        \
                    if (g->clear) memset(g->found + (pixel * c + next) * lanes, 0, (j - next) * lanes * sizeof(T));    \
                    next = j + 1;                                                                                      \
                    _Pragma("omp simd") for (int k = 0; k < lanes; k++) {                                              \
                        const T up = from[k] > 0 ? from[k] : 0, down = from[k] - up;                                   \
                        to[k] = up * ls + down * us;                                                                   \
                        total[k] += up * li + down * ui;                                                               \
                    }                                                                                                  \
                }                                                                                                      \
                if (g->clear) memset(g->found + (pixel * c + next) * lanes, 0, (c - next) * lanes * sizeof(T));        \
            }                                                                                                          \
        for (int k = 0; k < lanes; k++) g->column[b * lanes + k] += total[k];                                          \
    }                                                                                                                  \
                                                                                                                       \
    /* Blocks [blocks, rows, columns, channels, lanes] pulled through an activation; without slopes into a box, whose  \
       ends are the intercepts. column [blocks, lanes] is added to. */                                                 \
    void relax_##NAME(const Relaxation_##NAME *g, int64_t threads) {                                                   \
        const View v = view_##NAME(g);                                                                                 \
        int32_t *all = all_channels(g->channels);                                                                      \
        _Pragma("omp parallel for num_threads(threads)") for (int64_t b = 0; b < g->blocks; b++)                       \
            if (g->lanes > LANES_##NAME)                                                                               \
                relaxed_##NAME(2 * LANES_##NAME, g, &v, all, b);                                                       \
            else                                                                                                       \
                relaxed_##NAME(LANES_##NAME, g, &v, all, b);                                                           \
        free(all);                                                                                                     \
    }                                                                                                                  \
                                                                                                                       \
    INLINE void channel_##NAME(const int lanes, const Relaxation_##NAME *g, int64_t count, const int64_t *seen,        \
                               const int64_t *pixel, int64_t j, int64_t e) {                                           \
        const T li = g->li[e + j], ui = g->ui[e + j], middle = (li + ui) * (T)0.5;                                     \
        const T ls = g->ls ? g->ls[e + j] : 0, us = g->ls ? g->us[e + j] : 0;                                          \
        T sum_ls[2 * LANES_##NAME] = {0}, sum_us[2 * LANES_##NAME] = {0};                                              \
        T sum_li[2 * LANES_##NAME] = {0}, sum_ui[2 * LANES_##NAME] = {0};                                              \
        for (int64_t i = 0; i < count; i++) {                                                                          \
            const int64_t at = (pixel[i] * g->channels + j) * lanes;                                                   \
            const T *from = g->a + at, *q = g->column + seen[i] * lanes, *grad = g->grad ? g->grad + at : 0;           \
            T *to = g->found + at;                                                                                     \
            if (grad) {                                                                                                \
                _Pragma("omp simd") for (int k = 0; k < lanes; k++) {                                                  \
                    const T up = from[k] > 0 ? from[k] : 0, down = from[k] - up, own = grad[k];                        \
                    sum_ls[k] += own * up, sum_us[k] += own * down;                                                    \
                    sum_li[k] += q[k] * up, sum_ui[k] += q[k] * down;                                                  \
                    to[k] = (from[k] > 0 ? ls : us) * own + (from[k] > 0 ? li : ui) * q[k];                            \
                }                                                                                                      \
            } else {                                                                                                   \
                _Pragma("omp simd") for (int k = 0; k < lanes; k++) {                                                  \
                    const T up = from[k] > 0 ? from[k] : 0;                                                            \
                    sum_li[k] += q[k] * up, sum_ui[k] += q[k] * (from[k] - up);                                        \
                    to[k] = q[k] * (from[k] > 0 ? li : (from[k] < 0 ? ui : middle));                                   \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        T more_ls = 0, more_us = 0, more_li = 0, more_ui = 0;                                                          \
        for (int k = 0; k < lanes; k++)                                                                                \
            more_ls += sum_ls[k], more_us += sum_us[k], more_li += sum_li[k], more_ui += sum_ui[k];                    \
        if (g->to_ls) g->to_ls[e + j] += more_ls, g->to_us[e + j] += more_us;                                          \
        if (g->to_li) g->to_li[e + j] += more_li, g->to_ui[e + j] += more_ui;                                          \
    }                                                                                                                  \
                                                                                                                       \
    /* Its gradient: grad as found there, column's -> found as a, 0 where a list leaves a channel out, and the maps',  \
       added up (null: not wanted). A thread takes every so-many-th row of the map. */                                 \
    void relax_back_##NAME(const Relaxation_##NAME *g, int64_t threads) {                                              \
        const View v = view_##NAME(g);                                                                                 \
        const int64_t c = g->channels, lanes = g->lanes;                                                               \
        int32_t *all = all_channels(c);                                                                                \
        _Pragma("omp parallel for num_threads(threads)") for (int64_t b = 0; b < (g->clear ? g->blocks : 0); b++) {    \
            const int64_t *place = g->place + 3 * b;                                                                   \
            for (int64_t r = 0; r < g->rows; r++)                                                                      \
                for (int64_t z = 0; z < g->columns; z++) {                                                             \
                    const int64_t y = top_of(&v, place) + r, x = left_of(&v, place) + z;                               \
                    const int inside = y >= 0 && y < v.high && x >= 0 && x < v.wide;                                   \
                    const int32_t *list = inside ? listed(&v, all, place[0], y, x) : none;                             \
                    T *to = g->found + ((b * g->rows + r) * g->columns + z) * c * lanes;                               \
                    int64_t next = 0;                                                                                  \
                    for (int64_t i = 1; i <= list[0]; next = list[i++] + 1)                                            \
                        memset(to + next * lanes, 0, (list[i] - next) * lanes * sizeof(T));                            \
                    memset(to + next * lanes, 0, (c - next) * lanes * sizeof(T));                                      \
                }                                                                                                      \
        }                                                                                                              \
        for (int64_t first = 0, last; first < g->blocks; first = last) {                                               \
            const int64_t example = g->place[3 * first];                                                               \
            int64_t box[4];                                                                                            \
            last = last_of(g->place, first, g->blocks);                                                                \
            box_of(&v, g->place, first, last, box);                                                                    \
            _Pragma("omp parallel for schedule(static, 1) num_threads(threads)") for (int64_t t = 0; t < threads; t++) {\
                int64_t *seen = malloc(2 * (last - first) * sizeof(int64_t)), *pixel = seen + last - first;            \
                for (int64_t y = (box[0] > 0 ? box[0] : 0) + t; y < box[2] && y < v.high; y += threads)                \
                    for (int64_t x = box[1] > 0 ? box[1] : 0; x < box[3] && x < v.wide; x++) {                         \
                        const int32_t *list = listed(&v, all, example, y, x);                                          \
                        const int64_t e = ((example * v.high + y) * v.wide + x) * c;                                   \
                        int64_t count = 0;                                                                             \
                        for (int64_t b = first; list[0] && b < last; b++) {                                            \
                            const int64_t r = y - top_of(&v, g->place + 3 * b), z = x - left_of(&v, g->place + 3 * b); \
                            if (r < 0 || r >= g->rows || z < 0 || z >= g->columns) continue;                           \
                            seen[count] = b;                                                                           \
                            pixel[count++] = (b * g->rows + r) * g->columns + z;                                       \
                        }                                                                                              \
                        for (int64_t i = 1; count && i <= list[0]; i++)                                                \
                            if (g->lanes > LANES_##NAME)                                                               \
                                channel_##NAME(2 * LANES_##NAME, g, count, seen, pixel, list[i], e);                   \
                            else                                                                                       \
                                channel_##NAME(LANES_##NAME, g, count, seen, pixel, list[i], e);                       \
                    }                                                                                                  \
                free(seen);                                                                                            \
            }                                                                                                          \
        }                                                                                                              \
        free(all);                                                                                                     \
    }

KERNELS(float, f32)
KERNELS(double, f64)
