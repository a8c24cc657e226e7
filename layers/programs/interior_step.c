/* What a point is worth, and the step to the next. */
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
    F(times)(p, p->x, Kx);
    F(transposed)(p, p->y, Ky);
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
    /* Below 1: on a bound its price would be 0, which says that there is none. */
    V share = lesser(larger(one * 0.99, 1 - p->mu), one * (1 - 0x1p-40));
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
