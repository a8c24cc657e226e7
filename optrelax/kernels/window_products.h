/* Products with the weights of a convolution, and of matrices: included by window_step.c.

A pixel's coefficients times the weights of one row of the kernel are a run of kw * in numbers next to each other in the
image: tiles of a few pixels by a few vectors stay in registers while the channels are summed. */

#ifdef __AVX512F__
#define BYTES 64
#define TILE 8 /* pixels: with three vectors, 24 of 32 registers */
#else
#define BYTES 32
#define TILE 4 /* 12 of 16 */
#endif

#define TOGETHER 32 /* rows that read a group of a matrix's columns while these stay in the first cache */

#define INLINE static inline __attribute__((always_inline))

#define PRODUCTS(T, NAME)                                                                                              \
                                                                                                                       \
    typedef T vec_##NAME __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));                           \
                                                                                                                       \
    INLINE void tile_##NAME(const int pixels, const int vectors, int64_t terms, int64_t out, int64_t pixel,            \
                            int64_t step, int64_t x, int64_t shift, int64_t width, const T *const *a,                  \
                            const T *const *weight, T *image) {                                                        \
        const int lanes = BYTES / sizeof(T);                                                                           \
        vec_##NAME sum[TILE][3];                                                                                       \
        for (int p = 0; p < pixels; p++)                                                                               \
            for (int v = 0; v < vectors; v++) sum[p][v] = (vec_##NAME){0};                                             \
        for (int64_t t = 0; t < terms; t++) {                                                                          \
            const T *from = a[t] + x * pixel, *w = weight[t] + shift;                                                  \
            for (int64_t c = 0; c < out; c++, w += width)                                                              \
                for (int v = 0; v < vectors; v++) {                                                                    \
                    const vec_##NAME some = *(const vec_##NAME *)(w + v * lanes);                                      \
                    for (int p = 0; p < pixels; p++) sum[p][v] += from[p * pixel + c] * some;                          \
                }                                                                                                      \
        }                                                                                                              \
        image += x * step + shift;                                                                                     \
        for (int p = 0; p < pixels; p++) /* one pixel's run overlaps the next one's */                                 \
            for (int v = 0; v < vectors; v++) *(vec_##NAME *)(image + p * step + v * lanes) += sum[p][v];              \
    }                                                                                                                  \
                                                                                                                       \
    INLINE void run_##NAME(const int vectors, int64_t wide, int64_t terms, int64_t out, int64_t pixel, int64_t step,   \
                           int64_t shift, int64_t width, const T *const *a, const T *const *w, T *image) {             \
        int64_t x = 0;                                                                                                 \
        for (; x + TILE <= wide; x += TILE)                                                                            \
            tile_##NAME(TILE, vectors, terms, out, pixel, step, x, shift, width, a, w, image);                         \
        switch (wide - x) {                                                                                            \
            case 7: tile_##NAME(7 % TILE, vectors, terms, out, pixel, step, x, shift, width, a, w, image); break;      \
            case 6: tile_##NAME(6 % TILE, vectors, terms, out, pixel, step, x, shift, width, a, w, image); break;      \
            case 5: tile_##NAME(5 % TILE, vectors, terms, out, pixel, step, x, shift, width, a, w, image); break;      \
            case 4: tile_##NAME(4 % TILE, vectors, terms, out, pixel, step, x, shift, width, a, w, image); break;      \
            case 3: tile_##NAME(3, vectors, terms, out, pixel, step, x, shift, width, a, w, image); break;             \
            case 2: tile_##NAME(2, vectors, terms, out, pixel, step, x, shift, width, a, w, image); break;             \
            case 1: tile_##NAME(1, vectors, terms, out, pixel, step, x, shift, width, a, w, image); break;             \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* a [n, k] times w [k, m]: found [n, m]. */                                                                       \
    void multiply_##NAME(int64_t n, int64_t k, int64_t m, const T *a, const T *w, T *found, int64_t threads) {         \
        const int64_t lanes = BYTES / sizeof(T), vectors = (m + lanes - 1) / lanes, width = vectors * lanes;           \
        T *packed = width > m ? calloc(k * width, sizeof(T)) : 0;                                                      \
        for (int64_t r = 0; packed && r < k; r++) memcpy(packed + r * width, w + r * m, m * sizeof(T));                \
        const T *weight = packed ? packed : w;                                                                         \
        _Pragma("omp parallel num_threads(threads) if (n * m > FEW)") {                                                \
            T *own = packed ? malloc(TOGETHER * width * sizeof(T)) : 0;                                                \
            _Pragma("omp for") for (int64_t i = 0; i < n; i += TOGETHER) {                                             \
                const int64_t rows = i + TOGETHER < n ? TOGETHER : n - i;                                              \
                const T *from = a + i * k;                                                                             \
                T *to = own ? own : found + i * m;                                                                     \
                memset(to, 0, rows * width * sizeof(T));                                                               \
                for (int64_t v = 0, some; v < vectors; v += some) {                                                    \
                    some = vectors - v == 4 || vectors - v == 2 ? 2 : vectors - v == 1 ? 1 : 3;                        \
                    if (some == 1)                                                                                     \
                        run_##NAME(1, rows, 1, k, k, width, v * lanes, width, &from, &weight, to);                     \
                    else if (some == 2)                                                                                \
                        run_##NAME(2, rows, 1, k, k, width, v * lanes, width, &from, &weight, to);                     \
                    else                                                                                               \
                        run_##NAME(3, rows, 1, k, k, width, v * lanes, width, &from, &weight, to);                     \
                }                                                                                                      \
                for (int64_t r = 0; own && r < rows; r++)                                                              \
                    memcpy(found + (i + r) * m, own + r * width, m * sizeof(T));                                       \
            }                                                                                                          \
            free(own);                                                                                                 \
        }                                                                                                              \
        free(packed);                                                                                                  \
    }                                                                                                                  \
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
                        run_##NAME(1, wide, terms, out, out, step_x * in, v * lanes, width, rows, w, image);           \
                    else if (some == 2)                                                                                \
                        run_##NAME(2, wide, terms, out, out, step_x * in, v * lanes, width, rows, w, image);           \
                    else                                                                                               \
                        run_##NAME(3, wide, terms, out, out, step_x * in, v * lanes, width, rows, w, image);           \
                }                                                                                                      \
                memcpy(found + i * fw * in, image + left * in, fw * in * sizeof(T));                                   \
            }                                                                                                          \
            free(image), free(rows), free(w);                                                                          \
        }                                                                                                              \
        free(packed);                                                                                                  \
    }                                                                                                                  \
                                                                                                                       \
    /* outs rows of the weight times vectors of the run, summed over the pixels of one image: both stay in registers. */\
    INLINE void outer_##NAME(const int outs, const int vectors, int64_t high, int64_t wide, int64_t out, int64_t down, \
                             int64_t step, int64_t width, const T *a, const T *image, T *to) {                         \
        const int lanes = BYTES / sizeof(T);                                                                           \
        vec_##NAME sum[TILE][3];                                                                                       \
        for (int o = 0; o < outs; o++)                                                                                 \
            for (int v = 0; v < vectors; v++) sum[o][v] = *(vec_##NAME *)(to + o * width + v * lanes);                 \
        for (int64_t y = 0; y < high; y++)                                                                             \
            for (int64_t x = 0; x < wide; x++) {                                                                       \
                const T *from = a + (y * wide + x) * out, *row = image + y * down + x * step;                          \
                for (int v = 0; v < vectors; v++) {                                                                    \
                    const vec_##NAME some = *(const vec_##NAME *)(row + v * lanes);                                    \
                    for (int o = 0; o < outs; o++) sum[o][v] += from[o] * some;                                        \
                }                                                                                                      \
            }                                                                                                          \
        for (int o = 0; o < outs; o++)                                                                                 \
            for (int v = 0; v < vectors; v++) *(vec_##NAME *)(to + o * width + v * lanes) = sum[o][v];                 \
    }                                                                                                                  \
                                                                                                                       \
    INLINE void outers_##NAME(const int vectors, int64_t high, int64_t wide, int64_t out, int64_t down, int64_t step,  \
                              int64_t width, const T *a, const T *image, T *to) {                                      \
        int64_t o = 0;                                                                                                 \
        for (; o + TILE <= out; o += TILE)                                                                             \
            outer_##NAME(TILE, vectors, high, wide, out, down, step, width, a + o, image, to + o * width);             \
        for (; o < out; o++) outer_##NAME(1, vectors, high, wide, out, down, step, width, a + o, image, to + o * width);\
    }                                                                                                                  \
                                                                                                                       \
    /* Gradients of `spread`, sizes as there: grad [n, fh, fw, in], turned [kh, kw * in, out] -> to_a as a, and        \
       to_weight [kh, out, kw * in], added up; a null pointer: not wanted. */                                          \
    void back_##NAME(int64_t n, int64_t high, int64_t wide, int64_t out, int64_t in, int64_t kh, int64_t kw,           \
                     int64_t step_y, int64_t step_x, int64_t apart, int64_t top, int64_t left, int64_t fh, int64_t fw, \
                     const T *a, const T *grad, const T *turned, T *to_a, T *to_weight, int64_t threads) {             \
        const int64_t lanes = BYTES / sizeof(T), run = kw * in, vectors = (run + lanes - 1) / lanes;                   \
        const int64_t width = vectors * lanes, row = ((wide - 1) * step_x + kw) * in;                                  \
        const int64_t rows = (high - 1) * step_y + apart * (kh - 1) + 1, count = (out + lanes - 1) / lanes;            \
        const int64_t padded = count * lanes;                                                                          \
        T *packed = calloc(kh * run * padded, sizeof(T));                                                              \
        for (int64_t r = 0; r < kh * run; r++) memcpy(packed + r * padded, turned + r * out, out * sizeof(T));         \
        _Pragma("omp parallel num_threads(threads) if (n * fh * fw * in > FEW)") {                                     \
            T *image = calloc(rows * row + width, sizeof(T)), *line = malloc(wide * padded * sizeof(T));               \
            T *own = to_weight ? calloc(kh * out * width, sizeof(T)) : 0;                                              \
            const T **from = malloc(kh * sizeof(T *)), **w = malloc(kh * sizeof(T *));                                 \
            _Pragma("omp for") for (int64_t i = 0; i < n; i++) {                                                       \
                const T *rows_a = a + i * high * wide * out;                                                           \
                for (int64_t y = 0; y < fh; y++)                                                                       \
                    memcpy(image + (y + top) * row + left * in, grad + (i * fh + y) * fw * in, fw * in * sizeof(T));   \
                for (int64_t k = 0; to_weight && k < kh; k++)                                                          \
                    for (int64_t v = 0, some; v < vectors; v += some) {                                                \
                        const T *at = image + k * apart * row + v * lanes;                                             \
                        T *to = own + k * out * width + v * lanes;                                                     \
                        some = vectors - v == 4 || vectors - v == 2 ? 2 : vectors - v == 1 ? 1 : 3;                    \
                        if (some == 1)                                                                                 \
                            outers_##NAME(1, high, wide, out, step_y * row, step_x * in, width, rows_a, at, to);       \
                        else if (some == 2)                                                                            \
                            outers_##NAME(2, high, wide, out, step_y * row, step_x * in, width, rows_a, at, to);       \
                        else                                                                                           \
                            outers_##NAME(3, high, wide, out, step_y * row, step_x * in, width, rows_a, at, to);       \
                    }                                                                                                  \
                for (int64_t y = 0; to_a && y < high; y++) {                                                           \
                    for (int64_t k = 0; k < kh; k++)                                                                   \
                        from[k] = image + (y * step_y + k * apart) * row, w[k] = packed + k * run * padded;            \
                    memset(line, 0, wide * padded * sizeof(T));                                                        \
                    for (int64_t v = 0, some; v < count; v += some) {                                                  \
                        some = count - v == 4 || count - v == 2 ? 2 : count - v == 1 ? 1 : 3;                          \
                        if (some == 1)                                                                                 \
                            run_##NAME(1, wide, kh, run, step_x * in, padded, v * lanes, padded, from, w, line);       \
                        else if (some == 2)                                                                            \
                            run_##NAME(2, wide, kh, run, step_x * in, padded, v * lanes, padded, from, w, line);       \
                        else                                                                                           \
                            run_##NAME(3, wide, kh, run, step_x * in, padded, v * lanes, padded, from, w, line);       \
                    }                                                                                                  \
                    T *to = to_a + (i * high + y) * wide * out;                                                        \
                    for (int64_t x = 0; x < wide; x++) memcpy(to + x * out, line + x * padded, out * sizeof(T));       \
                }                                                                                                      \
            }                                                                                                          \
            if (own)                                                                                                   \
                _Pragma("omp critical") for (int64_t r = 0; r < kh * out; r++)                                         \
                    for (int64_t j = 0; j < run; j++) to_weight[r * run + j] += own[r * width + j];                    \
            free(image), free(line), free(own), free(from), free(w);                                                   \
        }                                                                                                              \
        free(packed);                                                                                                  \
    }
