/* Least values of rows over a Euclidean or an l1 ball cut by a box (ball_support.py), of both signs of a row in one go.

Of every row the best split |a| = p + q is found, p bounded by the ball and q by the box: by one number, its price. In
l2 it is t: coordinate j moves by min(t |a_j|, room_j) radii and p_j = min(|a_j|, room_j / t). In l1 it is the
coefficient at which the radius is spent: p_j = min(|a_j|, price). Whatever the price, p is a split, so that
eps * length + held is no less than the fall. Coefficients of l2 are scaled by a power of two, which rounds nothing.

Rows a [batch or 1, k, n] (shared: 1); caps and rooms [batch, 2, n]: how far each coordinate may fall, and rise, as it
is and in radii; sides: 1, or 2 with the negatives of the rows; results [sides, batch, k]. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define FEW 16384  /* entries below which threads cost more than they save */
#define ROUNDS 128 /* of Newton's method: each settles one coordinate at least, and most rows take under eight */

#define HALVES 8    /* of a range of coefficients, before the few that are left are looked at one by one */

#define INLINE static inline __attribute__((always_inline))
#define LESS(a, b) ((a) < (b) ? (a) : (b))
#define SIZE(x) ((x) < 0 ? -(x) : (x))

#define KERNELS(T, NAME, LIMIT, SMALLEST)                                                                              \
                                                                                                                       \
    /* A power of two near the greatest coefficient that moves; NaN where one is infinite. */                          \
    INLINE T scale_##NAME(int64_t n, const T *a, const T *falls, const T *rises) {                                     \
        T most = 0;                                                                                                    \
        _Pragma("omp simd reduction(max : most)") for (int64_t j = 0; j < n; j++) {                                    \
            const T room = a[j] > 0 ? falls[j] : rises[j], size = room > 0 ? SIZE(a[j]) : 0;                           \
            most = size > most ? size : most;                                                                          \
        }                                                                                                              \
        if (!(most * 0 == 0)) return (T)NAN;                                                                           \
        int exponent;                                                                                                  \
        frexp(most, &exponent);                                                                                        \
        const int inner = exponent < SMALLEST ? SMALLEST : exponent;                                                   \
        return most > 0 ? (T)ldexp(1.0, LESS(inner, -SMALLEST)) : 1;                                                   \
    }                                                                                                                  \
                                                                                                                       \
    /* t of l2: sum min(t^2 size^2, room^2) = 1 by Newton's method from the left, infinite where all reach their ends. \
    Beyond LIMIT squares are lost below the normal range: all reach their ends, which is a bound too. */               \
    INLINE T price2_##NAME(int64_t n, const T *a, const T *falls, const T *rises, T scale, T *squares, T *ends) {      \
        const T by = 1 / scale;                                                                                        \
        T total = 0;                                                                                                   \
        _Pragma("omp simd reduction(+ : total)") for (int64_t j = 0; j < n; j++) {                                     \
            const T room = a[j] > 0 ? falls[j] : rises[j], size = room > 0 ? a[j] * by : 0;                            \
            squares[j] = size * size;                                                                                  \
            ends[j] = room * room;                                                                                     \
            total += size * size;                                                                                      \
        }                                                                                                              \
        T found = total > 0 ? 1 / total : 1;                                                                           \
        for (int round = 0; round < ROUNDS && found < LIMIT; round++) {                                                \
            T slope = 0, held = 0;                                                                                     \
            _Pragma("omp simd reduction(+ : slope, held)") for (int64_t j = 0; j < n; j++) {                           \
                const int free_ = found * squares[j] < ends[j];                                                        \
                slope += free_ ? squares[j] : 0;                                                                       \
                held += free_ || squares[j] == 0 ? 0 : ends[j];                                                        \
            }                                                                                                          \
            if (!(slope > 0)) return (T)INFINITY;                                                                      \
            const T next = (held < 1 ? 1 - held : 0) / slope;                                                          \
            if (!(next > found)) break;                                                                                \
            found = next;                                                                                              \
        }                                                                                                              \
        return found < LIMIT ? (T)sqrt(found) : (T)INFINITY;                                                           \
    }                                                                                                                  \
                                                                                                                       \
    /* The price of l1: the greatest coefficient such that those from it on spend the radius, 0 where all do not; by   \
    halves of their range, then among the few that are left. left: of the radius, for those of just that size. */      \
    INLINE T price1_##NAME(int64_t n, const T *a, const T *falls, const T *rises, T *sizes, T *rooms, T *left) {       \
        T high = 0, low = 0, spent = 0; /* by all that are greater than `high` */                                      \
        _Pragma("omp simd reduction(max : high)") for (int64_t j = 0; j < n; j++) {                                    \
            const T room = a[j] > 0 ? falls[j] : rises[j], size = room > 0 ? SIZE(a[j]) : 0;                           \
            sizes[j] = size, rooms[j] = room;                                                                          \
            high = size > high ? size : high;                                                                          \
        }                                                                                                              \
        for (int halves = 0; halves < HALVES; halves++) {                                                              \
            const T middle = low + (high - low) / 2;                                                                   \
            T above = 0;                                                                                               \
            _Pragma("omp simd reduction(+ : above)") for (int64_t j = 0; j < n; j++) above +=                          \
                sizes[j] > middle ? rooms[j] : 0;                                                                      \
            if (above >= 1) low = middle;                                                                              \
            else high = middle, spent = above;                                                                         \
        }                                                                                                              \
        int64_t begin = 0, end = 0;                                                                                    \
        for (int64_t j = 0; j < n; j++)                                                                                \
            if (sizes[j] > low && sizes[j] <= high) sizes[end] = sizes[j], rooms[end++] = rooms[j];                    \
        while (begin < end) {                                                                                          \
            const T x = sizes[begin], y = sizes[(begin + end) / 2], z = sizes[end - 1];                                \
            const T low = LESS(x, y), high = x < y ? y : x, pivot = z < low ? low : LESS(z, high);                     \
            T above = 0, equal = 0;                                                                                    \
            for (int64_t j = begin; j < end; j++) {                                                                    \
                above += sizes[j] > pivot ? rooms[j] : 0;                                                              \
                equal += sizes[j] == pivot ? rooms[j] : 0;                                                             \
            }                                                                                                          \
            const int greater = spent + above >= 1;                                                                    \
            if (!greater && spent + above + equal >= 1) {                                                              \
                *left = 1 - spent - above;                                                                             \
                return pivot;                                                                                          \
            }                                                                                                          \
            int64_t kept = begin;                                                                                      \
            for (int64_t j = begin; j < end; j++) {                                                                    \
                const T size = sizes[j], room = rooms[j];                                                              \
                sizes[kept] = size, rooms[kept] = room;                                                                \
                kept += greater ? size > pivot : size < pivot;                                                         \
            }                                                                                                          \
            end = kept;                                                                                                \
            if (!greater) spent += above + equal;                                                                      \
        }                                                                                                              \
        *left = 0;                                                                                                     \
        return 0;                                                                                                      \
    }                                                                                                                  \
                                                                                                                       \
    /* Values of rows at the middle, the dual norm of p, and what the box bounds of them. */                           \
    void split_##NAME(int64_t batch, int64_t k, int64_t n, int64_t norm, int64_t shared, int64_t sides, const T *a,    \
                      const T *x, const T *caps, const T *rooms, T *middle, T *length, T *held, T *price, T *unit,     \
                      int64_t threads) {                                                                               \
        _Pragma("omp parallel num_threads(threads) if (batch * k * n > FEW)") {                                        \
            T *one = malloc((n + 1) * sizeof(T)), *two = malloc((n + 1) * sizeof(T));                                  \
            _Pragma("omp for") for (int64_t r = 0; r < batch * k; r++) {                                               \
                const int64_t b = r / k;                                                                               \
                const T *row = a + (shared ? r % k : r) * n, *center = x + b * n;                                      \
                T sum = 0;                                                                                             \
                _Pragma("omp simd reduction(+ : sum)") for (int64_t j = 0; j < n; j++) sum += row[j] * center[j];      \
                middle[r] = sum;                                                                                       \
                for (int64_t side = 0; side < sides; side++) {                                                         \
                    const int64_t at = side * batch * k + r;                                                           \
                    const T *falls = rooms + (2 * b + side) * n, *rises = rooms + (2 * b + 1 - side) * n;              \
                    const T *down = caps + (2 * b + side) * n, *up = caps + (2 * b + 1 - side) * n;                    \
                    T whole = 0, part = 0;                                                                             \
                    if (norm == 2) {                                                                                   \
                        const T scale = scale_##NAME(n, row, falls, rises), by = 1 / scale;                            \
                        const T t = price2_##NAME(n, row, falls, rises, scale, one, two), back = 1 / t;                \
                        _Pragma("omp simd reduction(+ : whole, part)") for (int64_t j = 0; j < n; j++) {               \
                            const T size = SIZE(row[j]), room = row[j] > 0 ? falls[j] : rises[j];                      \
                            const T most = room * back, p = LESS(size * by, most), q = size - p * scale;               \
                            whole += p * p;                                                                            \
                            part += (q > 0 ? q : 0) * (row[j] > 0 ? down[j] : up[j]);                                  \
                        }                                                                                              \
                        whole = scale * (T)sqrt(whole);                                                                \
                        price[at] = t, unit[at] = scale;                                                               \
                    } else {                                                                                           \
                        const T level = price1_##NAME(n, row, falls, rises, one, two, unit + at);                      \
                        _Pragma("omp simd reduction(+ : part)") for (int64_t j = 0; j < n; j++) {                      \
                            const T q = SIZE(row[j]) - level;                                                          \
                            part += (q > 0 ? q : 0) * (row[j] > 0 ? down[j] : up[j]);                                  \
                        }                                                                                              \
                        whole = price[at] = level;                                                                     \
                    }                                                                                                  \
                    length[at] = whole, held[at] = part;                                                               \
                }                                                                                                      \
            }                                                                                                          \
            free(one), free(two);                                                                                      \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* How far each coordinate moves, in radii. */                                                                     \
    INLINE void moves_##NAME(int64_t n, int64_t norm, const T *a, const T *falls, const T *rises, T price, T unit,     \
                             T *moves) {                                                                               \
        if (norm == 2) {                                                                                               \
            const T by = 1 / unit;                                                                                     \
            _Pragma("omp simd") for (int64_t j = 0; j < n; j++) {                                                      \
                const T room = a[j] > 0 ? falls[j] : rises[j], step = price * (SIZE(a[j]) * by);                       \
                moves[j] = LESS(step, room);                                                                           \
            }                                                                                                          \
            return;                                                                                                    \
        }                                                                                                              \
        _Pragma("omp simd") for (int64_t j = 0; j < n; j++)                                                            \
            moves[j] = SIZE(a[j]) > price ? (a[j] > 0 ? falls[j] : rises[j]) : 0;                                      \
        for (int64_t j = 0; j < n && unit > 0; j++) {                                                                  \
            if (SIZE(a[j]) != price) continue;                                                                         \
            const T room = a[j] > 0 ? falls[j] : rises[j];                                                             \
            moves[j] = LESS(room, unit);                                                                               \
            unit -= moves[j];                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* The gradient of one row of one example in its coefficients: the points it takes, added to `to`. */              \
    INLINE void points_##NAME(int64_t batch, int64_t k, int64_t n, int64_t norm, int64_t sides, int64_t r,             \
                              const T *row, const T *center, const T *rooms, const T *eps, const T *price,             \
                              const T *unit, const T *grad, T *moves, T *to) {                                         \
        const int64_t b = r / k;                                                                                       \
        for (int64_t side = 0; side < sides; side++) {                                                                 \
            const int64_t at = side * batch * k + r;                                                                   \
            const T *falls = rooms + (2 * b + side) * n, *rises = rooms + (2 * b + 1 - side) * n;                      \
            const T g = grad[at], far = (side ? -eps[b] : eps[b]) * g;                                                 \
            if (g == 0) continue;                                                                                      \
            moves_##NAME(n, norm, row, falls, rises, price[at], unit[at], moves);                                      \
            _Pragma("omp simd") for (int64_t j = 0; j < n; j++) {                                                      \
                const T sign = row[j] > 0 ? far : row[j] < 0 ? -far : 0;                                               \
                to[j] += g * center[j] - sign * moves[j];                                                              \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* In rows of each example's own. */                                                                               \
    void points_of_rows_##NAME(int64_t batch, int64_t k, int64_t n, int64_t norm, int64_t shared, int64_t sides,       \
                               const T *a, const T *x, const T *rooms, const T *eps, const T *price, const T *unit,    \
                               const T *grad, T *to_a, int64_t threads) {                                              \
        _Pragma("omp parallel num_threads(threads) if (batch * k * n > FEW)") {                                        \
            T *moves = malloc((n + 1) * sizeof(T));                                                                    \
            _Pragma("omp for") for (int64_t r = 0; r < batch * k; r++) {                                               \
                memset(to_a + r * n, 0, n * sizeof(T));                                                                \
                points_##NAME(batch, k, n, norm, sides, r, a + (shared ? r % k : r) * n, x + r / k * n, rooms, eps,    \
                              price, unit, grad, moves, to_a + r * n);                                                 \
            }                                                                                                          \
            free(moves);                                                                                               \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* In rows that all examples share. */                                                                             \
    void points_shared_##NAME(int64_t batch, int64_t k, int64_t n, int64_t norm, int64_t sides, const T *a,            \
                              const T *x, const T *rooms, const T *eps, const T *price, const T *unit, const T *grad,  \
                              T *to_a, int64_t threads) {                                                              \
        _Pragma("omp parallel num_threads(threads) if (batch * k * n > FEW)") {                                        \
            T *moves = malloc((n + 1) * sizeof(T));                                                                    \
            _Pragma("omp for") for (int64_t i = 0; i < k; i++) {                                                       \
                memset(to_a + i * n, 0, n * sizeof(T));                                                                \
                for (int64_t b = 0; b < batch; b++)                                                                    \
                    points_##NAME(batch, k, n, norm, sides, b * k + i, a + i * n, x + b * n, rooms, eps, price, unit,  \
                                  grad, moves, to_a + i * n);                                                          \
            }                                                                                                          \
            free(moves);                                                                                               \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* In the middle, the signed p, and in the lower and upper ends of the box, the signed rest. */                    \
    void ends_##NAME(int64_t batch, int64_t k, int64_t n, int64_t norm, int64_t shared, int64_t sides, const T *a,     \
                     const T *rooms, const T *price, const T *unit, const T *grad, T *to_x, T *to_lower, T *to_upper,  \
                     int64_t threads) {                                                                                \
        _Pragma("omp parallel for num_threads(threads) if (batch * k * n > FEW)") for (int64_t b = 0; b < batch;       \
                                                                                       b++) {                          \
            T *tx = to_x + b * n, *tl = to_lower + b * n, *tu = to_upper + b * n;                                      \
            memset(tx, 0, n * sizeof(T)), memset(tl, 0, n * sizeof(T)), memset(tu, 0, n * sizeof(T));                  \
            for (int64_t i = 0; i < k * sides; i++) {                                                                  \
                const int64_t side = i / k, r = b * k + i % k, at = side * batch * k + r;                              \
                const T *row = a + (shared ? i % k : r) * n, g = grad[at], scale = norm == 2 ? unit[at] : 1;           \
                const T *falls = rooms + (2 * b + side) * n, *rises = rooms + (2 * b + 1 - side) * n;                  \
                const T by = 1 / scale, back = norm == 2 ? 1 / price[at] : 0, level = price[at];                       \
                _Pragma("omp simd") for (int64_t j = 0; j < n; j++) {                                                  \
                    const T size = SIZE(row[j]), room = row[j] > 0 ? falls[j] : rises[j];                              \
                    const T most = room * back, fine = scale * LESS(size * by, most), flat = LESS(size, level);        \
                    const T p = norm == 2 ? fine : flat, sign = row[j] > 0 ? g : row[j] < 0 ? -g : 0;                  \
                    const T rest = size > p ? sign * (size - p) : 0;                                                   \
                    const int falling = (row[j] > 0) != side;                                                          \
                    tx[j] += sign * p;                                                                                 \
                    tl[j] += falling ? rest : 0;                                                                       \
                    tu[j] += falling ? 0 : rest;                                                                       \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

KERNELS(float, f32, 0x1p120f, -125)
KERNELS(double, f64, 0x1p1000, -1021)
