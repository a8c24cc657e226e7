/* The products of an iteration, in tiles that stay in registers: for composed_ascent.c, once a floating type. */

/* out [rows, columns vectors] = start + x [rows, k] B, row i of B at of[i] + j. */
INLINE void NAME(combine_tile)(const int rows, const int columns, int64_t k, const T *x, int64_t apart,
                               const T *const *of, int64_t j, const T *const *start, T *out, int64_t wide) {
    V sum[ROWS][COLUMNS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int s = 0; s < columns; s++)
        sum[r][s] = *(const V *)(start[r] + j + s * LANES);
    for (int64_t i = 0; i < k; i++) {
        V b[COLUMNS];
        UNROLL for (int s = 0; s < columns; s++) b[s] = *(const V *)(of[i] + j + s * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            const T by = x[r * apart + i];
            UNROLL for (int s = 0; s < columns; s++) sum[r][s] += by * b[s];
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int s = 0; s < columns; s++)
        *(V *)(out + r * wide + j + s * LANES) = sum[r][s];
}

/* The rows of a tile are a constant where it counts. */
#define BY_ROWS(rows, CALL)                                                                                            \
    switch (rows) {                                                                                                    \
        case 1: CALL(1) break;                                                                                         \
        case 2: CALL(2) break;                                                                                         \
        case 3: CALL(3) break;                                                                                         \
        case 4: CALL(LEAST(ROWS, 4)) break;                                                                            \
        case 5: CALL(LEAST(ROWS, 5)) break;                                                                            \
        default: CALL(ROWS) break;                                                                                     \
    }

/* out [G, from..to) = start + x [G, k] B for columns from..to, multiples of LANES. */
static void NAME(combine)(int64_t G, int64_t k, const T *x, int64_t apart, const T *const *of, int64_t from, int64_t to,
                          const T *const *start, T *out, int64_t wide) {
    const int64_t even = EVEN(G);
    for (int64_t j = from; j < to;) {
        const int full = to - j >= COLUMNS * LANES;
        for (int64_t g = 0; g < G; g += even) {
            const int64_t rows = LEAST(G - g, even);
#define WIDE(r) NAME(combine_tile)(r, COLUMNS, k, x + g * apart, apart, of, j, start + g, out + g * wide, wide);
#define THIN(r) NAME(combine_tile)(r, 1, k, x + g * apart, apart, of, j, start + g, out + g * wide, wide);
            if (full) BY_ROWS(rows, WIDE)
            else BY_ROWS(rows, THIN)
#undef WIDE
#undef THIN
        }
        j += full ? COLUMNS * LANES : LANES;
    }
}

INLINE T NAME(total)(V x) {
    T sum = 0;
    for (int l = 0; l < LANES; l++) sum += x[l];
    return sum;
}

/* p [rows, columns] = x [rows, d] B^T, row i of B at of[i]. */
INLINE void NAME(dot_tile)(const int rows, const int columns, int64_t d, const T *x, int64_t apart, const T *const *of,
                           T *p, int64_t wide) {
    V sum[ROWS][COLUMNS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int s = 0; s < columns; s++) sum[r][s] = (V){0};
    for (int64_t j = 0; j < d; j += LANES) {
        V b[COLUMNS];
        UNROLL for (int s = 0; s < columns; s++) b[s] = *(const V *)(of[s] + j);
        UNROLL for (int r = 0; r < rows; r++) {
            const V by = *(const V *)(x + r * apart + j);
            UNROLL for (int s = 0; s < columns; s++) sum[r][s] += by * b[s];
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int s = 0; s < columns; s++)
        p[r * wide + s] = NAME(total)(sum[r][s]);
}

/* p [G, k] = x [G, d] B^T. */
static void NAME(dots)(int64_t G, int64_t k, int64_t d, const T *x, int64_t apart, const T *const *of, T *p,
                       int64_t wide) {
    const int64_t even = EVEN(G);
    for (int64_t i = 0; i < k;) {
        const int full = k - i >= COLUMNS;
        for (int64_t g = 0; g < G; g += even) {
            const int64_t rows = LEAST(G - g, even);
#define WIDE(r) NAME(dot_tile)(r, COLUMNS, d, x + g * apart, apart, of + i, p + g * wide + i, wide);
#define THIN(r) NAME(dot_tile)(r, 1, d, x + g * apart, apart, of + i, p + g * wide + i, wide);
            if (full) BY_ROWS(rows, WIDE)
            else BY_ROWS(rows, THIN)
#undef WIDE
#undef THIN
        }
        i += full ? COLUMNS : 1;
    }
}
