/* Before the first step: a problem is scaled, and gets its first point. */
INLINE double sum_of(vec a) {
#if W == 8
    return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
#else
    return (a[0] + a[2]) + (a[1] + a[3]);
#endif
}

static double dot(const double *a, const double *b, i64 n) {
    vec t = {0};
    i64 i = 0;
    for (; i + W <= n; i += W) t += *(const vec *)(a + i) * *(const vec *)(b + i);
    double sum = sum_of(t);
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void add(double *out, double f, const double *a, i64 n) {
    i64 i = 0;
    for (; i + W <= n; i += W) *(vec *)(out + i) += f * *(const vec *)(a + i);
    for (; i < n; i++) out[i] += f * a[i];
}

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

INLINE vec largest(vec a, vec b) {
    ivec sign = (ivec)b & INT64_MAX, mine = a > (vec)sign;
    return (vec)(((ivec)a & mine) | (sign & ~mine));
}

/* Ruiz's scaling until rows are alike: K becomes diag(S) K diag(C); `top` holds n. */
static void equilibrate(double *K, i64 rows, i64 n, double *S, double *C, double *top) {
    for (i64 j = 0; j < n; j++) C[j] = top[j] = 1;
    for (i64 i = 0; i < rows; i++) S[i] = 1;
    double unlike = INFINITY;
    for (int round = 0; round < 6 && unlike > ALIKE; round++) {
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
        unlike = 1;
        for (i64 i = 0; i < rows; i++) {
            worst[i] = worst[i] > 0 ? 1 / sqrt(worst[i]) : 1;
            unlike = most(unlike, most(worst[i], 1 / worst[i]));
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

/* The largest a.x in the box. */
static double greatest(const double *a, const double *l, const double *u, i64 n) {
    vec t = {0};
    i64 j = 0;
    for (; j + W <= n; j += W) {
        vec v = *(const vec *)(a + j), high = v * *(const vec *)(u + j), low = v * *(const vec *)(l + j);
        t += (vec)(((ivec)high & (v > 0)) | ((ivec)low & (v < 0)));
    }
    double sum = sum_of(t);
    for (; j < n; j++) sum += a[j] > 0 ? a[j] * u[j] : a[j] < 0 ? a[j] * l[j] : 0;
    return sum;
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
