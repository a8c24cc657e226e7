/* Blocks through the transpose of a convolution, and its gradients (lane_step.py, lane_views.h). */

#include "lane_views.h"

#ifdef __AVX512F__
#define WIDTH 8 /* with two vectors, 16 of 32 registers; as many addresses as there are registers for */
#else
#define WIDTH 5 /* 10 of 16 */
#endif
#define SQUARE 4

#define KERNELS(T, NAME)                                                                                               \
    typedef struct {                                                                                                   \
        int64_t blocks, lanes, high, wide, out, rows, columns, in, kh, kw, step_y, step_x, apart, top, left;           \
        VIEW(from) VIEW(to)                                                                                            \
        const int32_t *kept_from, *kept_to;                                                                            \
        const int64_t *place;                                                                                          \
        const T *a, *given, *weight;                                                                                   \
        T *found;                                                                                                      \
    } Convolution_##NAME;                                                                                              \
    const int64_t size_of_push_##NAME = sizeof(Convolution_##NAME), size_of_pull_##NAME = sizeof(Convolution_##NAME),  \
                  size_of_outer_##NAME = sizeof(Convolution_##NAME);                                                   \
                                                                                                                       \
    INLINE View from_##NAME(const Convolution_##NAME *g) {                                                             \
        return (View){g->high, g->wide, g->out, g->from_high, g->from_wide, g->from_step_y, g->from_step_x,            \
                      g->from_offset_y, g->from_offset_x, g->kept_from};                                               \
    }                                                                                                                  \
    INLINE View to_##NAME(const Convolution_##NAME *g) {                                                               \
        return (View){g->rows, g->columns, g->in, g->to_high, g->to_wide, g->to_step_y, g->to_step_x, g->to_offset_y,  \
                      g->to_offset_x, g->kept_to};                                                                     \
    }                                                                                                                  \
                                                                                                                       \
    /* A pixel that is read: where its block holds it, the channels it keeps, and their rows of a matrix. */           \
    typedef struct {                                                                                                   \
        int64_t at;                                                                                                    \
        const T *weight;                                                                                               \
        const int32_t *list;                                                                                           \
    } Term_##NAME;                                                                                                     \
                                                                                                                       \
    INLINE void tile_##NAME(const int count, const int vectors, int64_t terms, const Term_##NAME *term, int64_t width, \
                            const int32_t *channel, const T *block, T *to) {                                           \
        enum { L = LANES_##NAME };                                                                                     \
        vec_##NAME sum[WIDTH][2];                                                                                      \
        int64_t at[WIDTH];                                                                                             \
        for (int o = 0; o < count; o++) {                                                                              \
            at[o] = channel[o];                                                                                        \
            for (int v = 0; v < vectors; v++) sum[o][v] = (vec_##NAME){0};                                             \
        }                                                                                                              \
        for (int64_t t = 0; t < terms; t++) {                                                                          \
            const T *a = block + term[t].at, *weight = term[t].weight;                                                 \
            for (const int32_t *c = term[t].list + 1, *end = c + term[t].list[0]; c < end; c++) {                      \
                const T *row = weight + *c * width;                                                                    \
                const vec_##NAME *from = (const vec_##NAME *)(a + *c * (int64_t)(vectors * L));                        \
                vec_##NAME some[2];                                                                                    \
                for (int v = 0; v < vectors; v++) some[v] = from[v];                                                   \
                for (int o = 0; o < count; o++)                                                                        \
                    for (int v = 0; v < vectors; v++) sum[o][v] += row[at[o]] * some[v];                               \
            }                                                                                                          \
        }                                                                                                              \
        for (int o = 0; o < count; o++)                                                                                \
            for (int v = 0; v < vectors; v++) *(vec_##NAME *)(to + (at[o] * vectors + v) * L) = sum[o][v];             \
    }                                                                                                                  \
                                                                                                                       \
    INLINE void tiles_##NAME(const int vectors, int64_t terms, const Term_##NAME *term, int64_t width,                 \
                             const int32_t *list, const T *block, T *to) {                                             \
        const int64_t n = list[0], parts = (n + WIDTH - 1) / WIDTH;                                                    \
        for (int64_t i = 0, done = 0; i < parts; i++) {                                                                \
            const int64_t some = (n - done + parts - i - 1) / (parts - i); /* even parts */                            \
            const int32_t *channel = list + 1 + done;                                                                  \
            done += some;                                                                                              \
            switch (some) {                                                                                            \
                case 8: tile_##NAME(8 % (WIDTH + 1), vectors, terms, term, width, channel, block, to); break;          \
                case 7: tile_##NAME(7 % (WIDTH + 1), vectors, terms, term, width, channel, block, to); break;          \
                case 6: tile_##NAME(6 % (WIDTH + 1), vectors, terms, term, width, channel, block, to); break;          \
                case 5: tile_##NAME(5, vectors, terms, term, width, channel, block, to); break;                        \
                case 4: tile_##NAME(4, vectors, terms, term, width, channel, block, to); break;                        \
                case 3: tile_##NAME(3, vectors, terms, term, width, channel, block, to); break;                        \
                case 2: tile_##NAME(2, vectors, terms, term, width, channel, block, to); break;                        \
                case 1: tile_##NAME(1, vectors, terms, term, width, channel, block, to); break;                        \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    INLINE void sums_##NAME(int64_t vectors, int64_t terms, const Term_##NAME *term, int64_t width,                    \
                            const int32_t *list, const T *block, T *to) {                                              \
        if (vectors == 2)                                                                                              \
            tiles_##NAME(2, terms, term, width, list, block, to);                                                      \
        else                                                                                                           \
            tiles_##NAME(1, terms, term, width, list, block, to);                                                      \
    }                                                                                                                  \
                                                                                                                       \
    /* The transpose of a convolution: a [blocks, high, wide, out, lanes], weight [kh, kw, out, in] -> found [blocks,  \
       rows, columns, in, lanes], the part of the image from (top, left) on; channels that a list leaves out are not   \
       written. */                                                                                                     \
    void push_##NAME(const Convolution_##NAME *g, int64_t threads) {                                                   \
        const View from = from_##NAME(g), to = to_##NAME(g);                                                           \
        const int64_t lanes = g->lanes, size = g->high * g->wide * g->out * lanes;                                     \
        const int64_t row = g->columns * g->in * lanes, image = g->rows * row;                                         \
        int32_t *all_from = all_channels(g->out), *all_to = all_channels(g->in);                                       \
        _Pragma("omp parallel num_threads(threads)") {                                                                 \
            Term_##NAME *term = malloc(g->kh * g->kw * sizeof(Term_##NAME));                                           \
            for (int64_t b = 0, last; b < g->blocks; b = last) {                                                       \
                const int64_t *place = g->place + 3 * b, y0 = top_of(&from, place), x0 = left_of(&from, place);        \
                last = same_place(g->place, b, g->blocks);                                                             \
                _Pragma("omp for schedule(dynamic, 1) nowait") for (int64_t r = 0; r < g->rows; r++)                   \
                    for (int64_t x = 0; x < g->columns; x++) {                                                         \
                        const int32_t *list =                                                                          \
                            listed(&to, all_to, place[0], top_of(&to, place) + r, left_of(&to, place) + x);            \
                        int64_t terms = 0;                                                                             \
                        if (!list[0]) continue;                                                                        \
                        for (int64_t k = 0; k < g->kh; k++) {                                                          \
                            const int64_t high = r + g->top - k * g->apart, y = high / g->step_y;                      \
                            if (high < 0 || high % g->step_y || y >= g->high) continue;                                \
                            for (int64_t j = 0; j < g->kw; j++) {                                                      \
                                const int64_t wide = x + g->left - j, z = wide / g->step_x;                            \
                                if (wide < 0 || wide % g->step_x || z >= g->wide) continue;                            \
                                const int32_t *kept = listed(&from, all_from, place[0], y0 + y, x0 + z);               \
                                if (!kept[0]) continue;                                                                \
                                term[terms++] = (Term_##NAME){(y * g->wide + z) * g->out * lanes,                      \
                                                              g->weight + (k * g->kw + j) * g->out * g->in, kept};     \
                            }                                                                                          \
                        }                                                                                              \
                        for (int64_t i = b; i < last; i++)                                                             \
                            sums_##NAME(lanes / LANES_##NAME, terms, term, g->in, list, g->a + i * size,               \
                                        g->found + i * image + r * row + x * g->in * lanes);                           \
                    }                                                                                                  \
            }                                                                                                          \
            free(term);                                                                                                \
        }                                                                                                              \
        free(all_from), free(all_to);                                                                                  \
    }                                                                                                                  \
                                                                                                                       \
    /* Its gradient in a: given as found there, weight [kh, kw, in, out] -> found as a there. */                       \
    void pull_##NAME(const Convolution_##NAME *g, int64_t threads) {                                                   \
        const View from = from_##NAME(g), to = to_##NAME(g);                                                           \
        const int64_t lanes = g->lanes, size = g->rows * g->columns * g->in * lanes;                                   \
        const int64_t row = g->wide * g->out * lanes, image = g->high * row;                                           \
        int32_t *all_from = all_channels(g->out), *all_to = all_channels(g->in);                                       \
        _Pragma("omp parallel num_threads(threads)") {                                                                 \
            Term_##NAME *term = malloc(g->kh * g->kw * sizeof(Term_##NAME));                                           \
            for (int64_t b = 0, last; b < g->blocks; b = last) {                                                       \
                const int64_t *place = g->place + 3 * b, y0 = top_of(&to, place), x0 = left_of(&to, place);            \
                last = same_place(g->place, b, g->blocks);                                                             \
                _Pragma("omp for schedule(dynamic, 1) nowait") for (int64_t y = 0; y < g->high; y++)                   \
                    for (int64_t x = 0; x < g->wide; x++) {                                                            \
                        const int32_t *list =                                                                          \
                            listed(&from, all_from, place[0], top_of(&from, place) + y, left_of(&from, place) + x);    \
                        int64_t terms = 0;                                                                             \
                        if (!list[0]) continue;                                                                        \
                        for (int64_t k = 0; k < g->kh; k++) {                                                          \
                            const int64_t r = y * g->step_y + k * g->apart - g->top;                                   \
                            if (r < 0 || r >= g->rows) continue;                                                       \
                            for (int64_t j = 0; j < g->kw; j++) {                                                      \
                                const int64_t z = x * g->step_x + j - g->left;                                         \
                                if (z < 0 || z >= g->columns) continue;                                                \
                                const int32_t *kept = listed(&to, all_to, place[0], y0 + r, x0 + z);                   \
                                if (!kept[0]) continue;                                                                \
                                term[terms++] = (Term_##NAME){(r * g->columns + z) * g->in * lanes,                    \
                                                              g->weight + (k * g->kw + j) * g->out * g->in, kept};     \
                            }                                                                                          \
                        }                                                                                              \
                        for (int64_t i = b; i < last; i++)                                                             \
                            sums_##NAME(lanes / LANES_##NAME, terms, term, g->out, list, g->given + i * size,          \
                                        g->found + i * image + y * row + x * g->out * lanes);                          \
                    }                                                                                                  \
            }                                                                                                          \
            free(term);                                                                                                \
        }                                                                                                              \
        free(all_from), free(all_to);                                                                                  \
    }                                                                                                                  \
                                                                                                                       \
    INLINE void square_##NAME(const int high, const int wide, const int vectors, int64_t count, const T *const *a,     \
                              const T *const *given, int64_t shift, const int32_t *from, const int32_t *to,            \
                              int64_t width, T *sums) {                                                                \
        enum { L = LANES_##NAME };                                                                                     \
        vec_##NAME sum[SQUARE][SQUARE];                                                                                \
        int64_t left[SQUARE], right[SQUARE];                                                                           \
        for (int i = 0; i < high; i++) left[i] = from[i] * (int64_t)(vectors * L);                                     \
        for (int j = 0; j < wide; j++) right[j] = shift + to[j] * (int64_t)(vectors * L);                              \
        for (int i = 0; i < high; i++)                                                                                 \
            for (int j = 0; j < wide; j++) sum[i][j] = (vec_##NAME){0};                                                \
        for (int64_t m = 0; m < count; m++)                                                                            \
            for (int v = 0; v < vectors; v++) {                                                                        \
                vec_##NAME some[SQUARE];                                                                               \
                for (int j = 0; j < wide; j++) some[j] = *(const vec_##NAME *)(given[m] + right[j] + v * L);           \
                for (int i = 0; i < high; i++) {                                                                       \
                    const vec_##NAME one = *(const vec_##NAME *)(a[m] + left[i] + v * L);                              \
                    for (int j = 0; j < wide; j++) sum[i][j] += one * some[j];                                         \
                }                                                                                                      \
            }                                                                                                          \
        for (int i = 0; i < high; i++)                                                                                 \
            for (int j = 0; j < wide; j++)                                                                             \
                *(vec_##NAME *)(sums + (from[i] * width + to[j]) * L) += sum[i][j];                                    \
    }                                                                                                                  \
                                                                                                                       \
    INLINE void strip_##NAME(const int high, const int vectors, int64_t count, const T *const *a,                      \
                             const T *const *given, int64_t shift, const int32_t *from, const int32_t *list,           \
                             int64_t width, T *sums) {                                                                 \
        const int32_t *to = list + 1, *end = to + list[0];                                                             \
        for (; to + SQUARE <= end; to += SQUARE)                                                                       \
            square_##NAME(high, SQUARE, vectors, count, a, given, shift, from, to, width, sums);                       \
        switch (end - to) {                                                                                            \
            case 3: square_##NAME(high, 3, vectors, count, a, given, shift, from, to, width, sums); break;             \
            case 2: square_##NAME(high, 2, vectors, count, a, given, shift, from, to, width, sums); break;             \
            case 1: square_##NAME(high, 1, vectors, count, a, given, shift, from, to, width, sums); break;             \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    INLINE void strips_##NAME(const int vectors, int64_t count, const T *const *a, const T *const *given,              \
                              int64_t shift, const int32_t *kept, const int32_t *list, int64_t width, T *sums) {       \
        const int32_t *c = kept + 1, *end = c + kept[0];                                                               \
        for (; c + SQUARE <= end; c += SQUARE)                                                                         \
            strip_##NAME(SQUARE, vectors, count, a, given, shift, c, list, width, sums);                               \
        switch (end - c) {                                                                                             \
            case 3: strip_##NAME(3, vectors, count, a, given, shift, c, list, width, sums); break;                     \
            case 2: strip_##NAME(2, vectors, count, a, given, shift, c, list, width, sums); break;                     \
            case 1: strip_##NAME(1, vectors, count, a, given, shift, c, list, width, sums); break;                     \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* Its gradient in the weight, summed over blocks: found [threads, kh, kw, out, in, lanes of a vector], added up.  \
       The blocks that see a pixel share its lists, and are summed before anything is written. */                      \
    void outer_##NAME(const Convolution_##NAME *g, int64_t threads) {                                                  \
        const View from = from_##NAME(g), to = to_##NAME(g);                                                           \
        const int64_t lanes = g->lanes, weight = g->out * g->in * LANES_##NAME;                                        \
        int32_t *all_from = all_channels(g->out), *all_to = all_channels(g->in);                                       \
        for (int64_t first = 0, last; first < g->blocks; first = last) {                                               \
            const int64_t example = g->place[3 * first];                                                               \
            int64_t box[4];                                                                                            \
            last = last_of(g->place, first, g->blocks);                                                                \
            box_of(&from, g->place, first, last, box);                                                                 \
            _Pragma("omp parallel for schedule(static, 1) num_threads(threads)") for (int64_t t = 0; t < threads; t++) {\
                const T **a = malloc((last - first) * sizeof(T *)), **given = malloc((last - first) * sizeof(T *));    \
                for (int64_t y = box[0] + t; y < box[2]; y += threads)                                                 \
                    for (int64_t x = box[1]; x < box[3]; x++) {                                                        \
                        const int32_t *kept = listed(&from, all_from, example, y, x);                                  \
                        int64_t count = 0, one = 0, down = 0, right = 0;                                               \
                        for (int64_t b = first; kept[0] && b < last; b++) {                                            \
                            const int64_t r = y - top_of(&from, g->place + 3 * b);                                     \
                            const int64_t z = x - left_of(&from, g->place + 3 * b);                                    \
                            if (r < 0 || r >= g->high || z < 0 || z >= g->wide) continue;                              \
                            one = b, down = r * g->step_y - g->top, right = z * g->step_x - g->left;                   \
                            a[count] = g->a + ((b * g->high + r) * g->wide + z) * g->out * lanes;                      \
                            given[count++] = g->given + ((b * g->rows + down) * g->columns + right) * g->in * lanes;   \
                        }                                                                                              \
                        /* A part of the image is cut out for whole images alone, which all blocks see alike. */       \
                        for (int64_t k = 0; count && k < g->kh * g->kw; k++) {                                         \
                            const int64_t i = k / g->kw * g->apart, j = k % g->kw, *place = g->place + 3 * one;        \
                            if (down + i < 0 || down + i >= g->rows || right + j < 0 || right + j >= g->columns) continue;\
                            const int32_t *list = listed(&to, all_to, example, top_of(&to, place) + down + i,          \
                                                         left_of(&to, place) + right + j);                             \
                            const int64_t shift = (i * g->columns + j) * g->in * lanes;                                \
                            T *sums = g->found + (t * g->kh * g->kw + k) * weight;                                     \
                            if (!list[0]) continue;                                                                    \
                            if (lanes > LANES_##NAME)                                                                  \
                                strips_##NAME(2, count, a, given, shift, kept, list, g->in, sums);                     \
                            else                                                                                       \
                                strips_##NAME(1, count, a, given, shift, kept, list, g->in, sums);                     \
                        }                                                                                              \
                    }                                                                                                  \
                free(a), free(given);                                                                                  \
            }                                                                                                          \
        }                                                                                                              \
        free(all_from), free(all_to);                                                                                  \
    }

KERNELS(float, f32)
KERNELS(double, f64)
