/* The Newton system: its factor, its solutions, and how far they lead. */
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
            F(fill)(p, j, root(p->omega[j]), p->K + j, p->N, rows);
        }
        for (i64 i = 0; i < r; i++) diag[i] = i < rows ? p->S[i] + delta : (V){0} + 1;
        return F(factor)(p, diag);
    }
    for (i64 i = 0; i < rows; i++) {
        p->omega[i] = 1 / (p->S[i] + delta);
        F(fill)(p, i, root(p->omega[i]), p->K + i * p->N, 1, p->N);
    }
    for (i64 j = 0; j < r; j++) diag[j] = j < n ? select(p->fixed[j], (V){0} + 1e30, p->D[j] + rho) : (V){0} + 1;
    return F(factor)(p, diag);
}

/* K x. */
static void F(times)(const Problem *p, const V *x, V *out) {
    i64 i = 0, N = p->N;
    for (; i + 8 <= p->rows; i += 8) F(dots)(p->K + i * N, N, N, x, out + i, 8);
    for (; i < p->rows; i++) F(dots)(p->K + i * N, N, N, x, out + i, 1);
}

/* K^T y. */
static void F(transposed)(const Problem *p, const V *y, V *out) {
    i64 i = 0, N = p->N;
    memset(out, 0, N * sizeof(V));
    for (; i + 8 <= p->rows; i += 8) F(adds)(p->K + i * N, N, N, y + i, out, 8);
    for (; i < p->rows; i++) F(adds)(p->K + i * N, N, N, y + i, out, 1);
}

INLINE void F(part)(const Problem *p, i64 i, const V *x, const V *h, V *Kx, V *y, V *back, const int rows) {
    const V *K = p->K + i * p->N;
    F(dots)(K, p->N, p->N, x, Kx + i, rows);
    for (int o = 0; o < rows; o++) y[i + o] = p->omega[i + o] * (Kx[i + o] - h[i + o]);
    if (back) F(adds)(K, p->N, p->N, y + i, back, rows);
}

/* K x and y = omega (K x - h), where asked for with K^T y: rows are read once. */
static void F(there)(const Problem *p, const V *x, const V *h, V *Kx, V *y, V *back) {
    i64 i = 0;
    if (back) memset(back, 0, p->N * sizeof(V));
    for (; i + 8 <= p->rows; i += 8) F(part)(p, i, x, h, Kx, y, back, 8);
    for (; i < p->rows; i++) F(part)(p, i, x, h, Kx, y, back, 1);
}

/* (dx, dy) of the regularised system for right-hand sides g, h, with K dx or, by rows, K^T dy; if `whole`, with both. */
static void F(direction)(Problem *p, const V *g, const V *h, V *dx, V *dy, V *Kdx, V *Kdy, int whole) {
    i64 n = p->n, rows = p->rows;
    V *w = p->w;
    if (p->by_rows) {
        for (i64 j = 0; j < n; j++) p->w2[j] = p->omega[j] * g[j];
        F(times)(p, p->w2, w);
        for (i64 i = 0; i < p->r; i++) w[i] = i < rows ? w[i] - h[i] : (V){0};
        F(solve)(p, w);
        for (i64 i = 0; i < rows; i++) dy[i] = w[i];
        F(transposed)(p, dy, Kdy);
        for (i64 j = 0; j < n; j++) dx[j] = p->omega[j] * (g[j] - Kdy[j]);
        if (whole) F(times)(p, dx, Kdx);
        return;
    }
    for (i64 i = 0; i < rows; i++) p->w2[i] = p->omega[i] * h[i];
    F(transposed)(p, p->w2, w);
    for (i64 j = 0; j < n; j++) w[j] = keep(NOT(p->fixed[j]), w[j] + g[j]);
    F(solve)(p, w);
    for (i64 j = 0; j < n; j++) dx[j] = keep(NOT(p->fixed[j]), w[j]);
    F(there)(p, dx, h, Kdx, dy, whole ? Kdy : 0);
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
    F(direction)(p, p->g, p->h, p->dx, p->dy, p->Kdx, p->Kdy, rounds > 0);
    if (rounds) quadratic(p, p->dx, p->Pdx);
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
        F(direction)(p, p->bx, p->by, more_x, more_y, Kmore, more_K, 1);
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
