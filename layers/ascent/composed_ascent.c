/* Dual ascent on the neurons that an example keeps (composed_ascent.py): its problems together, all iterations in
cache. With p = M v + N y + m, v in a box around 0, (p, y) in the hulls of the kept neurons, an iteration is
two products with M and two with N, which is strictly lower block triangular.

The same computation as LayerAscent's, neuron by neuron.  The file includes itself: its second half is there once for
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
#define SHARES(e) ((begin[(e) + 1] - begin[e] + SHARE - 1) / SHARE)
#define LEAST(a, b) ((a) < (b) ? (a) : (b))
#define ROUNDED(n) (((n) + LANES - 1) / LANES * LANES)
#define TILES(G) (((G) + ROWS - 1) / ROWS)
#define EVEN(G) (((G) + TILES(G) - 1) / TILES(G)) /* rows of a tile, as even as they go */
#define EACH(list) for (unsigned i = 0; i < sizeof list / sizeof *list; i++)
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

#define PADDING (BYTES / (int)sizeof(float)) /* rows are padded to a multiple, in either type */
#define EXPORT(name) const int64_t constant_##name = name; /* for Python */
EXPORT(PADDING)
EXPORT(SLOTS)

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

#include "composed_products.h"

/* What all threads are given, as `_SIGNATURES` of composed_ascent.py declares it; read only but for what is found.

Problems begin[e]..begin[e + 1] belong to example e. Of its K neurons, layer by layer from first[t] on, the first
count[e, t] of a layer are real. M[t] are rows for the inputs, for the first `direct` layers; rows[e, k] is a neuron's
among those of its layer. A layer reads none before back[t] and is read by none after ahead[t]. start [starts, R, K]:
weights. step, decay, floor and memories as `DualAscent` has them; threshold: NaN for none. A thread has room_size
numbers of `room`, SLOTS (13 k + 3 d) + 2 k^2 + 5 k where k is K rounded up, and 4 K + layers + 1 of `index`.
Found: weights and shares of the lower line [R, K], the point of the box around 0 [R, d]. */
typedef struct {
    int64_t E, R, K, d, layers, direct, starts, most, check_every, room_size;
    double step, decay, floor, tol, threshold, first_memory, second_memory, tiny;
    const int64_t *first, *count, *back, *ahead, *begin, *rows;
    const T *const *M, *radius, *N, *lines[5], *c_v, *c_y, *offset, *start;
    T *room;
    int64_t *index;
    T *w, *taken, *v;
    int64_t *iterations;
} NAME(Given);
const int64_t NAME(size_of_ascend) = sizeof(NAME(Given)); /* for Python, which lays the struct out too */

/* What a thread keeps of the example at hand, and of the problems that go side by side: [SLOTS, k] or [SLOTS, d]. */
typedef struct {
    const NAME(Given) *in;
    int64_t K, k, d, direct; /* neurons of the example, rounded up; inputs; neurons that may read them */
    int64_t *at, *first;     /* neurons among those of all examples, [K]; where each layer begins, [layers + 1] */
    const T *radius, **rows_of_M, **rows_of_N, **rows_of_NT;
    T *N, *NT, *m, *flat, *spread, *slope, *intercept;
    T *w, *best, *taken, *best_taken, *moment, *square, *A, *nu, *P, *mean, *y, *c_y, *other;
    T *v, *mean_v, *best_v;
    const T *c_v[SLOTS];
    T offset[SLOTS], value[SLOTS], along[SLOTS], bound[SLOTS], objective[SLOTS];
    int64_t problem[SLOTS], step[SLOTS];
    double decayed[SLOTS], first_left[SLOTS], second_left[SLOTS]; /* powers of decay and of both memories */
    T share[SLOTS], fix[SLOTS], by[SLOTS];                        /* rates of the iteration: `rates` in schedule.py */
} NAME(Group);

static void NAME(set_rates)(NAME(Group) *q, int64_t G) {
    const NAME(Given) *in = q->in;
    for (int64_t g = 0; g < G; g++) {
        const double n = (double)q->step[g] + 1;
        q->decayed[g] = n > 1 ? q->decayed[g] * in->decay : 1;
        q->first_left[g] = (n > 1 ? q->first_left[g] : 1) * in->first_memory;
        q->second_left[g] = (n > 1 ? q->second_left[g] : 1) * in->second_memory;
        q->share[g] = (T)(30 * n * n * n / ((n + 1) * (2 * n + 1) * (3 * n * n + 3 * n - 1)));
        q->fix[g] = (T)(1 / (1 - q->second_left[g]));
        q->by[g] = (T)(in->step * (q->decayed[g] > in->floor ? q->decayed[g] : in->floor) / (1 - q->first_left[g]));
    }
}

/* Coefficients of the slots' objectives pulled back through the lines: nu, those of the input in v, and constants. */
static void NAME(pull)(NAME(Group) *q, int64_t G, const T *weights) {
    const int64_t k = q->k;
    const T *start[SLOTS];
    memcpy(q->A, q->c_y, G * k * sizeof(T));
    for (int64_t g = 0; g < G; g++) q->value[g] = q->offset[g], start[g] = q->A + g * k;
    for (int64_t t = q->in->layers - 1; t >= 0; t--) {
        const int64_t from = q->first[t], to = q->first[t + 1], behind = q->first[q->in->back[t]];
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
        if (from < to && behind < from)
            NAME(combine)(G, to - from, q->nu + from, k, q->rows_of_N + from, behind / LANES * LANES, ROUNDED(from),
                          start, q->A, k);
    }
    NAME(combine)(G, q->direct, q->nu, k, q->rows_of_M, 0, q->d, q->c_v, q->v, q->d);
}

/* The corner v of the box with the least a.v in place of a; its share of the bound, the averages. */
static void NAME(corner)(NAME(Group) *q, int64_t g, T rate) {
    T *v = q->v + g * q->d, *mean = q->mean_v + g * q->d;
    const T *c = q->c_v[g], *radius = q->radius;
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

/* Values of a layer pushed on to the layers that read it. */
static void NAME(push)(const NAME(Group) *q, int64_t t, int64_t G, const T *y, T *p) {
    const int64_t k = q->k, from = q->first[t], to = q->first[t + 1], end = q->first[q->in->ahead[t] + 1];
    const T *start[SLOTS];
    if (from == to || to == end) return;
    for (int64_t g = 0; g < G; g++) start[g] = p + g * k;
    NAME(combine)(G, to - from, y + from, k, q->rows_of_NT + from, to / LANES * LANES, ROUNDED(end), start, p, k);
}

/* Values of a layer on the lines its coefficients took; averages; the step of Adam on its weights. */
static void NAME(forward)(NAME(Group) *q, int64_t t, int64_t g) {
    const NAME(Given) *in = q->in;
    const T share = q->share[g], fix = q->fix[g], by = q->by[g];
    const T b1 = 1 - (T)in->first_memory, b2 = (T)in->second_memory, c2 = 1 - (T)in->second_memory, least = (T)in->tiny;
    const T *p = q->P + g * q->k, *A = q->A + g * q->k;
    T *w = q->w + g * q->k, *y = q->y + g * q->k, *taken = q->taken + g * q->k;
    T *mo = q->moment + g * q->k, *sq = q->square + g * q->k;
    _Pragma("omp simd") for (int64_t i = q->first[t]; i < q->first[t + 1]; i++) {
        const T z = p[i] + q->m[i], a = A[i], up = a > 0 ? a : 0, weight = w[i];
        const T low = (q->flat[i] + q->spread[i] * weight) * z, high = q->intercept[i] + q->slope[i] * z;
        y[i] = a > 0 ? low : high;
        taken[i] += share * ((a > 0 ? (T)1 : (T)0) - taken[i]);
        const T slant = up * q->spread[i] * z;
        const T moment = mo[i] + b1 * (slant - mo[i]), square = b2 * sq[i] + c2 * slant * slant;
        mo[i] = moment, sq[i] = square;
        const T moved = weight + by * moment / (SQRT(square * fix) + least);
        w[i] = moved > 1 ? (T)1 : moved > 0 ? moved : (T)0;
    }
}

/* The averaged point pushed through the hulls: its objective. */
static T NAME(primal)(NAME(Group) *q, int64_t g) {
    const int64_t k = q->k;
    T *p = q->other, *y = q->other + k, sum = q->offset[g] + q->along[g];
    const T *taken = q->taken + g * k, *c = q->c_y + g * k;
    memcpy(p, q->mean + g * k, k * sizeof(T));
    for (int64_t t = 0; t < q->in->layers; t++) {
        for (int64_t i = q->first[t]; i < q->first[t + 1]; i++) {
            const T z = p[i] + q->m[i], a = q->flat[i] * z, b = (q->flat[i] + q->spread[i]) * z;
            const T low = a > b ? a : b, high = q->intercept[i] + q->slope[i] * z;
            y[i] = low + (1 - taken[i]) * (high - low);
            sum += c[i] * y[i];
        }
        NAME(push)(q, t, 1, y, p);
    }
    return sum;
}

/* An iteration of every slot. */
static void NAME(iterate)(NAME(Group) *q, int64_t G) {
    const int64_t k = q->k;
    NAME(set_rates)(q, G);
    NAME(pull)(q, G, q->w);
    for (int64_t g = 0; g < G; g++) NAME(corner)(q, g, q->share[g]);
    NAME(dots)(G, q->direct, q->d, q->v, q->d, q->rows_of_M, q->P, k);
    for (int64_t g = 0; g < G; g++) {
        const T share = q->share[g];
        T *mean = q->mean + g * k, *p = q->P + g * k;
        memset(p + q->direct, 0, (k - q->direct) * sizeof(T));
        for (int64_t i = 0; i < q->direct; i++) mean[i] += share * (p[i] - mean[i]);
        if (q->value[g] > q->bound[g]) {
            q->bound[g] = q->value[g];
            memcpy(q->best + g * k, q->w + g * k, q->K * sizeof(T));
        }
    }
    for (int64_t t = 0; t < q->in->layers; t++) {
        for (int64_t g = 0; g < G; g++) NAME(forward)(q, t, g);
        NAME(push)(q, t, G, q->y, q->P);
    }
}

/* Whether a slot's problem is finished; its primal point is looked at on the way. */
static int NAME(finished)(NAME(Group) *q, int64_t g) {
    const NAME(Given) *in = q->in;
    const int64_t step = q->step[g];
    if (step < in->most && step % in->check_every) return 0;
    const T objective = NAME(primal)(q, g);
    if (objective < q->objective[g]) {
        q->objective[g] = objective;
        memcpy(q->best_v + g * q->d, q->mean_v + g * q->d, q->d * sizeof(T));
        memcpy(q->best_taken + g * q->k, q->taken + g * q->k, q->K * sizeof(T));
    }
    const T bound = q->bound[g], size = ABS(bound) > 1 ? ABS(bound) : (T)1;
    const int decided = bound > (T)in->threshold || q->objective[g] <= (T)in->threshold;
    return step == in->most || decided || q->objective[g] - bound <= (T)in->tol * size;
}

#include "composed_slots.h"

/* Every problem to its end. */
void NAME(ascend)(const NAME(Given) *in, int64_t threads) {
    const int64_t *begin = in->begin, K = in->K;
    int64_t shares = 0, next = 0;
    for (int64_t e = 0; e < in->E; e++) shares += SHARES(e);
    _Pragma("omp parallel for num_threads(threads) if (shares > 1)")
    for (int64_t thread = 0; thread < threads; thread++) {
        NAME(Group) q = {.in = in};
        q.at = in->index + thread * (4 * K + in->layers + 1), q.first = q.at + K;
        q.rows_of_M = (const T **)(q.first + in->layers + 1), q.rows_of_N = q.rows_of_M + K, q.rows_of_NT = q.rows_of_N + K;
        int64_t e = 0, passed = 0, settled = -1, mine;
        while ((mine = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < shares) {
            while (mine >= passed + SHARES(e)) passed += SHARES(e), e++;
            if (settled != e) NAME(settle)(&q, settled = e, in->room + thread * in->room_size);
            int64_t pending = begin[e] + (mine - passed) * SHARE, G = 0;
            const int64_t end = LEAST(pending + SHARE, begin[e + 1]);
            while (pending < end || G > 0) {
                const int64_t more = LEAST(SLOTS - G, end - pending);
                if (more > 0) NAME(enter)(&q, G, G + more, pending);
                G += more, pending += more;
                NAME(iterate)(&q, G);
                /* The last slot has been looked at when it takes a place that becomes free. */
                for (int64_t g = G - 1; g >= 0; g--) {
                    if (NAME(finished)(&q, g)) NAME(leave)(&q, g), NAME(move)(&q, g, --G);
                    else q.step[g]++;
                }
            }
        }
    }
}

#endif
