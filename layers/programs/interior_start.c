/* Before the first step: a problem is scaled, and gets its first point. */
/* Half the width of a box whose ends are all finite, on average; at most 1, and 1 where there is none. */
static double room_of(const Scaled *p, i64 n) {
    double sum = 0, count = 0;
    for (i64 j = 0; j < n; j++) {
        double half = 0.5 * (p->u[j] - p->l[j]);
        if (half < INFINITY && !p->fixed[j]) sum += half, count++;
    }
    return sum > 0 ? least(sum / count, 1) : 1;
}

/* Cold: off the ends, slacks as large as the box is, the products of slacks and prices alike. Warm: at a former point,
   its slacks and prices kept off 0. */
static void first_point(const Batch *a, i64 k, Scaled *p, int warm) {
    i64 n = a->n, m = a->m, rows = a->rows;
    const double room = warm ? WARM : room_of(p, n), mu = CENTRE * room, off = warm ? WARM : 1;
    const double *x0 = a->x0 + k * n, *y0 = a->y0 + k * rows;
    for (i64 j = 0; j < n; j++) {
        double l = p->l[j], u = p->u[j], x = warm ? x0[j] / p->C[j] / p->beta : 0;
        int has_l = isfinite(l), has_u = isfinite(u);
        if (p->fixed[j]) x = has_l ? l : u;
        else if (has_l && has_u) {
            double inner = least(off, 0.5 * (u - l));
            x = least(most(x, l + inner), u - inner);
        } else if (has_l) x = most(x, l + off);
        else if (has_u) x = least(x, u - off);
        p->x[j] = x;
    }
    memset(p->Ky, 0, n * sizeof(double));
    for (i64 i = 0; i < rows; i++) {
        const double *row = p->K + i * n;
        double y = warm && !p->idle[i] ? y0[i] / p->S[i] / p->gamma : 0;
        p->Kx[i] = dot(row, p->x, n);
        p->s[i] = i < m ? most(p->q[i] - p->Kx[i], room) : 0;
        if (i < m) y = p->idle[i] ? 1e-12 : warm ? most(y, WARM) : mu / p->s[i];
        p->y[i] = y;
        if (y != 0) add(p->Ky, y, row, n);
    }
    for (i64 j = 0; j < n; j++) {
        if (p->P) p->Px[j] = dot(p->P + j * n, p->x, n);
        double r = warm ? p->c[j] + p->Ky[j] + (p->P ? p->Px[j] : 0) : 0, below = p->x[j] - p->l[j], above = p->u[j] - p->x[j];
        p->zl[j] = isfinite(p->l[j]) && !p->fixed[j] ? warm ? most(r, WARM) : least(mu / below, 10) : 0;
        p->zu[j] = isfinite(p->u[j]) && !p->fixed[j] ? warm ? most(-r, WARM) : least(mu / above, 10) : 0;
    }
}

/* Ruiz's scaling of rows and columns, then of costs and sides; idle rows become rows of zeros. */
static void prepare(const Batch *a, i64 k, Scaled *p, double *most_of) {
    i64 n = a->n, m = a->m, rows = a->rows;
    const double *c = a->c + k * n, *b = a->b + k * m, *d = a->d + k * (rows - m), *l = a->l + k * n, *u = a->u + k * n;
    const double *A = a->A + (a->shared_a ? 0 : k * m * n), *E = a->E + (a->shared_e ? 0 : k * (rows - m) * n);
    const double *P = a->P ? a->P + (a->shared_p ? 0 : k * n * n) : 0;
    copy(p->K, A, m * n);
    copy(p->K + m * n, E, (rows - m) * n);
    for (i64 i = 0; i < rows; i++) {
        double *row = p->K + i * n, reach = 0;
        p->q[i] = i < m ? b[i] : d[i - m];
        if (i < m) reach = greatest(row, l, u, n);
        p->idle[i] = i < m && (isinf(p->q[i]) || p->q[i] > 2 * fabs(reach) + 1);
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

/* Doubles that one of W problems side by side takes. */
static i64 doubles(const Batch *a) {
    i64 n = a->n, rows = a->rows, r = a->by_rows ? rows : n, q = a->by_rows ? n : rows;
    return rows * n + (a->P ? n * n : 0) + (q + r) * r + 33 * n + 23 * rows;
}
