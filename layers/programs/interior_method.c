/* The method for values V of LANES problems; the parts that know how matrices lie are written twice. */
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
#include "interior_alone.c"
#else
#include "interior_beside.c"
#endif
#define quadratic F(quadratic)
#include "interior_newton.c"
#include "interior_step.c"
#include "interior_work.c"

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
#undef VEC
#undef CVEC
#undef quadratic
#undef LANE
