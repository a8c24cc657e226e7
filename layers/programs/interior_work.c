/* Problems into lanes and out of them. */
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
