/* Dual ascent on LPs whose stable neurons are composed away (composed_ascent.py): an example's problems together, all
iterations in cache. With p = M v + N y + m, v in a box around 0, (p, y) in the hulls of the crossing neurons, an iteration is
two products with M and two with N, which is strictly lower block triangular.

The same computation as DenseAscent's, neuron by neuron.  The file includes itself: its second half is there once for
each floating type. */

#ifndef T

#include <math.h>
#include <stdint.h>
#include <string.h>

/* A product and its sum in one instruction: with -std=c11 a compiler leaves them apart unless told. */
#pragma GCC optimize("fp-contract=fast")

#ifdef __AVX512F__
#define BYTES 64 /* of a vector */
#define ROWS 6
#define COLUMNS 4
#else
#define BYTES 32
#define ROWS 3
#define COLUMNS 3
#endif
#define LANES ((int64_t)(BYTES / sizeof(T)))
#define SLOTS 12  /* problems of an example that go side by side */
#define SHARE 48  /* problems that one thread takes at a time */
#define LEAST(a, b) ((a) < (b) ? (a) : (b))
#define ROUNDED(n) (((n) + LANES - 1) / LANES * LANES)
#define TILES(G) (((G) + ROWS - 1) / ROWS)
#define EVEN(G) (((G) + TILES(G) - 1) / TILES(G)) /* rows of a tile, as even as they go */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

#define T float
#define V V32
#define NAME(f) f##_f32
#define COPYSIGN copysignf
#define SQRT sqrtf
#define ABS fabsf
typedef float V32 __attribute__((vector_size(BYTES), aligned(4), may_alias));
#include "composed_ascent.c"
#undef T
#undef V
#undef NAME
#undef COPYSIGN
#undef SQRT
#undef ABS

#define T double
#define V V64
#define NAME(f) f##_f64
#define COPYSIGN copysign
#define SQRT sqrt
#define ABS fabs
typedef double V64 __attribute__((vector_size(BYTES), aligned(8), may_alias));
#include "composed_ascent.c"

#else

/* out [rows, columns vectors] = start + x [rows, k] B, row i of B at of[i] + j. */
INLINE void NAME(combine_tile)(const int rows, const int columns, int64_t k, const T *x, int64_t apart, const T *const *of,
                               int64_t j, const T *const *start, T *out, int64_t wide) {
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
static void NAME(dots)(int64_t G, int64_t k, int64_t d, const T *x, int64_t apart, const T *const *of, T *p, int64_t wide) {
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

/* Numbers of room that a thread needs: of K neurons and d inputs. */
int64_t NAME(room)(int64_t K, int64_t d) {
    const int64_t k = ROUNDED(K);
    return SLOTS * (14 * k + 3 * d) + 2 * k * k + 5 * k + LANES;
}

/* What a thread keeps of the example at hand, and of the problems that go side by side: [SLOTS, k] or [SLOTS, d]. */
typedef struct {
    int64_t K, k, d, layers;
    const T *radius;
    const int64_t *first; /* where each layer begins among the example's own neurons, [layers + 1] */
    const int64_t *back, *ahead; /* first layer that a layer reads and last one that reads it; itself for none */
    int64_t direct; /* neurons that may read the input: those of the first layers */
    T *N, *NT, *m, *flat, *spread, *slope, *intercept;
    T *w, *best, *taken, *best_taken, *moment, *square, *A, *nu, *P, *mean, *y, *c_y, *other, *zero;
    T *v, *mean_v, *best_v;
    const T *c_v[SLOTS];
    T offset[SLOTS], value[SLOTS], along[SLOTS], bound[SLOTS], objective[SLOTS];
    int64_t problem[SLOTS], step[SLOTS];
} NAME(Group);

/* Coefficients of a slot's objective pulled back through the lines: nu, and its constant into `value`. */
static void NAME(pull)(NAME(Group) *q, int64_t G, const T *weights, const T *const *rows_of_N, const T *const *rows_of_M) {
    const int64_t k = q->k, d = q->d;
    const T *start[SLOTS];
    memcpy(q->A, q->c_y, G * k * sizeof(T));
    for (int64_t g = 0; g < G; g++) q->value[g] = q->offset[g], start[g] = q->A + g * k;
    for (int64_t t = q->layers - 1; t >= 0; t--) {
        const int64_t from = q->first[t], to = q->first[t + 1];
        if (from == to) continue;
        for (int64_t g = 0; g < G; g++) {
            const T *A = q->A + g * k, *w = weights + g * k;
            T *nu = q->nu + g * k, sum = 0;
            _Pragma("omp simd reduction(+ : sum)") for (int64_t i = from; i < to; i++) {
                const T a = A[i], up = a > 0 ? a : 0, down = a - up;
                const T x = up * (q->flat[i] + q->spread[i] * w[i]) + down * q->slope[i];
                nu[i] = x;
                sum += down * q->intercept[i] + x * q->m[i];
            }
            q->value[g] += sum;
        }
        /* Other columns of these rows of N are 0. */
        const int64_t behind = q->first[q->back[t]];
        if (behind < from)
            NAME(combine)(G, to - from, q->nu + from, k, rows_of_N + from, behind / LANES * LANES, ROUNDED(from), start, q->A, k);
    }
    NAME(combine)(G, q->direct, q->nu, k, rows_of_M, 0, d, q->c_v, q->v, d);
}

/* The corner v of the box with the least a.v in place of a; its share of the bound, the averages. */
static void NAME(corner)(NAME(Group) *q, int64_t g, T rate) {
    const T *radius = q->radius;
    T *v = q->v + g * q->d, *mean = q->mean_v + g * q->d;
    const T *c = q->c_v[g];
    T sum = 0, along = 0;
    _Pragma("omp simd reduction(+ : sum, along)") for (int64_t j = 0; j < q->d; j++) {
        const T a = v[j], x = -COPYSIGN(radius[j], a);
        sum += a * x;
        along += c[j] * x;
        v[j] = x;
        mean[j] += rate * (x - mean[j]);
    }
    q->value[g] += sum;
    q->along[g] += rate * (along - q->along[g]);
}

/* The averaged point pushed through the hulls: its objective. */
static T NAME(primal)(NAME(Group) *q, int64_t g, const T *const *rows_of_NT) {
    const int64_t k = q->k;
    T *p = q->other, *y = q->other + k;
    const T *mean = q->mean + g * k, *taken = q->taken + g * k, *c = q->c_y + g * k, *start = p;
    T sum = q->offset[g] + q->along[g];
    memcpy(p, mean, k * sizeof(T));
    for (int64_t t = 0; t < q->layers; t++) {
        const int64_t from = q->first[t], to = q->first[t + 1];
        for (int64_t i = from; i < to; i++) {
            const T z = p[i] + q->m[i], a = q->flat[i] * z, b = (q->flat[i] + q->spread[i]) * z;
            const T low = a > b ? a : b, high = q->intercept[i] + q->slope[i] * z;
            y[i] = low + (1 - taken[i]) * (high - low);
            sum += c[i] * y[i];
        }
        const int64_t end = q->first[q->ahead[t] + 1];
        if (from < to && to < end)
            NAME(combine)(1, to - from, y + from, k, rows_of_NT + from, to / LANES * LANES, ROUNDED(end), &start, p, k);
    }
    return sum;
}

/* Problems r, r + 1, ... into the slots from..to, each with the best of its starts. */
static void NAME(enter)(NAME(Group) *q, int64_t from, int64_t to, int64_t r, int64_t R, int64_t K, const int64_t *at,
                        const T *c_v, const T *c_y, const T *offset, int64_t starts, const T *start,
                        const T *const *rows_of_N, const T *const *rows_of_M) {
    const int64_t k = q->k, d = q->d, n = to - from;
    T *const small[] = {q->taken, q->best_taken, q->moment, q->square, q->mean, q->w, q->best, q->c_y};
    for (unsigned i = 0; i < sizeof small / sizeof *small; i++) memset(small[i] + from * k, 0, n * k * sizeof(T));
    memset(q->mean_v + from * d, 0, n * d * sizeof(T)), memset(q->best_v + from * d, 0, n * d * sizeof(T));
    for (int64_t g = from; g < to; g++) {
        const int64_t p = r + g - from;
        q->problem[g] = p, q->step[g] = 0, q->c_v[g] = c_v + p * d, q->offset[g] = offset[p];
        q->along[g] = 0, q->bound[g] = -INFINITY, q->objective[g] = INFINITY;
        for (int64_t i = 0; i < q->K; i++) q->c_y[g * k + i] = c_y[p * K + at[i]], q->w[g * k + i] = start[p * K + at[i]];
    }
    /* The same work on these slots alone. */
    NAME(Group) these = *q;
    these.A += from * k, these.nu += from * k, these.c_y += from * k, these.v += from * d;
    memcpy(these.c_v, q->c_v + from, n * sizeof *q->c_v), memcpy(these.offset, q->offset + from, n * sizeof(T));
    for (int64_t s = 0; s < starts && starts > 1; s++) {
        const T *w = s ? q->other : q->w + from * k;
        for (int64_t g = 0; s && g < n; g++)
            for (int64_t i = 0; i < q->K; i++) q->other[g * k + i] = start[(s * R + r + g) * K + at[i]];
        NAME(pull)(&these, n, w, rows_of_N, rows_of_M);
        for (int64_t g = 0; g < n; g++) {
            T bound = these.value[g];
            const T *a = these.v + g * d;
            _Pragma("omp simd reduction(+ : bound)") for (int64_t j = 0; j < d; j++) bound -= q->radius[j] * ABS(a[j]);
            if (s > 0 && bound > q->value[from + g]) memcpy(q->w + (from + g) * k, w + g * k, q->K * sizeof(T));
            if (s == 0 || bound > q->value[from + g]) q->value[from + g] = bound;
        }
    }
    memcpy(q->best + from * k, q->w + from * k, n * k * sizeof(T));
}

/* One slot in place of another. */
static void NAME(move)(NAME(Group) *q, int64_t to, int64_t from) {
    if (to == from) return;
    const int64_t k = q->k, d = q->d;
    T *const small[] = {q->w, q->best, q->taken, q->best_taken, q->moment, q->square, q->mean, q->c_y};
    for (unsigned i = 0; i < sizeof small / sizeof *small; i++) memcpy(small[i] + to * k, small[i] + from * k, k * sizeof(T));
    T *const large[] = {q->mean_v, q->best_v};
    for (unsigned i = 0; i < sizeof large / sizeof *large; i++) memcpy(large[i] + to * d, large[i] + from * d, d * sizeof(T));
    q->c_v[to] = q->c_v[from], q->offset[to] = q->offset[from], q->along[to] = q->along[from];
    q->bound[to] = q->bound[from], q->objective[to] = q->objective[from];
    q->problem[to] = q->problem[from], q->step[to] = q->step[from];
}

/* Problems begin[e]..begin[e + 1] belong to example e. Of its K neurons, layer by layer from first[t] on, the
first count[e, t] of a layer are real; M[e, k] is the address of a neuron's row, for the first `direct` layers; a layer
reads none before back[t] and is read by none after ahead[t]. rates [3, most + 1]: share of the averages, correction of the second moment, and
step, iteration by iteration; threshold: NaN for none. Found: weights and shares of the upper line [R, K], the point of the box around 0 [R, d]. */
void NAME(ascend)(int64_t E, int64_t R, int64_t K, int64_t d, int64_t layers, const int64_t *first, const int64_t *count,
                  const int64_t *back, const int64_t *ahead, int64_t direct, const T *const *M, const T *radius, const T *N, const T *m, const T *flat, const T *spread, const T *slope, const T *intercept,
                  const int64_t *begin, const T *c_v, const T *c_y, const T *offset, int64_t starts,
                  const T *start, int64_t most, int64_t check_every, const T *rates, double tol, double threshold,
                  double first_memory, double second_memory, double tiny, int64_t room_size, T *room, int64_t *index,
                  T *w, T *taken, T *v, int64_t *iterations, int64_t threads) {
    int64_t shares = 0, next = 0;
    for (int64_t e = 0; e < E; e++) shares += (begin[e + 1] - begin[e] + SHARE - 1) / SHARE;
    const T *average = rates, *correction = rates + most + 1, *size = rates + 2 * (most + 1);
    const T b1 = (T)(1 - first_memory), b2 = (T)second_memory, c2 = (T)(1 - second_memory), least = (T)tiny;
    _Pragma("omp parallel for num_threads(threads) if (shares > 1)") for (int64_t thread = 0; thread < threads; thread++) {
        NAME(Group) q;
        const int64_t own = K + layers + 1; /* of a thread in `index`, beside three rows of pointers */
        int64_t *at = index + thread * (own + 3 * K), *begins = at + K;
        const T **rows_of_M = (const T **)(at + own), **rows_of_N = rows_of_M + K, **rows_of_NT = rows_of_N + K;
        T *base = room + thread * room_size;
        int64_t e = 0, passed = 0, of = -1;
        for (;;) {
            const int64_t mine = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (mine >= shares) break;
            for (;; e++) {
                const int64_t here = (begin[e + 1] - begin[e] + SHARE - 1) / SHARE;
                if (mine < passed + here) break;
                passed += here;
            }
            int64_t pending = begin[e] + (mine - passed) * SHARE;
            const int64_t end = LEAST(pending + SHARE, begin[e + 1]);
            if (of != e) {
                of = e;
                q.layers = layers, q.d = d, q.back = back, q.ahead = ahead, q.radius = radius + e * d, q.first = begins, q.K = 0;
                for (int64_t t = 0; t < layers; t++) {
                    begins[t] = q.K;
                    for (int64_t i = 0; i < count[e * layers + t]; i++) at[q.K++] = first[t] + i;
                }
                begins[layers] = q.K, q.k = ROUNDED(q.K), q.direct = begins[direct];
                const int64_t k = q.k;
                T *to = base;
                T **const large[] = {&q.v, &q.mean_v, &q.best_v};
                T **const small[] = {&q.w,  &q.best, &q.taken, &q.best_taken, &q.moment, &q.square, &q.A,
                                     &q.nu, &q.P,    &q.mean,  &q.y,          &q.c_y,    &q.other};
                for (unsigned i = 0; i < sizeof large / sizeof *large; i++) *large[i] = to, to += SLOTS * d;
                for (unsigned i = 0; i < sizeof small / sizeof *small; i++) *small[i] = to, to += SLOTS * k;
                T **const alone[] = {&q.m, &q.flat, &q.spread, &q.slope, &q.intercept};
                const T *const given[] = {m, flat, spread, slope, intercept};
                for (unsigned i = 0; i < sizeof alone / sizeof *alone; i++, to += k) {
                    *alone[i] = to;
                    for (int64_t j = 0; j < q.K; j++) to[j] = given[i][e * K + at[j]];
                }
                q.N = to, to += k * k, q.NT = to;
                memset(q.N, 0, 2 * k * k * sizeof(T));
                for (int64_t i = 0; i < q.direct; i++) rows_of_M[i] = M[e * K + at[i]];
                for (int64_t i = 0; i < q.K; i++) {
                    rows_of_N[i] = q.N + i * k, rows_of_NT[i] = q.NT + i * k;
                }
                for (int64_t t = 1; t < layers; t++)
                    for (int64_t i = begins[t]; i < begins[t + 1]; i++)
                        for (int64_t j = 0; j < begins[t]; j++)
                            q.N[i * k + j] = q.NT[j * k + i] = N[(e * K + at[i]) * K + at[j]];
            }
            const int64_t k = q.k;
            int64_t G = 0;
            while (pending < end || G > 0) {
                const int64_t more = LEAST(SLOTS - G, end - pending);
                if (more > 0) NAME(enter)(&q, G, G + more, pending, R, K, at, c_v, c_y, offset, starts, start, rows_of_N, rows_of_M);
                G += more, pending += more;
                NAME(pull)(&q, G, q.w, rows_of_N, rows_of_M);
                for (int64_t g = 0; g < G; g++) NAME(corner)(&q, g, average[q.step[g]]);
                NAME(dots)(G, q.direct, d, q.v, d, rows_of_M, q.P, k);
                for (int64_t g = 0; g < G; g++) {
                    const T share = average[q.step[g]];
                    T *mean = q.mean + g * k, *p = q.P + g * k;
                    memset(p + q.direct, 0, (k - q.direct) * sizeof(T));
                    for (int64_t i = 0; i < q.direct; i++) mean[i] += share * (p[i] - mean[i]);
                    if (q.value[g] > q.bound[g]) {
                        q.bound[g] = q.value[g];
                        memcpy(q.best + g * k, q.w + g * k, q.K * sizeof(T));
                    }
                }
                for (int64_t t = 0; t < layers; t++) {
                    const int64_t from = begins[t], to = begins[t + 1];
                    const T *onward[SLOTS];
                    for (int64_t g = 0; g < G; g++) {
                        const T share = average[q.step[g]], fix = correction[q.step[g]], by = size[q.step[g]];
                        const T *p = q.P + g * k, *A = q.A + g * k;
                        T *wg = q.w + g * k, *y = q.y + g * k, *tk = q.taken + g * k, *mo = q.moment + g * k;
                        T *sq = q.square + g * k;
                        onward[g] = p;
                        _Pragma("omp simd") for (int64_t i = from; i < to; i++) {
                            const T z = p[i] + q.m[i], a = A[i], up = a > 0 ? a : 0, weight = wg[i];
                            const T low = (q.flat[i] + q.spread[i] * weight) * z, high = q.intercept[i] + q.slope[i] * z;
                            y[i] = a > 0 ? low : high;
                            tk[i] += share * ((a > 0 ? (T)1 : (T)0) - tk[i]);
                            const T slant = up * q.spread[i] * z;
                            const T moment = mo[i] + b1 * (slant - mo[i]), square = b2 * sq[i] + c2 * slant * slant;
                            mo[i] = moment, sq[i] = square;
                            const T moved = weight + by * moment / (SQRT(square * fix) + least);
                            wg[i] = moved > 1 ? (T)1 : moved > 0 ? moved : (T)0;
                        }
                    }
                    const int64_t onto = begins[ahead[t] + 1];
                    if (from < to && to < onto)
                        NAME(combine)(G, to - from, q.y + from, k, rows_of_NT + from, to / LANES * LANES, ROUNDED(onto), onward, q.P, k);
                }
                for (int64_t g = G - 1; g >= 0; g--) {
                    const int64_t step = q.step[g]++, r = q.problem[g];
                    if (step < most && step % check_every) continue;
                    const T objective = NAME(primal)(&q, g, rows_of_NT);
                    if (objective < q.objective[g]) {
                        q.objective[g] = objective;
                        memcpy(q.best_v + g * d, q.mean_v + g * d, d * sizeof(T));
                        memcpy(q.best_taken + g * k, q.taken + g * k, q.K * sizeof(T));
                    }
                    const T bound = q.bound[g], gap = q.objective[g] - bound, high = ABS(bound) > 1 ? ABS(bound) : (T)1;
                    const int decided = bound > (T)threshold || q.objective[g] <= (T)threshold;
                    if (step < most && !(gap <= (T)tol * high) && !decided) continue;
                    iterations[r] = step;
                    memcpy(v + r * d, q.best_v + g * d, d * sizeof(T));
                    for (int64_t i = 0; i < q.K; i++) {
                        w[r * K + at[i]] = q.best[g * k + i];
                        taken[r * K + at[i]] = q.best_taken[g * k + i];
                    }
                    NAME(move)(&q, g, --G);
                }
            }
        }
    }
}

#endif
