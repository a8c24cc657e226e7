/* Mehrotra's predictor-corrector for min c.x + x.P x / 2, A x <= b, E x = d, l <= x <= u.

   With K = [A; E], slacks s of its inequalities and multipliers y, z_l, z_u the Newton system is

       (P + D) dx + K^T dy = g,   K dx - S dy = h,   D = z_l / (x - l) + z_u / (u - x),  S = s / y (0 for equalities).

   It is regularised (D + RHO, S + DELTA; Friedlander & Orban 2012), reduced to n x n by eliminating dy or, where P = 0
   and every variable has a bound and rows are fewer, to rows x rows by eliminating dx; the residual of the system
   itself is then refined away. Source of the method: Mehrotra 1992, "On the implementation of a primal-dual interior
   point method"; scaling: Ruiz 2001.

   The method is written once, for values V that are W problems side by side, one a lane (small problems, whose matrices
   all fit a core's cache: every operation is as wide as a register, and a lane that has finished takes the next
   problem), or one problem alone (products and factors are then vectors along rows). This file includes it once for
   each. What a lane does depends on its problem alone. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "scaling.c"

typedef double V_side __attribute__((vector_size(8 * W)));
typedef i64 M_side __attribute__((vector_size(8 * W)));
#define RHO 1e-11
#define DELTA 1e-10
#define IN_CACHE 1048576 /* bytes of W problems that are solved side by side */
#define CENTRE 0.3      /* of a cold start: products of slacks and prices over the slacks */
#define NEAR 64           /* rows of two panels that stay in a core's nearest cache */
#define TINY 65536 /* bytes up to which one problem goes among the lanes, too: alone and in a batch it is solved alike */
#define WARM 1e-2       /* how far a warm start keeps slacks and prices off 0 */
#define FRESH 8         /* steps after which products with the matrix are made anew */
/* Keeps a value in its register: else gcc loads it anew for every product, at half the speed. */
#if defined(__GNUC__) && defined(__AVX512F__)
#define HELD(v) __asm__("" : "+v"(v))
#else
#define HELD(v) (void)0
#endif
enum { RUNNING = -1, OPTIMAL = 0, ITERATION_LIMIT = 1, INFEASIBLE = 3, UNBOUNDED = 4, NUMERICAL = 5 };
#define EXPORT(name) const i64 constant_##name = name; /* for Python */
EXPORT(OPTIMAL)
EXPORT(ITERATION_LIMIT)
EXPORT(INFEASIBLE)
EXPORT(UNBOUNDED)
EXPORT(NUMERICAL)

typedef struct {
    i64 B, n, m, rows, shared_a, shared_e, shared_p, limit, next;
    int by_rows;
    double tol;
    const double *c, *A, *b, *E, *d, *l, *u, *P, *x0, *y0;
    double *x, *y;
    i64 *status, *iterations;
} Batch;

/* One problem scaled, with its first point. */
typedef struct {
    double *K, *P, *c, *q, *l, *u, *C, *S, *side, *x, *s, *y, *zl, *zu, *Kx, *Ky, *Px;
    double gamma, beta;
    char *idle, *fixed;
} Scaled;

#include "interior_start.c"

#define COUNT(list) (i64)(sizeof(list) / sizeof *(list))
#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define LANES 1
#define V double
#define M i64
#define SIDE alone
#include "interior_method.c"
#undef LANES
#undef V
#undef M
#undef SIDE
#define LANES W
#define V V_side
#define M M_side
#define SIDE beside
#include "interior_method.c"

/* x [B, n], y [B, m + p]; shared matrices are [m, n], [p, n], [n, n]; P, and x0 with y0, may be null. */
void interior_f64(i64 B, i64 n, i64 m, i64 p, i64 shared_a, i64 shared_e, i64 shared_p, i64 limit, double tol,
                  const double *c, const double *A, const double *b, const double *E, const double *d, const double *l,
                  const double *u, const double *P, const double *x0, const double *y0, double *x, double *y,
                  i64 *status, i64 *iterations, i64 threads) {
    Batch a = {.B = B, .n = n, .m = m, .rows = m + p, .shared_a = shared_a, .shared_e = shared_e, .shared_p = shared_p,
               .limit = limit, .tol = tol, .c = c, .A = A, .b = b, .E = E, .d = d, .l = l, .u = u, .P = P, .x0 = x0,
               .y0 = y0, .x = x, .y = y, .status = status, .iterations = iterations};
    a.by_rows = !P && a.rows < n;
    for (i64 i = 0; a.by_rows && i < B * n; i++) a.by_rows = isfinite(l[i]) || isfinite(u[i]);
    int beside = doubles(&a) * 8 * W <= (B > 2 ? IN_CACHE : TINY);
    i64 teams = beside ? (B + W - 1) / W : B;
    for (i64 k = 0; k < B; k++) status[k] = NUMERICAL, iterations[k] = 0;
    clear(x, B * n), clear(y, B * a.rows);
#pragma omp parallel num_threads(threads < teams ? (int)threads : (int)teams)
    {
        i64 scratch = (a.rows + (P ? n : 0)) * n + 11 * (n + PAD) + 8 * (a.rows + PAD) + 4 * PAD;
        double *memory = calloc(scratch, sizeof(double));
        char *flags = calloc(a.rows + n + 1, 1);
        if (memory && flags) {
            double *at = memory;
            Scaled one = {.idle = flags, .fixed = flags + a.rows};
            double **along_n[] = {&one.c, &one.l, &one.u, &one.C, &one.x, &one.zl, &one.zu, &one.Ky, &one.Px};
            double **along_rows[] = {&one.q, &one.side, &one.s, &one.y, &one.Kx};
            one.K = slice(&at, a.rows * n);
            one.P = P ? slice(&at, n * n) : 0;
            for (i64 i = 0; i < COUNT(along_n); i++) *along_n[i] = slice(&at, n);
            for (i64 i = 0; i < COUNT(along_rows); i++) *along_rows[i] = slice(&at, a.rows);
            one.S = slice(&at, 2 * a.rows);
            double *most_of = slice(&at, n);
            if (beside) work_beside(&a, &one, most_of);
            else work_alone(&a, &one, most_of);
        }
        free(memory), free(flags);
    }
}
