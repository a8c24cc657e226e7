/* The dual simplex method for min c.x, A x <= b, E x = d, l <= x <= u, whose matrix K = [A; E] a batch shares.

   The variables are x and the rows' values r = K x. A tableau T writes the basic ones by the others, basic = T outside,
   and its last row the costs, z = d . outside: n columns, whatever the basis. Every variable stands between finite ends,
   infinite ones moved beyond what the rows allow, so that any basis is dual feasible with each nonbasic variable at the
   end that its cost wants. The first problem starts from the rows' basis, all others from the basis that this one ended
   in, less the basic rows that its box or an equal row keeps: what its answer is depends on it and on the first alone.
   Leaving rows by exact steepest edge, whose norms the update of a tableau sums on its way (Forrest & Goldfarb 1992);
   entering columns by a ratio test that passes ends while the slope lasts (Fourer 1994; Maros 2003) and prefers large
   pivots among ties (Harris 1973). What does not end in an optimum is left to another solver: nothing is proved here. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "scaling.c"

#define PRIMAL 1e-10    /* what a basic variable may be outside of its ends, in units of the sides */
#define DUAL 1e-12      /* what counts as a tie among costs, in units of the largest */
#define PIVOT 1e-7      /* the least entry that is divided by */
#define NOISE 1e-11     /* entries that are none */
#define FAR 1e8         /* widest box, in units of the sides */
#define LOOK 4          /* rows whose change costs as much as finding a pivot */
#define TRIES 4         /* problems that may fail before the first basis is found */
enum { OPTIMAL = 0, NUMERICAL = 5 };

typedef struct {
    i64 B, n, m, rows, N, limit;
    double *K, *S, *C; /* K scaled [rows, n], its scales */
    i64 *twin;         /* the last row before that is equal, or -1 */
    const double *c, *b, *d, *l, *u, *low, *high;
    double *x, *y;
    i64 *status, *iterations;
} Batch;

#include "simplex_tableau.c"

#include "simplex_pivots.c"

/* The point and the multipliers of the basis; 0 where one rests at an end that is none. */
static int finish(const Batch *a, i64 k, Tableau *t) {
    i64 n = a->n, N = a->N, rows = t->rows;
    const double *d = t->T + rows * N;
    double *x = t->value, *left = t->cost, worst = 0;
    for (i64 j = 0; j < n; j++) {
        i64 v = t->outside[j];
        if (t->way[j] != 0 && unreal(a, k, t, v, t->way[j] < 0)) return 0;
        t->value[v] = t->at[j];
        if (v >= n) a->y[k * a->rows + v - n] = -d[j] * a->S[v - n];
    }
    for (i64 i = 0; i < rows; i++) t->value[t->inside[i]] = t->basic[i];
    /* What rounding has left of the rows that hold. */
    for (i64 j = 0; j < N; j++) {
        i64 v = t->outside[j];
        left[j] = j < n && v >= n ? t->at[j] - dot(a->K + (v - n) * n, x, n) : 0;
        worst = most(worst, fabs(left[j]));
    }
    for (i64 i = 0; worst > 0 && i < rows; i++)
        if (t->inside[i] < n) t->value[t->inside[i]] += dot(t->T + i * N, left, N);
    for (i64 j = 0; j < n; j++) a->x[k * n + j] = x[j] * a->C[j];
    return worst < INFINITY;
}

/* Problem k from the basis of `from`, or from the rows' own where there is none. */
static int solve(const Batch *a, i64 k, const Tableau *from, Tableau *t) {
    if (!ends(a, k, t)) return 0;
    if (from) begin_at(a, from, t);
    else begin(a, t);
    load(a, k, t);
    i64 steps = descend(a, t);
    if (steps < 0 || !finish(a, k, t)) return 0;
    a->status[k] = OPTIMAL, a->iterations[k] = steps;
    return 1;
}

/* Equal rows of K among its inequalities; `key` is scratch. */
static void twins(const Batch *a, double *key) {
    for (i64 i = 0; i < a->rows; i++) {
        const double *row = a->K + i * a->n;
        a->twin[i] = -1, key[i] = 0;
        for (i64 j = 0; j < a->n; j++) key[i] += row[j] * (j + 1);
        for (i64 o = i - 1; o >= 0 && i < a->m && a->twin[i] < 0; o--)
            if (key[o] == key[i] && !memcmp(row, a->K + o * a->n, a->n * sizeof(double))) a->twin[i] = o;
    }
}

/* The first whole vector in memory. */
static double *aligned(double *memory) { return memory + (64 - (uintptr_t)memory % 64) % 64 / sizeof(double); }

/* low and high are l and u, or finite ends that the rows imply. All are NUMERICAL where the second problem changes more
   than `most_work` entries of its tableau. */
void simplex_f64(i64 B, i64 n, i64 m, i64 p, i64 limit, double most_work, const double *c, const double *A,
                 const double *b, const double *E, const double *d, const double *l, const double *u, const double *low,
                 const double *high, double *x, double *y, i64 *status, i64 *iterations, i64 threads) {
    Batch a = {.B = B, .n = n, .m = m, .rows = m + p, .N = (n + PAD - 1) / PAD * PAD, .limit = limit, .c = c, .b = b, .d = d,
               .l = l, .u = u, .low = low, .high = high, .x = x, .y = y, .status = status, .iterations = iterations};
    for (i64 k = 0; k < B; k++) status[k] = NUMERICAL, iterations[k] = 0;
    clear(x, B * n), clear(y, B * a.rows);
    double *memory = calloc(2 * doubles(&a) + a.rows * n + 4 * (a.rows + PAD) + 2 * (n + PAD) + PAD, sizeof(double));
    if (!memory) return;
    double *at = aligned(memory);
    a.K = slice(&at, a.rows * n), a.S = slice(&at, 2 * a.rows), a.C = slice(&at, n);
    a.twin = (i64 *)slice(&at, a.rows);
    double *scratch = slice(&at, most(n, a.rows));
    copy(a.K, A, m * n), copy(a.K + m * n, E, p * n);
    equilibrate(a.K, a.rows, n, a.S, a.C, scratch);
    twins(&a, scratch);
    Tableau first = tableau(&a, at);
    i64 from = 0;
    int found = 0;
    for (; from < B && from < TRIES && !found; from++) found = solve(&a, from, 0, &first);
    Tableau second = tableau(&a, at + doubles(&a));
    if (found && from < B) {
        solve(&a, from++, &first, &second);
        found = second.work <= most_work;
        for (i64 k = 0; k < from && !found; k++) status[k] = NUMERICAL, iterations[k] = 0;
    }
#pragma omp parallel num_threads((int)threads) if (found && threads > 1)
    if (found) {
        double *own = calloc(doubles(&a) + PAD, sizeof(double));
        if (own) {
            Tableau t = tableau(&a, aligned(own));
#pragma omp for schedule(dynamic, 1)
            for (i64 k = from; k < B; k++) solve(&a, k, &first, &t);
        }
        free(own);
    }
    free(memory);
}
