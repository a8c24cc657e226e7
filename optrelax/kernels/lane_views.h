/* Rows of one place side by side (lane_step.py): what `window_step.c` does, a vector or two of rows at once. Included
by lane_products.c and lane_lines.c.

A block holds rows that see the same windows: [high, wide, channels, lanes]. So a number of a weight or of a line is the
same for all lanes, and a neuron whose lines are 0, as those of a ReLU that never fires, is left out of every product: on
both sides of a convolution, forward and back. Lists say which channels a pixel of a map keeps: [examples, high, wide,
1 + channels], their count and then themselves. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef __clang__
#pragma GCC optimize("fp-contract=fast") /* -std=c11 would keep products and sums apart */
#endif

#ifdef __AVX512F__
#define BYTES 64
#else
#define BYTES 32
#endif

#define EXPORT(name) const int64_t constant_##name = name; /* for Python */
EXPORT(BYTES)

#define INLINE static inline __attribute__((always_inline))

/* A map, and the windows of it that blocks see. */
typedef struct {
    int64_t rows, columns, channels, high, wide, step_y, step_x, offset_y, offset_x;
    const int32_t *list;
} View;

static const int32_t none[1] = {0};

/* Every channel, where there is no list. */
static int32_t *all_channels(int64_t c) {
    int32_t *found = malloc((c + 1) * sizeof(int32_t));
    found[0] = c;
    for (int64_t i = 0; i < c; i++) found[i + 1] = i;
    return found;
}

INLINE const int32_t *listed(const View *v, const int32_t *all, int64_t example, int64_t y, int64_t x) {
    if (!v->list) return all;
    if (y < 0 || y >= v->high || x < 0 || x >= v->wide) return none;
    return v->list + ((example * v->high + y) * v->wide + x) * (v->channels + 1);
}

INLINE int64_t top_of(const View *v, const int64_t *place) { return place[1] * v->step_y + v->offset_y; }
INLINE int64_t left_of(const View *v, const int64_t *place) { return place[2] * v->step_x + v->offset_x; }

/* Pixels of the map that some of these blocks see. */
static void box_of(const View *v, const int64_t *place, int64_t from, int64_t to, int64_t box[4]) {
    for (int64_t b = from; b < to; b++) {
        const int64_t y = top_of(v, place + 3 * b), x = left_of(v, place + 3 * b);
        if (b == from || y < box[0]) box[0] = y;
        if (b == from || x < box[1]) box[1] = x;
        if (b == from || y + v->rows > box[2]) box[2] = y + v->rows;
        if (b == from || x + v->columns > box[3]) box[3] = x + v->columns;
    }
}

INLINE int64_t last_of(const int64_t *place, int64_t from, int64_t blocks) {
    int64_t to = from + 1;
    while (to < blocks && place[3 * to] == place[3 * from]) to++;
    return to;
}

INLINE int64_t same_place(const int64_t *place, int64_t from, int64_t blocks) {
    int64_t to = from + 1;
    while (to < blocks && !memcmp(place + 3 * to, place + 3 * from, 3 * sizeof(int64_t))) to++;
    return to;
}

#define VIEW(name) int64_t name##_high, name##_wide, name##_step_y, name##_step_x, name##_offset_y, name##_offset_x;

#define VECTORS(T, NAME)                                                                                               \
    typedef T vec_##NAME __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));                           \
    enum { LANES_##NAME = BYTES / sizeof(T) };

VECTORS(float, f32)
VECTORS(double, f64)
