/* Mehrotra's predictor-corrector for min c.x + x.P x / 2, A x <= b, E x = d, l <= x <= u: one problem a thread, in cache.

   With K = [A; E], slacks s of its inequalities and multipliers y, z_l, z_u the Newton system is

       (P + D) dx + K^T dy = g,   K dx - S dy = h,   D = z_l / (x - l) + z_u / (u - x),  S = s / y (0 for equalities).

   It is regularised (D + RHO, S + DELTA; Friedlander & Orban 2012), reduced to n x n by eliminating dy or, where P = 0
   and every variable has a bound and rows are fewer, to rows x rows by eliminating dx; the residual of the system
   itself is then refined away. Source of the method: Mehrotra 1992, "On the implementation of a primal-dual interior
   point method"; scaling: Ruiz 2001. */
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
#define PAD 8
#define RHO 1e-11
#define DELTA 1e-10
#define NO_LIMIT 1e20
enum { OPTIMAL = 0, ITERATION_LIMIT = 1, INFEASIBLE = 3, UNBOUNDED = 4, NUMERICAL = 5 };

static double least(double a, double b) { return a < b ? a : b; }
static double most(double a, double b) { return a > b ? a : b; }

static double dot(const double *a, const double *b, i64 n) {
    vec t = {0};
    i64 i = 0;
    for (; i + W <= n; i += W) t += *(const vec *)(a + i) * *(const vec *)(b + i);
    double sum = 0;
    for (int k = 0; k < W; k++) sum += t[k];
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* One tile of 8 rows and `parts` vectors of B^T omega B + P - R^T R. */
static inline __attribute__((always_inline)) void tile(const double *B, const double *wB, i64 q, i64 r, const double *P,
                                                        const double *diag, double *R, i64 j, i64 k, const int parts) {
    vec sum[8][2];
    for (int t = 0; t < 8; t++)
        for (int p = 0; p < parts; p++) sum[t][p] = P ? *(const vec *)(P + (j + t) * r + k + p * W) : (vec){0};
    for (i64 i = 0; i < q; i++)
        for (int t = 0; t < 8; t++)
            for (int p = 0; p < parts; p++) sum[t][p] += wB[i * r + j + t] * *(const vec *)(B + i * r + k + p * W);
    for (i64 i = 0; i < j; i++)
        for (int t = 0; t < 8; t++)
            for (int p = 0; p < parts; p++) sum[t][p] -= R[i * r + j + t] * *(const vec *)(R + i * r + k + p * W);
    for (int t = 0; t < 8; t++)
        for (int p = 0; p < parts; p++) *(vec *)(R + (j + t) * r + k + p * W) = sum[t][p];
    for (int t = 0; t < 8; t++)
        if (j + t >= k && j + t < k + parts * W) R[(j + t) * r + j + t] += diag[j + t];
}

/* R^T R = P + diag + B^T omega B, upper R row by row, r a multiple of 8; wB = omega B. 0 where it breaks down. */
static int factor(const double *B, const double *wB, i64 q, i64 r, const double *P, const double *diag, double *R) {
    for (i64 j = 0; j < r; j += 8) {
        i64 k = j;
        for (; k + 2 * W <= r; k += 2 * W) tile(B, wB, q, r, P, diag, R, j, k, 2);
        for (; k < r; k += W) tile(B, wB, q, r, P, diag, R, j, k, 1);
        for (int t = 0; t < 8; t++) {
            double *row = R + (j + t) * r;
            for (int o = 0; o < t; o++) {
                const double *other = R + (j + o) * r;
                double f = other[j + t];
                for (i64 i = j; i < r; i++) row[i] -= f * other[i];
            }
            if (!(row[j + t] > 1e-300) || row[j + t] > 1e300) return 0;
            double f = 1 / sqrt(row[j + t]);
            for (i64 i = j; i < r; i++) row[i] *= f;
        }
    }
    return 1;
}

static void solve(const double *R, i64 r, double *g) {
    for (i64 i = 0; i < r; i++) {
        double z = g[i] /= R[i * r + i];
        for (i64 k = i + 1; k < r; k++) g[k] -= z * R[i * r + k];
    }
    for (i64 i = r - 1; i >= 0; i--) g[i] = (g[i] - dot(R + i * r + i + 1, g + i + 1, r - i - 1)) / R[i * r + i];
}

typedef struct {
    i64 n, m, rows, N, L, r, by_rows; /* N, L: n and rows padded; r: the size of the factor */
    double *K, *T, *P, *wB, *R;       /* K [rows, N], T = K^T [n, L] where needed, P [N, N] or none */
    double *c, *q, *l, *u, *C, *S_, *omega, *diag, *work, *work2;
    double *x, *s, *y, *zl, *zu, *rd, *rp, *g, *h, *dx, *dy, *ds, *dzl, *dzu, *tl, *tu, *ts, *D, *S, *e1, *e2;
    double *bx, *by, *z0;
    double gamma, beta;
    char *idle, *fixed;
} Problem;

static void times(const Problem *p, const double *x, double *out) {
    for (i64 i = 0; i < p->rows; i++) out[i] = dot(p->K + i * p->N, x, p->N);
}

static void add_transposed(const Problem *p, const double *y, double *out) {
    for (i64 i = 0; i < p->rows; i++) {
        double f = y[i];
        const double *row = p->K + i * p->N;
        if (f != 0)
            for (i64 j = 0; j < p->N; j++) out[j] += f * row[j];
    }
}

static void add_quadratic(const Problem *p, const double *x, double sign, double *out) {
    if (p->P)
        for (i64 j = 0; j < p->n; j++) out[j] += sign * dot(p->P + j * p->N, x, p->N);
}

/* Ruiz's scaling of rows and columns, then of costs and sides; idle rows become rows of zeros. */
static void prepare(Problem *p, const double *c, const double *A, const double *b, const double *E, const double *d,
                    const double *l, const double *u, const double *P) {
    i64 n = p->n, N = p->N, rows = p->rows, m = p->m;
    for (i64 i = 0; i < rows; i++) {
        const double *from = i < m ? A + i * n : E + (i - m) * n;
        double *row = p->K + i * N, reach = 0;
        p->q[i] = i < m ? b[i] : d[i - m];
        for (i64 j = 0; j < n; j++) {
            row[j] = from[j];
            reach += row[j] > 0 ? row[j] * u[j] : row[j] < 0 ? row[j] * l[j] : 0;
        }
        for (i64 j = n; j < N; j++) row[j] = 0;
        p->idle[i] = i < m && (p->q[i] >= NO_LIMIT || p->q[i] > 2 * fabs(reach) + 1);
        if (p->idle[i]) memset(row, 0, N * sizeof(double)), p->q[i] = 1;
        p->S_[i] = 1;
    }
    for (i64 j = 0; j < N; j++) p->C[j] = 1;
    for (int round = 0; round < 4; round++) {
        double *most_of = p->work;
        memset(most_of, 0, N * sizeof(double));
        for (i64 i = 0; i < rows; i++) {
            double *row = p->K + i * N, top = 0;
            for (i64 j = 0; j < N; j++) top = most(top, fabs(row[j]));
            double f = top > 0 ? 1 / sqrt(top) : 1;
            p->S_[i] *= f;
            for (i64 j = 0; j < N; j++) {
                row[j] *= f;
                most_of[j] = most(most_of[j], fabs(row[j]));
            }
        }
        for (i64 j = 0; j < n; j++) {
            most_of[j] = most_of[j] > 0 ? 1 / sqrt(most_of[j]) : 1;
            p->C[j] *= most_of[j];
        }
        for (i64 i = 0; i < rows; i++)
            for (i64 j = 0; j < n; j++) p->K[i * N + j] *= most_of[j];
    }
    double gamma = 0, beta = 0;
    for (i64 j = 0; j < n; j++) gamma = most(gamma, fabs(p->c[j] = c[j] * p->C[j]));
    for (i64 i = 0; i < rows; i++)
        if (!p->idle[i]) beta = most(beta, fabs(p->q[i] *= p->S_[i]));
    if (P)
        for (i64 i = 0; i < n; i++) {
            for (i64 j = 0; j < n; j++) gamma = most(gamma, fabs(p->P[i * N + j] = P[i * n + j] * p->C[i] * p->C[j]));
            for (i64 j = n; j < N; j++) p->P[i * N + j] = 0;
        }
    if (beta == 0)
        for (i64 j = 0; j < n; j++) {
            if (isfinite(l[j])) beta = most(beta, fabs(l[j] / p->C[j]));
            if (isfinite(u[j])) beta = most(beta, fabs(u[j] / p->C[j]));
        }
    p->gamma = gamma > 0 ? gamma : 1;
    p->beta = beta > 0 ? beta : 1;
    for (i64 j = 0; j < N; j++) {
        int real = j < n;
        p->c[j] = real ? p->c[j] / p->gamma : 0;
        p->l[j] = real ? l[j] / p->C[j] / p->beta : 0;
        p->u[j] = real ? u[j] / p->C[j] / p->beta : 0;
        p->fixed[j] = !real || (isfinite(p->l[j]) && !(p->u[j] - p->l[j] > 1e-14 * (1 + fabs(p->l[j]))));
        p->by_rows = p->by_rows && (p->fixed[j] || isfinite(p->l[j]) || isfinite(p->u[j]));
    }
    for (i64 i = 0; i < rows; i++)
        if (!p->idle[i]) p->q[i] /= p->beta;
    if (P)
        for (i64 i = 0; i < n * N; i++) p->P[i] *= p->beta / p->gamma;
    p->r = p->by_rows ? p->L : N;
    if (p->by_rows) {
        memset(p->T, 0, n * p->L * sizeof(double));
        for (i64 i = 0; i < rows; i++)
            for (i64 j = 0; j < n; j++) p->T[j * p->L + i] = p->K[i * N + j];
    }
}

static void start(Problem *p) {
    for (i64 j = 0; j < p->N; j++) {
        double l = p->l[j], u = p->u[j], x = 0;
        int has_l = isfinite(l), has_u = isfinite(u);
        if (p->fixed[j]) x = has_l ? l : u;
        else if (has_l && has_u) {
            double room = least(1, 0.5 * (u - l));
            x = least(most(0, l + room), u - room);
        } else if (has_l) x = most(0, l + 1);
        else if (has_u) x = least(0, u - 1);
        p->x[j] = x;
        p->zl[j] = has_l && !p->fixed[j] ? 1 : 0;
        p->zu[j] = has_u && !p->fixed[j] ? 1 : 0;
    }
    times(p, p->x, p->s);
    for (i64 i = 0; i < p->rows; i++) {
        p->s[i] = i < p->m ? most(p->q[i] - p->s[i], 1) : 0;
        p->y[i] = i < p->m ? (p->idle[i] ? 1e-12 : 1) : 0;
    }
}

static void residuals(Problem *p) {
    for (i64 j = 0; j < p->N; j++) p->rd[j] = p->c[j] - p->zl[j] + p->zu[j];
    add_quadratic(p, p->x, 1, p->rd);
    add_transposed(p, p->y, p->rd);
    for (i64 j = 0; j < p->N; j++)
        if (p->fixed[j]) p->rd[j] = 0;
    times(p, p->x, p->rp);
    for (i64 i = 0; i < p->rows; i++) p->rp[i] += p->s[i] - p->q[i];
}

static int factorise(Problem *p, double bump) {
    for (i64 j = 0; j < p->N; j++) {
        double d = 0;
        if (p->zl[j] > 0) d += p->zl[j] / (p->x[j] - p->l[j]);
        if (p->zu[j] > 0) d += p->zu[j] / (p->u[j] - p->x[j]);
        p->D[j] = p->fixed[j] ? 0 : least(d, 1e25);
    }
    for (i64 i = 0; i < p->rows; i++) p->S[i] = i < p->m ? least(p->s[i] / p->y[i], 1e25) : 0;
    double rho = RHO * bump, delta = DELTA * bump;
    const double *base = p->by_rows ? p->T : p->K;
    i64 q = p->by_rows ? p->n : p->rows;
    for (i64 i = 0; i < q; i++) {
        if (p->by_rows) p->omega[i] = p->fixed[i] ? 0 : 1 / (p->D[i] + rho);
        else p->omega[i] = 1 / (p->S[i] + delta);
        for (i64 j = 0; j < p->r; j++) p->wB[i * p->r + j] = p->omega[i] * base[i * p->r + j];
    }
    for (i64 j = 0; j < p->r; j++) {
        if (p->by_rows) p->diag[j] = j < p->rows ? p->S[j] + delta : 1;
        else p->diag[j] = p->fixed[j] ? 1e30 : p->D[j] + rho;
    }
    return factor(base, p->wB, q, p->r, p->by_rows ? 0 : p->P, p->diag, p->R);
}

/* (dx, dy) of the regularised system for right-hand sides g, h. */
static void direction(Problem *p, const double *g, const double *h, double *dx, double *dy) {
    double *w = p->work;
    if (p->by_rows) {
        for (i64 j = 0; j < p->N; j++) p->work2[j] = j < p->n ? p->omega[j] * g[j] : 0;
        times(p, p->work2, w);
        for (i64 i = 0; i < p->L; i++) w[i] = i < p->rows ? w[i] - h[i] : 0;
        solve(p->R, p->L, w);
        memcpy(dy, w, p->rows * sizeof(double));
        memset(p->work2, 0, p->N * sizeof(double));
        add_transposed(p, dy, p->work2);
        for (i64 j = 0; j < p->N; j++) dx[j] = j < p->n ? p->omega[j] * (g[j] - p->work2[j]) : 0;
        return;
    }
    memcpy(w, g, p->N * sizeof(double));
    for (i64 i = 0; i < p->rows; i++) p->work2[i] = p->omega[i] * h[i];
    add_transposed(p, p->work2, w);
    for (i64 j = 0; j < p->N; j++)
        if (p->fixed[j]) w[j] = 0;
    solve(p->R, p->N, w);
    for (i64 j = 0; j < p->N; j++) dx[j] = p->fixed[j] ? 0 : w[j];
    times(p, dx, dy);
    for (i64 i = 0; i < p->rows; i++) dy[i] = p->omega[i] * (dy[i] - h[i]);
}

static void newton(Problem *p, int refine) {
    double size = 1e-300;
    for (i64 j = 0; j < p->N; j++) {
        double g = -p->rd[j];
        if (p->zl[j] > 0) g += p->tl[j] / (p->x[j] - p->l[j]);
        if (p->zu[j] > 0) g -= p->tu[j] / (p->u[j] - p->x[j]);
        p->g[j] = p->fixed[j] ? 0 : g;
    }
    for (i64 i = 0; i < p->rows; i++) {
        p->h[i] = -p->rp[i] - (i < p->m ? p->ts[i] / p->y[i] : 0);
        size = most(size, fabs(p->h[i]));
    }
    direction(p, p->g, p->h, p->dx, p->dy);
    double before = INFINITY;
    for (int round = 0; round < refine; round++) {
        double worst = 0, biggest = 1e-300;
        for (i64 j = 0; j < p->N; j++) p->e1[j] = 0;
        add_quadratic(p, p->dx, -1, p->e1);
        memset(p->work2, 0, p->N * sizeof(double));
        add_transposed(p, p->dy, p->work2);
        for (i64 j = 0; j < p->N; j++) {
            p->e1[j] = p->fixed[j] ? 0 : p->e1[j] + p->g[j] - p->D[j] * p->dx[j] - p->work2[j];
            worst = most(worst, fabs(p->e1[j]) / (1 + p->D[j]));
        }
        times(p, p->dx, p->e2);
        for (i64 i = 0; i < p->rows; i++) {
            p->e2[i] = p->h[i] - p->e2[i] + p->S[i] * p->dy[i];
            worst = most(worst, fabs(p->e2[i]) / (1 + p->S[i]));
        }
        for (i64 j = 0; j < p->N; j++) biggest = most(biggest, fabs(p->rd[j]));
        for (i64 i = 0; i < p->rows; i++) biggest = most(biggest, fabs(p->rp[i]));
        if (!(worst > 1e-3 * biggest) || worst < 1e-15 || !(worst < 0.5 * before)) break;
        before = worst;
        direction(p, p->e1, p->e2, p->bx, p->by);
        for (i64 j = 0; j < p->N; j++) p->dx[j] += p->bx[j];
        for (i64 i = 0; i < p->rows; i++) p->dy[i] += p->by[i];
    }
    for (i64 j = 0; j < p->N; j++) {
        p->dzl[j] = p->zl[j] > 0 ? (p->tl[j] - p->zl[j] * p->dx[j]) / (p->x[j] - p->l[j]) : 0;
        p->dzu[j] = p->zu[j] > 0 ? (p->tu[j] + p->zu[j] * p->dx[j]) / (p->u[j] - p->x[j]) : 0;
    }
    for (i64 i = 0; i < p->rows; i++) p->ds[i] = i < p->m ? (p->ts[i] - p->s[i] * p->dy[i]) / p->y[i] : 0;
}

static void lengths(const Problem *p, double *primal, double *dual) {
    double a = 1e30, b = 1e30;
    for (i64 j = 0; j < p->n; j++) {
        if (p->zl[j] > 0) {
            if (p->dx[j] < 0) a = least(a, (p->x[j] - p->l[j]) / -p->dx[j]);
            if (p->dzl[j] < 0) b = least(b, p->zl[j] / -p->dzl[j]);
        }
        if (p->zu[j] > 0) {
            if (p->dx[j] > 0) a = least(a, (p->u[j] - p->x[j]) / p->dx[j]);
            if (p->dzu[j] < 0) b = least(b, p->zu[j] / -p->dzu[j]);
        }
    }
    for (i64 i = 0; i < p->m; i++) {
        if (p->ds[i] < 0) a = least(a, p->s[i] / -p->ds[i]);
        if (p->dy[i] < 0) b = least(b, p->y[i] / -p->dy[i]);
    }
    *primal = a, *dual = b;
}

static double complementarity(const Problem *p, double a, double b) {
    double sum = 0;
    for (i64 j = 0; j < p->n; j++) {
        if (p->zl[j] > 0) sum += (p->x[j] + a * p->dx[j] - p->l[j]) * (p->zl[j] + b * p->dzl[j]);
        if (p->zu[j] > 0) sum += (p->u[j] - p->x[j] - a * p->dx[j]) * (p->zu[j] + b * p->dzu[j]);
    }
    for (i64 i = 0; i < p->m; i++) sum += (p->s[i] + a * p->ds[i]) * (p->y[i] + b * p->dy[i]);
    return sum;
}

/* Whether y, nearly a Farkas ray, or x, nearly a ray of descent, has shown itself. */
static int ray(const Problem *p, double *w) {
    double size = 1e-300, value = 0, wrong = 0;
    for (i64 i = 0; i < p->rows; i++) size = most(size, fabs(p->y[i])), value -= p->y[i] * p->q[i];
    if (size > 1e3) {
        memset(w, 0, p->N * sizeof(double));
        add_transposed(p, p->y, w);
        for (i64 j = 0; j < p->n; j++) {
            double end = w[j] > 0 ? p->l[j] : p->u[j];
            if (isfinite(end)) value += w[j] * end;
            else wrong = most(wrong, fabs(w[j]));
        }
        if (value > 1e-6 * size && wrong <= 1e-8 * size) return INFEASIBLE;
    }
    size = 1e-300, value = wrong = 0;
    for (i64 j = 0; j < p->n; j++) size = most(size, fabs(p->x[j])), value += p->c[j] * p->x[j];
    if (size > 1e3 && value < -1e-6 * size) {
        times(p, p->x, w);
        for (i64 i = 0; i < p->rows; i++) wrong = most(wrong, i < p->m ? (p->idle[i] ? 0 : w[i]) : fabs(w[i]));
        memset(w, 0, p->N * sizeof(double));
        add_quadratic(p, p->x, 1, w);
        for (i64 j = 0; j < p->n; j++) wrong = most(wrong, fabs(w[j]));
        for (i64 j = 0; j < p->n; j++) {
            if (isfinite(p->l[j])) wrong = most(wrong, -p->x[j]);
            if (isfinite(p->u[j])) wrong = most(wrong, p->x[j]);
        }
        if (wrong <= 1e-7 * size) return UNBOUNDED;
    }
    return OPTIMAL;
}

static int run(Problem *p, i64 limit, double tol, i64 *iterations) {
    double count = 1e-300, best = INFINITY, bump = 1;
    int status = ITERATION_LIMIT, worse = 0;
    for (i64 j = 0; j < p->n; j++) count += (p->zl[j] > 0) + (p->zu[j] > 0);
    count += p->m;
    memset(p->dx, 0, p->N * sizeof(double)), memset(p->dzl, 0, p->N * sizeof(double));
    memset(p->dzu, 0, p->N * sizeof(double)), memset(p->ds, 0, p->L * sizeof(double));
    memset(p->dy, 0, p->L * sizeof(double));
    i64 step = 0;
    for (;; step++) {
        residuals(p);
        double total = complementarity(p, 0, 0), value = 0, charge = total, violation = 0;
        for (i64 j = 0; j < p->n; j++) {
            double width = p->u[j] - p->l[j];
            value += p->c[j] * p->x[j];
            charge += fabs(p->rd[j]) * (isfinite(width) ? width : fabs(p->x[j]) + 1);
        }
        for (i64 i = 0; i < p->rows; i++) {
            charge += fabs(p->y[i] * p->rp[i]);
            double side = most(1, fabs(p->q[i] * p->beta / p->S_[i]));
            violation = most(violation, fabs(p->rp[i]) * p->beta / p->S_[i] / side);
        }
        double unit = p->gamma * p->beta, quadratic = 0;
        if (p->P) {
            memset(p->work, 0, p->N * sizeof(double));
            add_quadratic(p, p->x, 1, p->work);
            quadratic = 0.5 * dot(p->work, p->x, p->N);
        }
        double gap = charge * unit / most(1, fabs(value + quadratic) * unit);
        double merit = most(gap, violation);
        if (!(merit < INFINITY)) { status = NUMERICAL; break; }
        if (merit < best) {
            best = merit, worse = 0;
            memcpy(p->z0, p->x, p->N * sizeof(double));
            memcpy(p->z0 + p->N, p->y, p->rows * sizeof(double));
        } else if (++worse > 12 && best < 1e-6) break;
        if (merit <= tol) { status = OPTIMAL; break; }
        int shown = step > 2 ? ray(p, p->work) : OPTIMAL;
        if (shown) {
            status = shown;
            memcpy(p->z0, p->x, p->N * sizeof(double));
            memcpy(p->z0 + p->N, p->y, p->rows * sizeof(double));
            break;
        }
        if (step == limit) break;
        while (!factorise(p, bump) && bump < 1e9) bump *= 100;
        if (bump >= 1e9) { status = NUMERICAL; break; }
        double mu = total / count, a, b, target;
        for (i64 j = 0; j < p->N; j++) {
            p->tl[j] = -p->zl[j] * (p->zl[j] > 0 ? p->x[j] - p->l[j] : 0);
            p->tu[j] = -p->zu[j] * (p->zu[j] > 0 ? p->u[j] - p->x[j] : 0);
        }
        for (i64 i = 0; i < p->m; i++) p->ts[i] = -p->s[i] * p->y[i];
        newton(p, 0);
        lengths(p, &a, &b);
        a = least(a, 1), b = least(b, 1);
        if (p->P) a = b = least(a, b);
        double after = most(complementarity(p, a, b), 0) / count;
        double ratio = least(after / mu, 1);
        target = ratio * ratio * ratio * mu;
        double slow = least(a, b) < 0.1 ? 0.1 : 1; /* a corrector far longer than its step misleads */
        for (i64 j = 0; j < p->N; j++) {
            p->tl[j] += p->zl[j] > 0 ? target - slow * p->dx[j] * p->dzl[j] : 0;
            p->tu[j] += p->zu[j] > 0 ? target + slow * p->dx[j] * p->dzu[j] : 0;
        }
        for (i64 i = 0; i < p->m; i++) p->ts[i] += target - slow * p->ds[i] * p->dy[i];
        newton(p, 3);
        lengths(p, &a, &b);
        double keep = most(0.99, 1 - mu);
        a = least(keep * a, 1), b = least(keep * b, 1);
        if (p->P) a = b = least(a, b);
        for (i64 j = 0; j < p->N; j++) {
            p->x[j] += a * p->dx[j];
            p->zl[j] += b * p->dzl[j];
            p->zu[j] += b * p->dzu[j];
            /* an end that rounding has reached */
            if (p->zl[j] > 0 && !(p->x[j] > p->l[j])) p->x[j] = nextafter(p->l[j], INFINITY);
            if (p->zu[j] > 0 && !(p->x[j] < p->u[j])) p->x[j] = nextafter(p->u[j], -INFINITY);
        }
        for (i64 i = 0; i < p->rows; i++) {
            p->s[i] += a * p->ds[i];
            p->y[i] += b * p->dy[i];
        }
    }
    *iterations = step;
    return status;
}

static double *take(double **from, i64 count) {
    double *here = *from;
    *from += count;
    return here;
}

/* x [B, n], y [B, m + p]; shared matrices are [m, n], [p, n], [n, n]; P may be null. */
void interior_f64(const double *c, const double *A, const double *b, const double *E, const double *d, const double *l,
                  const double *u, const double *P, double *x, double *y, i64 *status, i64 *iterations, i64 B, i64 n,
                  i64 m, i64 p, i64 shared_a, i64 shared_e, i64 shared_p, i64 limit, double tol, i64 threads) {
    i64 rows = m + p, N = (n + PAD - 1) / PAD * PAD, L = (rows + PAD - 1) / PAD * PAD + (rows == 0) * PAD;
    i64 by_rows = !P && rows < n, big = by_rows ? (N > L ? N : L) : N;
    i64 matrices = L * N + (by_rows ? n * L : 0) + (P ? N * N : 0) + (by_rows ? most(n * L, rows * N) : L * N) + big * big;
    i64 size = matrices + 40 * (N + L) + 64;
#pragma omp parallel num_threads(threads < B ? (int)threads : (int)(B > 0 ? B : 1))
    {
        double *memory = malloc(size * sizeof(double));
        char *flags = malloc(N + L + 1);
#pragma omp for schedule(dynamic, 1)
        for (i64 k = 0; k < B; k++) {
            if (!memory || !flags) { status[k] = NUMERICAL, iterations[k] = 0; continue; }
            memset(memory, 0, size * sizeof(double));
            Problem q = {.n = n, .m = m, .rows = rows, .N = N, .L = L, .by_rows = by_rows, .idle = flags, .fixed = flags + L};
            double *at = memory;
            q.K = take(&at, L * N);
            q.T = by_rows ? take(&at, n * L) : 0;
            q.P = P ? take(&at, N * N) : 0;
            q.wB = take(&at, by_rows ? (i64)most(n * L, rows * N) : L * N);
            q.R = take(&at, big * big);
            double **each[] = {&q.c, &q.q, &q.l, &q.u, &q.C, &q.S_, &q.omega, &q.diag, &q.work, &q.work2, &q.x, &q.s,
                               &q.y, &q.zl, &q.zu, &q.rd, &q.rp, &q.g, &q.h, &q.dx, &q.dy, &q.ds, &q.dzl, &q.dzu, &q.tl,
                               &q.tu, &q.ts, &q.D, &q.S, &q.e1, &q.e2, &q.bx, &q.by, &q.z0};
            for (unsigned i = 0; i < sizeof each / sizeof *each; i++) *each[i] = take(&at, N + L);
            prepare(&q, c + k * n, A + (shared_a ? 0 : k * m * n), b + k * m, E + (shared_e ? 0 : k * p * n), d + k * p,
                    l + k * n, u + k * n, P ? P + (shared_p ? 0 : k * n * n) : 0);
            start(&q);
            status[k] = run(&q, limit, tol, iterations + k);
            for (i64 j = 0; j < n; j++) x[k * n + j] = q.z0[j] * q.C[j] * q.beta;
            for (i64 i = 0; i < rows; i++) y[k * rows + i] = q.idle[i] ? 0 : q.z0[N + i] * q.S_[i] * q.gamma;
        }
        free(memory);
        free(flags);
    }
}
