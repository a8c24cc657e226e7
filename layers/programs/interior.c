/* Mehrotra's predictor-corrector for min c.x + x.P x / 2, A x <= b, E x = d, l <= x <= u.

   With K = [A; E], slacks s of its inequalities and multipliers y, z_l, z_u the Newton system is

       (P + D) dx + K^T dy = g,   K dx - S dy = h,   D = z_l / (x - l) + z_u / (u - x),  S = s / y (0 for equalities).

   It is regularised (D + RHO, S + DELTA; Friedlander & Orban 2012), reduced to n x n by eliminating dy or, where P = 0
   and every variable has a bound and rows are fewer, to rows x rows by eliminating dx; the residual of the system
   itself is then refined away. Source of the method: Mehrotra 1992, "On the implementation of a primal-dual interior
   point method"; scaling: Ruiz 2001.

   The method is written once, for values V that are W problems side by side, one a lane (small problems, whose matrices
   all fit a core's cache: every operation is as wide as a register, and a lane that has finished takes the next
   problem), or one problem alone (products and factors are then vectors along rows). This file includes itself once
   for each. What a lane does depends on its problem alone. */
#ifndef LANES
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;
#if defined(__AVX512F__)
#define W 8
#else
#define W 4
#endif
typedef double vec __attribute__((vector_size(8 * W), aligned(8), may_alias));
typedef i64 ivec __attribute__((vector_size(8 * W), aligned(8), may_alias));
typedef double V_side __attribute__((vector_size(8 * W)));
typedef i64 M_side __attribute__((vector_size(8 * W)));
#define PAD 8
#define RHO 1e-11
#define DELTA 1e-10
#define NO_LIMIT 1e20
#define IN_CACHE 1048576 /* bytes of W problems that are solved side by side */
#define WARM 1e-2       /* how far a warm start keeps slacks and prices off 0 */
#define FRESH 8         /* steps after which products with the matrix are made anew */
#define INLINE static inline __attribute__((always_inline))
enum { RUNNING = -1, OPTIMAL = 0, ITERATION_LIMIT = 1, INFEASIBLE = 3, UNBOUNDED = 4, NUMERICAL = 5 };
#define EXPORT(name) const i64 constant_##name = name; /* for Python */
EXPORT(OPTIMAL)
EXPORT(ITERATION_LIMIT)
EXPORT(INFEASIBLE)
EXPORT(UNBOUNDED)
EXPORT(NUMERICAL)

INLINE double least(double a, double b) { return a < b ? a : b; }
INLINE double most(double a, double b) { return a > b ? a : b; }

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

static double dot(const double *a, const double *b, i64 n) {
    vec t = {0};
    i64 i = 0;
    for (; i + W <= n; i += W) t += *(const vec *)(a + i) * *(const vec *)(b + i);
    double sum = 0;
    for (int k = 0; k < W; k++) sum += t[k];
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* Cold: one unit off the ends. Warm: at a former point, its slacks and prices kept off 0. */
static void first_point(const Batch *a, i64 k, Scaled *p, int warm) {
    i64 n = a->n, m = a->m, rows = a->rows;
    const double off = warm ? WARM : 1, *x0 = a->x0 + k * n, *y0 = a->y0 + k * rows;
    for (i64 j = 0; j < n; j++) {
        double l = p->l[j], u = p->u[j], x = warm ? x0[j] / p->C[j] / p->beta : 0;
        int has_l = isfinite(l), has_u = isfinite(u);
        if (p->fixed[j]) x = has_l ? l : u;
        else if (has_l && has_u) {
            double room = least(off, 0.5 * (u - l));
            x = least(most(x, l + room), u - room);
        } else if (has_l) x = most(x, l + off);
        else if (has_u) x = least(x, u - off);
        p->x[j] = x;
    }
    memset(p->Ky, 0, n * sizeof(double));
    for (i64 i = 0; i < rows; i++) {
        const double *row = p->K + i * n;
        double y = warm ? p->idle[i] ? 0 : y0[i] / p->S[i] / p->gamma : 0;
        p->Kx[i] = dot(row, p->x, n);
        p->s[i] = i < m ? most(p->q[i] - p->Kx[i], off) : 0;
        p->y[i] = y = i < m ? (p->idle[i] ? 1e-12 : most(y, off)) : y;
        if (y != 0)
            for (i64 j = 0; j < n; j++) p->Ky[j] += y * row[j];
    }
    for (i64 j = 0; j < n; j++) {
        if (p->P) p->Px[j] = dot(p->P + j * n, p->x, n);
        double r = warm ? p->c[j] + p->Ky[j] + (p->P ? p->Px[j] : 0) : 0;
        p->zl[j] = isfinite(p->l[j]) && !p->fixed[j] ? most(r, off) : 0;
        p->zu[j] = isfinite(p->u[j]) && !p->fixed[j] ? most(-r, off) : 0;
    }
}

INLINE vec largest(vec a, vec b) {
    ivec sign = (ivec)b & INT64_MAX, mine = a > (vec)sign;
    return (vec)(((ivec)a & mine) | (sign & ~mine));
}

/* Four rounds of Ruiz's scaling: K becomes diag(S) K diag(C); `top` holds n. */
static void equilibrate(double *K, i64 rows, i64 n, double *S, double *C, double *top) {
    for (i64 j = 0; j < n; j++) C[j] = top[j] = 1;
    for (i64 i = 0; i < rows; i++) S[i] = 1;
    for (int round = 0; round < 4; round++) {
        double *row = K, *worst = S + rows; /* scratch behind S */
        for (i64 i = 0; i < rows; i++, row += n) {
            vec most_of = {0};
            double rest = 0;
            i64 j = 0;
            for (; j + W <= n; j += W) {
                vec a = *(vec *)(row + j) * *(vec *)(top + j);
                *(vec *)(row + j) = a;
                most_of = largest(most_of, a);
            }
            for (; j < n; j++) rest = most(rest, fabs(row[j] *= top[j]));
            for (int k = 0; k < W; k++) rest = most(rest, most_of[k]);
            worst[i] = rest;
        }
        for (i64 i = 0; i < rows; i++) {
            worst[i] = worst[i] > 0 ? 1 / sqrt(worst[i]) : 1;
            S[i] *= worst[i];
        }
        memset(top, 0, n * sizeof(double));
        row = K;
        for (i64 i = 0; i < rows; i++, row += n) {
            double f = worst[i];
            i64 j = 0;
            for (; j + W <= n; j += W) {
                vec a = *(vec *)(row + j) * f;
                *(vec *)(row + j) = a;
                *(vec *)(top + j) = largest(*(vec *)(top + j), a);
            }
            for (; j < n; j++) top[j] = most(top[j], fabs(row[j] *= f));
        }
        for (i64 j = 0; j < n; j++) {
            top[j] = top[j] > 0 ? 1 / sqrt(top[j]) : 1;
            C[j] *= top[j];
        }
    }
    for (i64 i = 0; i < rows; i++)
        for (i64 j = 0; j < n; j++) K[i * n + j] *= top[j];
}

/* Ruiz's scaling of rows and columns, then of costs and sides; idle rows become rows of zeros. */
static void prepare(const Batch *a, i64 k, Scaled *p, double *most_of) {
    i64 n = a->n, m = a->m, rows = a->rows;
    const double *c = a->c + k * n, *b = a->b + k * m, *d = a->d + k * (rows - m), *l = a->l + k * n, *u = a->u + k * n;
    const double *A = a->A + (a->shared_a ? 0 : k * m * n), *E = a->E + (a->shared_e ? 0 : k * (rows - m) * n);
    const double *P = a->P ? a->P + (a->shared_p ? 0 : k * n * n) : 0;
    memcpy(p->K, A, m * n * sizeof(double));
    memcpy(p->K + m * n, E, (rows - m) * n * sizeof(double));
    for (i64 i = 0; i < rows; i++) {
        double *row = p->K + i * n, reach = 0;
        p->q[i] = i < m ? b[i] : d[i - m];
        for (i64 j = 0; j < n; j++) reach += row[j] > 0 ? row[j] * u[j] : row[j] < 0 ? row[j] * l[j] : 0;
        p->idle[i] = i < m && (p->q[i] >= NO_LIMIT || p->q[i] > 2 * fabs(reach) + 1);
        if (p->idle[i]) memset(row, 0, n * sizeof(double)), p->q[i] = 1;
    }
    equilibrate(p->K, rows, n, p->S, p->C, most_of);
    double gamma = 0, beta = 0;
    for (i64 j = 0; j < n; j++) gamma = most(gamma, fabs(p->c[j] = c[j] * p->C[j]));
    for (i64 i = 0; i < rows; i++)
        if (!p->idle[i]) beta = most(beta, fabs(p->q[i] *= p->S[i]));
    if (P)
        for (i64 i = 0; i < n; i++)
            for (i64 j = 0; j < n; j++) gamma = most(gamma, fabs(p->P[i * n + j] = P[i * n + j] * p->C[i] * p->C[j]));
    if (beta == 0)
        for (i64 j = 0; j < n; j++) {
            if (isfinite(l[j])) beta = most(beta, fabs(l[j] / p->C[j]));
            if (isfinite(u[j])) beta = most(beta, fabs(u[j] / p->C[j]));
        }
    p->gamma = gamma > 0 ? gamma : 1;
    p->beta = beta > 0 ? beta : 1;
    for (i64 j = 0; j < n; j++) {
        p->c[j] /= p->gamma;
        p->l[j] = l[j] / p->C[j] / p->beta;
        p->u[j] = u[j] / p->C[j] / p->beta;
        p->fixed[j] = isfinite(p->l[j]) && !(p->u[j] - p->l[j] > 1e-14 * (1 + fabs(p->l[j])));
    }
    for (i64 i = 0; i < rows; i++) {
        if (!p->idle[i]) p->q[i] /= p->beta;
        double unit = p->beta / p->S[i];
        p->side[i] = unit / most(1, fabs(p->q[i] * unit));
    }
    if (P)
        for (i64 i = 0; i < n * n; i++) p->P[i] *= p->beta / p->gamma;
}

static double *slice(double **from, i64 count) {
    double *here = *from;
    *from += (count + PAD - 1) / PAD * PAD;
    return here;
}

/* Doubles that one of W problems side by side takes. */
static i64 doubles(const Batch *a) {
    i64 n = a->n, rows = a->rows, r = a->by_rows ? rows : n, q = a->by_rows ? n : rows;
    return rows * n + (a->P ? n * n : 0) + (q + r) * r + 33 * n + 23 * rows;
}

#define COUNT(list) (i64)(sizeof(list) / sizeof *(list))
#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define LANES 1
#define V double
#define M i64
#define SIDE alone
#include "interior.c"
#undef LANES
#undef V
#undef M
#undef SIDE
#define LANES W
#define V V_side
#define M M_side
#define SIDE beside
#include "interior.c"

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
    int beside = B > 2 && doubles(&a) * 8 * W <= IN_CACHE;
    i64 teams = beside ? (B + W - 1) / W : B;
    for (i64 k = 0; k < B; k++) status[k] = NUMERICAL, iterations[k] = 0;
    memset(x, 0, B * n * sizeof(double)), memset(y, 0, B * a.rows * sizeof(double));
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

#else

#define F(name) JOIN(name, SIDE)
#define Problem F(Problem_)

typedef struct {
    i64 n, m, rows, N, L, r, q_; /* N, L: n and rows, padded where one problem is solved alone; r, q_: columns and rows of B */
    int by_rows;
    V *K, *P, *B, *R, *inverse; /* K [rows, N], P [N, N] or none, B: K scaled for the factor R [r, r], 1 / its diagonal */
    V *c, *q, *l, *u, *width, *side, *C, *S_, *x, *s, *y, *zl, *zu, *wl, *wu, *il, *iu, *is, *iy, *rd, *rp, *g, *h;
    V *dx, *dy, *ds, *dzl, *dzu, *tl, *tu, *ts, *D, *S, *omega, *Kx, *Ky, *Px, *Kdx, *Kdy, *Pdx, *bx, *by, *w, *w2, *bestx, *besty;
    M *fixed;
    V gamma, beta, count, best, worse, bump, steps, mu, total;
    M live;
    i64 at[LANES]; /* which problem a lane holds, or -1 */
    V *tmp_n[2], *tmp_rows[2];
    i64 again[LANES]; /* a problem to be started anew */
    int warm[LANES], open[LANES]; /* open: reduced costs have to vanish at infinite bounds, to rounding */
} Problem;

INLINE V F(select)(M mask, V a, V b) {
#if LANES == 1
    return mask ? a : b;
#else
    return (V)(((M)a & mask) | ((M)b & ~mask));
#endif
}
#define select F(select)
#define keep(mask, a) select(mask, a, (V){0})
#define lesser(a, b) select((a) < (b), a, b)
#define larger(a, b) select((a) > (b), a, b)
#define size_of(a) larger(a, -(a))
#if LANES == 1
#define NOT(mask) (!(mask))
#define EACH(v, k) (v)
#else
#define NOT(mask) (~(mask))
#define EACH(v, k) (v)[k]
#endif

INLINE int F(any)(M mask) {
    i64 found = 0;
    for (int k = 0; k < LANES; k++) found |= EACH(mask, k);
    return found != 0;
}
#define any F(any)

INLINE V F(root)(V a) {
    for (int k = 0; k < LANES; k++) EACH(a, k) = sqrt(EACH(a, k));
    return a;
}
#define root F(root)

#if LANES == 1
/* K x, rows by fours. */
static void F(times)(const Problem *p, const V *x, V *out) {
    i64 i = 0, N = p->N;
    for (; i + 4 <= p->rows; i += 4) {
        vec t[4] = {{0}};
        for (i64 j = 0; j < N; j += W)
            for (int o = 0; o < 4; o++) t[o] += *(const vec *)(p->K + (i + o) * N + j) * *(const vec *)(x + j);
        for (int o = 0; o < 4; o++) {
            double sum = 0;
            for (int k = 0; k < W; k++) sum += t[o][k];
            out[i + o] = sum;
        }
    }
    for (; i < p->rows; i++) out[i] = dot(p->K + i * N, x, N);
}

/* K^T y. */
static void F(transposed)(const Problem *p, const V *y, V *out) {
    i64 i = 0, N = p->N;
    memset(out, 0, N * sizeof(double));
    for (; i + 4 <= p->rows; i += 4) {
        const double *row = p->K + i * N;
        double a = y[i], b = y[i + 1], c = y[i + 2], d = y[i + 3];
        for (i64 j = 0; j < N; j++) out[j] += a * row[j] + b * row[N + j] + c * row[2 * N + j] + d * row[3 * N + j];
    }
    for (; i < p->rows; i++)
        for (i64 j = 0; j < N; j++) out[j] += y[i] * p->K[i * N + j];
}

/* One tile of 8 rows and `parts` vectors of B^T B + P - R^T R. */
INLINE void F(tile)(const Problem *p, const V *diag, i64 q, i64 j, i64 k, const int parts) {
    i64 r = p->r;
    const double *B = p->B, *P = p->by_rows ? 0 : p->P;
    double *R = p->R;
    vec sum[8][2];
    for (int t = 0; t < 8; t++)
        for (int o = 0; o < parts; o++) sum[t][o] = P ? *(const vec *)(P + (j + t) * r + k + o * W) : (vec){0};
    for (i64 i = 0; i < q; i++)
        for (int t = 0; t < 8; t++)
            for (int o = 0; o < parts; o++) sum[t][o] += B[i * r + j + t] * *(const vec *)(B + i * r + k + o * W);
    for (i64 i = 0; i < j; i++)
        for (int t = 0; t < 8; t++)
            for (int o = 0; o < parts; o++) sum[t][o] -= R[i * r + j + t] * *(const vec *)(R + i * r + k + o * W);
    for (int t = 0; t < 8; t++)
        for (int o = 0; o < parts; o++) *(vec *)(R + (j + t) * r + k + o * W) = sum[t][o];
    for (int t = 0; t < 8; t++)
        if (j + t >= k && j + t < k + parts * W) R[(j + t) * r + j + t] += diag[j + t];
}

#else
static void F(times)(const Problem *p, const V *x, V *out) {
    i64 i = 0, n = p->n;
    for (; i + 4 <= p->rows; i += 4) {
        V t[4] = {{0}};
        const V *row = p->K + i * n;
        for (i64 j = 0; j < n; j++)
            for (int o = 0; o < 4; o++) t[o] += row[o * n + j] * x[j];
        for (int o = 0; o < 4; o++) out[i + o] = t[o];
    }
    for (; i < p->rows; i++) {
        V t = {0};
        for (i64 j = 0; j < n; j++) t += p->K[i * n + j] * x[j];
        out[i] = t;
    }
}

static void F(transposed)(const Problem *p, const V *y, V *out) {
    i64 i = 0, n = p->n;
    for (i64 j = 0; j < n; j++) out[j] = (V){0};
    for (; i + 4 <= p->rows; i += 4) {
        const V *row = p->K + i * n;
        V a = y[i], b = y[i + 1], c = y[i + 2], d = y[i + 3];
        for (i64 j = 0; j < n; j++)
            out[j] += (a * row[j] + b * row[n + j]) + (c * row[2 * n + j] + d * row[3 * n + j]);
    }
    for (; i < p->rows; i++)
        for (i64 j = 0; j < n; j++) out[j] += y[i] * p->K[i * n + j];
}

#endif
#define times F(times)
#define transposed F(transposed)

static void F(quadratic)(const Problem *p, const V *x, V *out) {
    if (!p->P) return;
    for (i64 i = 0; i < p->n; i++) {
#if LANES == 1
        out[i] = dot(p->P + i * p->N, x, p->N);
#else
        V t = {0};
        for (i64 j = 0; j < p->n; j++) t += p->P[i * p->n + j] * x[j];
        out[i] = t;
#endif
    }
}
#define quadratic F(quadratic)

#if LANES == 1
/* R^T R = P + diag + B^T B, upper R row by row; whether it breaks down. */
static M F(factor)(Problem *p, const V *diag, i64 q) {
    i64 r = p->r;
    M broken = 0;
    for (i64 j = 0; j < r; j += 8) {
        i64 k = j;
        for (; k + 2 * W <= r; k += 2 * W) F(tile)(p, diag, q, j, k, 2);
        for (; k < r; k += W) F(tile)(p, diag, q, j, k, 1);
        for (i64 t = 0; t < 8; t++) {
            V *row = p->R + (j + t) * r;
            for (i64 o = 0; o < t; o++) {
                const V *other = p->R + (j + o) * r;
                V f = other[j + t];
                for (i64 i = j; i < r; i++) row[i] -= f * other[i];
            }
            M good = (row[j + t] > 1e-300) & (row[j + t] < 1e300);
            broken |= !good;
            V f = 1 / sqrt(good ? row[j + t] : 1);
            p->inverse[j + t] = f;
            for (i64 i = j; i < r; i++) row[i] *= f;
        }
    }
    return broken;
}

static void F(solve)(const Problem *p, V *g) {
    i64 r = p->r;
    for (i64 i = 0; i < r; i++) {
        V z = g[i] *= p->inverse[i];
        const V *row = p->R + i * r;
        for (i64 k = i + 1; k < r; k++) g[k] -= z * row[k];
    }
    for (i64 i = r - 1; i >= 0; i--) {
        const V *row = p->R + i * r;
        g[i] = (g[i] - dot(row + i + 1, g + i + 1, r - i - 1)) * p->inverse[i];
    }
}
#else
/* B and R lie in panels of 4 columns: first the q rows of B, then the r rows of R. */
#define PANEL(p, j) ((p)->B + (j) * ((p)->q_ + (p)->r))

/* One tile, height x breadth values of B^T B + P - R^T R, and what it makes of R; which lanes break down. */
INLINE M F(tile)(Problem *p, const V *diag, i64 j, i64 k, const int height, const int breadth) {
    const V *left = PANEL(p, j), *right = PANEL(p, k), *P = p->by_rows ? 0 : p->P;
    V *R = PANEL(p, k) + (p->q_ + j) * 4, sum[4][4];
    M broken = {0};
    for (int t = 0; t < height; t++)
        for (int o = 0; o < breadth; o++) {
            sum[t][o] = P ? P[(j + t) * p->r + k + o] : (V){0};
            if (j == k && t == o) sum[t][o] += diag[j + t];
        }
    for (i64 i = 0; i < p->q_; i++, left += 4, right += 4)
        for (int t = 0; t < height; t++)
            for (int o = 0; o < breadth; o++) sum[t][o] += left[t] * right[o];
    for (i64 i = 0; i < j; i++, left += 4, right += 4)
        for (int t = 0; t < height; t++)
            for (int o = 0; o < breadth; o++) sum[t][o] -= left[t] * right[o];
    const V *corner = PANEL(p, j) + (p->q_ + j) * 4;
    for (int t = 0; t < height; t++) {
        for (int e = 0; e < t; e++)
            for (int o = 0; o < breadth; o++) sum[t][o] -= (j == k ? sum[e][t] : corner[e * 4 + t]) * sum[e][o];
        if (j == k) {
            M good = (sum[t][t] > 1e-300) & (sum[t][t] < 1e300);
            broken |= NOT(good);
            p->inverse[j + t] = 1 / root(select(good, sum[t][t], (V){0} + 1));
        }
        for (int o = 0; o < breadth; o++) sum[t][o] *= p->inverse[j + t];
    }
    for (int t = 0; t < height; t++)
        for (int o = 0; o < breadth; o++) R[t * 4 + o] = sum[t][o];
    return broken;
}

/* R^T R = P + diag + B^T B, upper R; which lanes break down. */
static M F(factor)(Problem *p, const V *diag, i64 q) {
    i64 r = p->r, whole = r / 4 * 4;
    M broken = {0};
    for (i64 j = 0; j < whole; j += 4) {
        for (i64 k = j; k < whole; k += 4) broken |= F(tile)(p, diag, j, k, 4, 4);
        if (r - whole == 1) F(tile)(p, diag, j, whole, 4, 1);
        if (r - whole == 2) F(tile)(p, diag, j, whole, 4, 2);
        if (r - whole == 3) F(tile)(p, diag, j, whole, 4, 3);
    }
    if (r - whole == 1) broken |= F(tile)(p, diag, whole, whole, 1, 1);
    if (r - whole == 2) broken |= F(tile)(p, diag, whole, whole, 2, 2);
    if (r - whole == 3) broken |= F(tile)(p, diag, whole, whole, 3, 3);
    return broken;
}

static void F(solve)(const Problem *p, V *g) {
    i64 r = p->r;
    for (i64 k = 0; k < r; k += 4) {
        const V *R = PANEL(p, k) + p->q_ * 4;
        V t[4] = {{0}};
        for (i64 i = 0; i < k; i++)
            for (int o = 0; o < 4; o++) t[o] += R[i * 4 + o] * g[i];
        for (i64 o = 0; o < 4 && k + o < r; o++) {
            V z = g[k + o] - t[o];
            for (i64 e = 0; e < o; e++) z -= R[(k + e) * 4 + o] * g[k + e];
            g[k + o] = z * p->inverse[k + o];
        }
    }
    for (i64 k = (r - 1) / 4 * 4; k >= 0; k -= 4) {
        const V *R = PANEL(p, k) + p->q_ * 4;
        V t[4] = {{0}};
        for (i64 o = least(3, r - 1 - k); o >= 0; o--) {
            V z = g[k + o];
            for (i64 e = o + 1; e < 4 && k + e < r; e++) z -= R[(k + o) * 4 + e] * g[k + e];
            g[k + o] = t[o] = z * p->inverse[k + o];
        }
        for (i64 i = 0; i < k; i++)
            g[i] -= (R[i * 4] * t[0] + R[i * 4 + 1] * t[1]) + (R[i * 4 + 2] * t[2] + R[i * 4 + 3] * t[3]);
    }
}
#endif

#if LANES == 1
#define AT(i, j) p->B[(i) * r + (j)]
#else
#define AT(i, j) (PANEL(p, (j) / 4 * 4)[(i) * 4 + (j) % 4])
#endif

static M F(factorise)(Problem *p) {
    i64 n = p->n, rows = p->rows, r = p->r;
    V rho = RHO * p->bump, delta = DELTA * p->bump, *diag = p->w;
    for (i64 j = 0; j < n; j++) {
        V d = p->zl[j] * p->il[j] + p->zu[j] * p->iu[j];
        p->D[j] = keep(NOT(p->fixed[j]), lesser(d, (V){0} + 1e25));
    }
    for (i64 i = 0; i < rows; i++) p->S[i] = i < p->m ? lesser(p->s[i] * p->iy[i], (V){0} + 1e25) : (V){0};
    if (p->by_rows) {
        for (i64 j = 0; j < n; j++) {
            p->omega[j] = keep(NOT(p->fixed[j]), 1 / (p->D[j] + rho));
            V f = root(p->omega[j]);
            for (i64 i = 0; i < rows; i++) AT(j, i) = f * p->K[i * p->N + j];
        }
        for (i64 i = 0; i < r; i++) diag[i] = i < rows ? p->S[i] + delta : (V){0} + 1;
        return F(factor)(p, diag, n);
    }
    for (i64 i = 0; i < rows; i++) {
        p->omega[i] = 1 / (p->S[i] + delta);
        V f = root(p->omega[i]);
        const V *row = p->K + i * p->N;
        for (i64 j = 0; j < p->N; j++) AT(i, j) = f * row[j];
    }
    for (i64 j = 0; j < r; j++) diag[j] = j < n ? select(p->fixed[j], (V){0} + 1e30, p->D[j] + rho) : (V){0} + 1;
    return F(factor)(p, diag, rows);
}

/* (dx, dy) of the regularised system for right-hand sides g, h, with K dx or, by rows, K^T dy. */
static void F(direction)(Problem *p, const V *g, const V *h, V *dx, V *dy, V *Kdx, V *Kdy) {
    i64 n = p->n, rows = p->rows;
    V *w = p->w;
    if (p->by_rows) {
        for (i64 j = 0; j < n; j++) p->w2[j] = p->omega[j] * g[j];
        times(p, p->w2, w);
        for (i64 i = 0; i < p->r; i++) w[i] = i < rows ? w[i] - h[i] : (V){0};
        F(solve)(p, w);
        for (i64 i = 0; i < rows; i++) dy[i] = w[i];
        transposed(p, dy, Kdy);
        for (i64 j = 0; j < n; j++) dx[j] = p->omega[j] * (g[j] - Kdy[j]);
        return;
    }
    for (i64 i = 0; i < rows; i++) p->w2[i] = p->omega[i] * h[i];
    transposed(p, p->w2, w);
    for (i64 j = 0; j < n; j++) w[j] = keep(NOT(p->fixed[j]), w[j] + g[j]);
    F(solve)(p, w);
    for (i64 j = 0; j < n; j++) dx[j] = keep(NOT(p->fixed[j]), w[j]);
    times(p, dx, Kdx);
    for (i64 i = 0; i < rows; i++) dy[i] = p->omega[i] * (Kdx[i] - h[i]);
}

/* The product that `direction` leaves open. */
static void F(complete)(Problem *p, const V *dx, const V *dy, V *Kdx, V *Kdy) {
    if (p->by_rows) times(p, dx, Kdx);
    else transposed(p, dy, Kdy);
}

static void F(newton)(Problem *p, int rounds) {
    i64 n = p->n, rows = p->rows, m = p->m;
    V size = {0}, before = (V){0} + INFINITY;
    for (i64 j = 0; j < n; j++) {
        p->g[j] = keep(NOT(p->fixed[j]), p->tl[j] * p->il[j] - p->tu[j] * p->iu[j] - p->rd[j]);
        size = larger(size, size_of(p->rd[j]));
    }
    for (i64 i = 0; i < rows; i++) {
        p->h[i] = -p->rp[i] - (i < m ? p->ts[i] * p->iy[i] : (V){0});
        size = larger(size, size_of(p->rp[i]));
    }
    F(direction)(p, p->g, p->h, p->dx, p->dy, p->Kdx, p->Kdy);
    if (rounds) {
        F(complete)(p, p->dx, p->dy, p->Kdx, p->Kdy);
        quadratic(p, p->dx, p->Pdx);
    }
    M go = p->live;
    for (int round = 0; round < rounds; round++) {
        V worst = {0}, *e1 = p->g, *e2 = p->h; /* the right-hand sides become what is left of them */
        for (i64 j = 0; j < n; j++) {
            V e = e1[j] - p->D[j] * p->dx[j] - p->Kdy[j];
            if (p->P) e -= p->Pdx[j];
            p->bx[j] = keep(NOT(p->fixed[j]), e);
            worst = larger(worst, size_of(p->bx[j]) / (1 + p->D[j]));
        }
        for (i64 i = 0; i < rows; i++) {
            p->by[i] = e2[i] - p->Kdx[i] + p->S[i] * p->dy[i];
            worst = larger(worst, size_of(p->by[i]) / (1 + p->S[i]));
        }
        go &= (worst > 1e-3 * size) & (worst > 1e-15) & (worst < 0.5 * before);
        if (!any(go)) break;
        before = worst;
        V *more_x = p->tmp_n[0], *more_y = p->tmp_rows[0], *Kmore = p->tmp_rows[1], *more_K = p->tmp_n[1];
        F(direction)(p, p->bx, p->by, more_x, more_y, Kmore, more_K);
        F(complete)(p, more_x, more_y, Kmore, more_K);
        for (i64 j = 0; j < n; j++) {
            p->dx[j] += keep(go, more_x[j]);
            p->Kdy[j] += keep(go, more_K[j]);
        }
        for (i64 i = 0; i < rows; i++) {
            p->dy[i] += keep(go, more_y[i]);
            p->Kdx[i] += keep(go, Kmore[i]);
        }
        quadratic(p, p->dx, p->Pdx);
    }
    for (i64 j = 0; j < n; j++) {
        p->dzl[j] = (p->tl[j] - p->zl[j] * p->dx[j]) * p->il[j];
        p->dzu[j] = (p->tu[j] + p->zu[j] * p->dx[j]) * p->iu[j];
    }
    for (i64 i = 0; i < m; i++) p->ds[i] = (p->ts[i] - p->s[i] * p->dy[i]) * p->iy[i];
}

/* 1 / the steps at which the first slack and the first price vanish. */
static void F(lengths)(const Problem *p, V *primal, V *dual) {
    V a = {0}, b = {0};
    for (i64 j = 0; j < p->n; j++) {
        a = larger(a, larger(-p->dx[j] * p->il[j], p->dx[j] * p->iu[j]));
        V low = keep(p->zl[j] > 0, -p->dzl[j] / p->zl[j]), high = keep(p->zu[j] > 0, -p->dzu[j] / p->zu[j]);
        b = larger(b, larger(low, high));
    }
    for (i64 i = 0; i < p->m; i++) {
        a = larger(a, -p->ds[i] * p->is[i]);
        b = larger(b, -p->dy[i] * p->iy[i]);
    }
    *primal = a, *dual = b;
}

/* Products, slacks and residuals at the present point; the merit it has. */
static V F(look)(Problem *p, V *largest_x, V *largest_y) {
    i64 n = p->n, rows = p->rows;
    V one = (V){0} + 1, total = {0}, value = {0}, charge = {0}, violation = {0}, bent = {0}, lx = {0}, ly = {0};
    for (i64 j = 0; j < n; j++) {
        V x = p->x[j], zl = p->zl[j], zu = p->zu[j];
        M low = zl > 0, high = zu > 0;
        p->wl[j] = select(low, x - p->l[j], one), p->wu[j] = select(high, p->u[j] - x, one);
        p->il[j] = keep(low, 1 / p->wl[j]), p->iu[j] = keep(high, 1 / p->wu[j]);
        total += zl * p->wl[j] + zu * p->wu[j];
        value += p->c[j] * x;
        V rd = p->c[j] - zl + zu + p->Ky[j];
        if (p->P) rd += p->Px[j], bent += p->Px[j] * x;
        p->rd[j] = rd = keep(NOT(p->fixed[j]), rd);
        charge += size_of(rd) * select(p->width[j] < INFINITY, p->width[j], size_of(x) + 1);
        lx = larger(lx, size_of(x));
    }
    for (i64 i = 0; i < rows; i++) {
        V rp = p->Kx[i] + p->s[i] - p->q[i], y = p->y[i];
        p->rp[i] = rp;
        if (i < p->m) p->is[i] = 1 / p->s[i], p->iy[i] = 1 / y, total += p->s[i] * y;
        charge += size_of(y * rp);
        violation = larger(violation, size_of(rp) * p->side[i]);
        ly = larger(ly, size_of(y));
    }
    *largest_x = lx, *largest_y = ly;
    p->total = total, p->mu = total / p->count;
    V unit = p->gamma * p->beta;
    V gap = (charge + total) * unit / larger(one, size_of(value + 0.5 * bent) * unit);
    return select(gap == gap, larger(gap, violation), gap);
}

/* Whether y, nearly a Farkas ray (first), or x, nearly a ray of descent (second), has shown itself. */
static void F(rays)(const Problem *p, V lx, V ly, M *farkas, M *descent) {
    i64 n = p->n, rows = p->rows;
    V value = {0}, wrong = {0}, fall = {0}, outside = {0}, zero = {0};
    for (i64 i = 0; i < rows; i++) {
        value -= p->y[i] * p->q[i];
        outside = larger(outside, i < p->m ? larger(p->Kx[i], zero) : size_of(p->Kx[i]));
    }
    for (i64 j = 0; j < n; j++) {
        V push = p->Ky[j], end = select(push > 0, p->l[j], p->u[j]);
        M open = NOT(size_of(end) < INFINITY);
        value += select(open, zero, push * end);
        wrong = larger(wrong, keep(open, size_of(push)));
        fall += p->c[j] * p->x[j];
        if (p->P) outside = larger(outside, size_of(p->Px[j]));
        outside = larger(outside, keep(p->l[j] > -INFINITY, -p->x[j]));
        outside = larger(outside, keep(p->u[j] < INFINITY, p->x[j]));
    }
    *farkas = (ly > 1e3) & (value > 1e-6 * ly) & (wrong <= 1e-8 * ly);
    *descent = (lx > 1e3) & (fall < -1e-6 * lx) & (outside <= 1e-7 * lx);
}

static void F(products)(Problem *p, M anew) {
    if (!any(anew)) return;
    V *Kx = p->tmp_rows[0], *Ky = p->tmp_n[0];
    times(p, p->x, Kx);
    transposed(p, p->y, Ky);
    for (i64 i = 0; i < p->rows; i++) p->Kx[i] = select(anew, Kx[i], p->Kx[i]);
    for (i64 j = 0; j < p->n; j++) p->Ky[j] = select(anew, Ky[j], p->Ky[j]);
    if (!p->P) return;
    quadratic(p, p->x, Ky);
    for (i64 j = 0; j < p->n; j++) p->Px[j] = select(anew, Ky[j], p->Px[j]);
}

/* Predictor, corrector, and the step they lead to. */
static void F(step)(Problem *p) {
    i64 n = p->n, m = p->m, rows = p->rows;
    V a, b, one = (V){0} + 1, after = {0};
    for (i64 j = 0; j < n; j++) {
        p->tl[j] = -p->zl[j] * p->wl[j];
        p->tu[j] = -p->zu[j] * p->wu[j];
    }
    for (i64 i = 0; i < m; i++) p->ts[i] = -p->s[i] * p->y[i];
    F(newton)(p, 0);
    F(lengths)(p, &a, &b);
    a = 1 / larger(a, one), b = 1 / larger(b, one);
    if (p->P) a = b = lesser(a, b);
    for (i64 j = 0; j < n; j++) {
        after += (p->wl[j] + a * p->dx[j]) * (p->zl[j] + b * p->dzl[j]);
        after += (p->wu[j] - a * p->dx[j]) * (p->zu[j] + b * p->dzu[j]);
    }
    for (i64 i = 0; i < m; i++) after += (p->s[i] + a * p->ds[i]) * (p->y[i] + b * p->dy[i]);
    V ratio = lesser(keep(after > 0, after) / p->total, one), target = ratio * ratio * ratio * p->mu;
    V slow = select(lesser(a, b) < 0.1, one * 0.1, one); /* a corrector far longer than its step misleads */
    for (i64 j = 0; j < n; j++) {
        p->tl[j] += keep(p->zl[j] > 0, target - slow * p->dx[j] * p->dzl[j]);
        p->tu[j] += keep(p->zu[j] > 0, target + slow * p->dx[j] * p->dzu[j]);
    }
    for (i64 i = 0; i < m; i++) p->ts[i] += target - slow * p->ds[i] * p->dy[i];
    F(newton)(p, 3);
    F(lengths)(p, &a, &b);
    V share = larger(one * 0.99, 1 - p->mu);
    a = share / larger(a, share), b = share / larger(b, share);
    if (p->P) a = b = lesser(a, b);
    M reached = {0};
    for (i64 j = 0; j < n; j++) {
        V x = p->x[j] + a * p->dx[j];
        p->x[j] = x;
        p->zl[j] += b * p->dzl[j];
        p->zu[j] += b * p->dzu[j];
        p->Ky[j] += b * p->Kdy[j];
        if (p->P) p->Px[j] += a * p->Pdx[j];
        reached |= ((p->zl[j] > 0) & NOT(x > p->l[j])) | ((p->zu[j] > 0) & NOT(x < p->u[j]));
    }
    if (any(reached & p->live))
        for (i64 j = 0; j < n; j++)
            for (int k = 0; k < LANES; k++) { /* an end that rounding has reached */
                double *x = (double *)(p->x + j) + k, l = EACH(p->l[j], k), u = EACH(p->u[j], k);
                if (EACH(p->zl[j], k) > 0 && !(*x > l)) *x = nextafter(l, INFINITY);
                if (EACH(p->zu[j], k) > 0 && !(*x < u)) *x = nextafter(u, -INFINITY);
            }
    for (i64 i = 0; i < rows; i++) {
        if (i < m) p->s[i] += a * p->ds[i];
        p->y[i] += b * p->dy[i];
        p->Kx[i] += a * p->Kdx[i];
    }
    p->steps += 1;
}

#define LANE(v) (((double *)(v))[lane])
/* Problem k into a lane. */
static void F(load)(const Batch *a, Scaled *one, double *most_of, Problem *p, int lane, i64 k, int warm) {
    i64 n = p->n, rows = p->rows;
    prepare(a, k, one, most_of);
    first_point(a, k, one, warm);
    for (i64 i = 0; i < rows; i++)
        for (i64 j = 0; j < n; j++) LANE(p->K + i * p->N + j) = one->K[i * n + j];
    if (p->P)
        for (i64 i = 0; i < n; i++)
            for (i64 j = 0; j < n; j++) LANE(p->P + i * p->N + j) = one->P[i * n + j];
    double count = a->m;
    p->open[lane] = 0;
    for (i64 j = 0; j < n; j++) {
        LANE(p->c + j) = one->c[j], LANE(p->l + j) = one->l[j], LANE(p->u + j) = one->u[j];
        LANE(p->C + j) = one->C[j], LANE(p->width + j) = one->u[j] - one->l[j];
        LANE(p->x + j) = LANE(p->bestx + j) = one->x[j];
        LANE(p->zl + j) = one->zl[j], LANE(p->zu + j) = one->zu[j];
        LANE(p->Ky + j) = one->Ky[j];
        if (p->P) LANE(p->Px + j) = one->Px[j];
        ((i64 *)(p->fixed + j))[lane] = one->fixed[j] ? -1 : 0;
        count += (one->zl[j] > 0) + (one->zu[j] > 0);
        p->open[lane] |= !(one->u[j] - one->l[j] < INFINITY);
    }
    for (i64 i = 0; i < rows; i++) {
        LANE(p->q + i) = one->q[i], LANE(p->side + i) = one->side[i], LANE(p->s + i) = one->s[i];
        LANE(p->S_ + i) = one->idle[i] ? 0 : one->S[i];
        LANE(p->y + i) = LANE(p->besty + i) = one->y[i];
        LANE(p->Kx + i) = one->Kx[i];
    }
    LANE(&p->gamma) = one->gamma, LANE(&p->beta) = one->beta, LANE(&p->count) = most(count, 1e-300);
    LANE(&p->best) = INFINITY, LANE(&p->worse) = 0, LANE(&p->bump) = 1, LANE(&p->steps) = 0;
    ((i64 *)&p->live)[lane] = -1;
    p->at[lane] = k, p->warm[lane] = warm;
}

/* What a lane has found, in the problem's units; a warm start that failed is forgotten. */
static void F(finish)(const Batch *a, Problem *p, int lane, int status) {
    i64 n = p->n, rows = p->rows, k = p->at[lane];
    ((i64 *)&p->live)[lane] = 0;
    p->at[lane] = -1;
    p->again[lane] = p->warm[lane] && status != OPTIMAL ? k : -1;
    if (p->again[lane] >= 0) return;
    int shown = status == INFEASIBLE || status == UNBOUNDED;
    const V *x = shown ? p->x : p->bestx, *y = shown ? p->y : p->besty;
    for (i64 j = 0; j < n; j++) a->x[k * n + j] = LANE(x + j) * LANE(p->C + j) * LANE(&p->beta);
    for (i64 i = 0; i < rows; i++) a->y[k * rows + i] = LANE(y + i) * LANE(p->S_ + i) * LANE(&p->gamma);
    a->status[k] = status;
    a->iterations[k] = (i64)LANE(&p->steps);
}

/* Residuals and merits; lanes whose problem is settled are finished. */
static void F(judge)(const Batch *a, Problem *p) {
    V lx, ly, zero = {0};
    M anew = p->live;
    for (int lane = 0; lane < LANES; lane++) {
        i64 done = p->at[lane] < 0 ? 0 : (i64)LANE(&p->steps);
        if (!done || (done % FRESH && !p->open[lane])) ((i64 *)&anew)[lane] = 0;
    }
    F(products)(p, anew);
    V merit = F(look)(p, &lx, &ly);
    M better = p->live & (merit < p->best);
    p->best = select(better, merit, p->best);
    p->worse = select(better, zero, p->worse + 1);
    if (any(better)) {
        for (i64 j = 0; j < p->n; j++) p->bestx[j] = select(better, p->x[j], p->bestx[j]);
        for (i64 i = 0; i < p->rows; i++) p->besty[i] = select(better, p->y[i], p->besty[i]);
    }
    M farkas = p->live & (p->steps > 2) & ((lx > 1e3) | (ly > 1e3)), descent = farkas;
    if (any(farkas)) {
        M first, second;
        F(rays)(p, lx, ly, &first, &second);
        farkas &= first, descent &= second;
    }
    for (int lane = 0; lane < LANES; lane++) {
        if (p->at[lane] < 0) continue;
        int status = RUNNING;
        double now = LANE(&merit);
        if (!(now < INFINITY)) status = NUMERICAL;
        else if (now <= a->tol) status = OPTIMAL;
        else if (LANE(&p->worse) > 12 && LANE(&p->best) < 1e-6) status = ITERATION_LIMIT;
        else if (((i64 *)&farkas)[lane]) status = INFEASIBLE;
        else if (((i64 *)&descent)[lane]) status = UNBOUNDED;
        else if (LANE(&p->steps) >= a->limit) status = ITERATION_LIMIT;
        if (status != RUNNING) F(finish)(a, p, lane, status);
    }
}

static i64 F(next)(Batch *a) {
    i64 k;
#pragma omp atomic capture
    k = a->next++;
    return k < a->B ? k : -1;
}

/* Solve problems of the batch until none is left. */
static void F(work)(Batch *a, Scaled *one, double *most_of) {
    i64 n = a->n, rows = a->rows, N = n, L = rows;
    if (LANES == 1) N = (n + PAD - 1) / PAD * PAD, L = (rows + PAD - 1) / PAD * PAD;
    i64 r = a->by_rows ? L : N, Z = most(N, L);
    Problem p = {.n = n, .m = a->m, .rows = rows, .N = N, .L = L, .r = r, .q_ = a->by_rows ? n : rows, .by_rows = a->by_rows};
    V **along_n[] = {&p.c, &p.l, &p.u, &p.width, &p.C, &p.x, &p.zl, &p.zu, &p.wl, &p.wu, &p.il, &p.iu, &p.rd, &p.g, &p.dx,
                     &p.dzl, &p.dzu, &p.tl, &p.tu, &p.D, &p.Ky, &p.Px, &p.Kdy, &p.Pdx, &p.bx, &p.bestx, p.tmp_n, p.tmp_n + 1,
                     (V **)&p.fixed};
    V **along_rows[] = {&p.q, &p.side, &p.S_, &p.s, &p.y, &p.is, &p.iy, &p.rp, &p.h, &p.dy, &p.ds, &p.ts, &p.S, &p.Kx,
                        &p.Kdx, &p.by, &p.besty, p.tmp_rows, p.tmp_rows + 1};
    V **along_both[] = {&p.w, &p.w2, &p.omega, &p.inverse};
    i64 factors = LANES == 1 ? (p.q_ + r) * r : (p.q_ + r) * ((r + 3) / 4 * 4);
    i64 matrices = rows * N + (a->P ? n * N : 0) + factors;
    i64 size = (matrices + COUNT(along_n) * N + COUNT(along_rows) * L + COUNT(along_both) * Z) * sizeof(V) + 64;
    char *memory = malloc(size);
    if (!memory) return;
    memset(memory, 0, size);
    V *at = (V *)(memory + 64 - (uintptr_t)memory % 64);
    p.K = at, at += rows * N;
    if (a->P) p.P = at, at += n * N;
    p.B = at, p.R = at + p.q_ * r, at += factors;
    for (i64 i = 0; i < COUNT(along_n); i++) *along_n[i] = at, at += N;
    for (i64 i = 0; i < COUNT(along_rows); i++) *along_rows[i] = at, at += L;
    for (i64 i = 0; i < COUNT(along_both); i++) *along_both[i] = at, at += Z;
    for (int lane = 0; lane < LANES; lane++) p.at[lane] = p.again[lane] = -1;
    for (;;) {
        for (int lane = 0; lane < LANES; lane++) {
            if (p.at[lane] >= 0) continue;
            int cold = p.again[lane] >= 0;
            i64 k = cold ? p.again[lane] : F(next)(a);
            p.again[lane] = -1;
            if (k >= 0) F(load)(a, one, most_of, &p, lane, k, !cold && a->x0);
        }
        if (!any(p.live)) break;
        F(judge)(a, &p);
        M broken;
        while (any(broken = p.live & F(factorise)(&p))) {
            p.bump = select(broken, 100 * p.bump, p.bump);
            for (int lane = 0; lane < LANES; lane++)
                if (((i64 *)&broken)[lane] && LANE(&p.bump) >= 1e9) F(finish)(a, &p, lane, NUMERICAL);
        }
        if (any(p.live)) F(step)(&p);
    }
    free(memory);
}

#undef F
#undef Problem
#undef select
#undef keep
#undef lesser
#undef larger
#undef size_of
#undef NOT
#undef EACH
#undef any
#undef root
#undef PANEL
#undef AT
#undef times
#undef transposed
#undef quadratic
#undef LANE
#endif
