/* Products and factors of W problems side by side, one a lane: every entry is a vector. */
/* B and R lie in panels of 4 columns: first the q rows of B, then the r rows of R. */
#define PANEL(p, j) ((p)->B + (j) * ((p)->q_ + (p)->r))

/* Row i of B: f times entries of K, `step` apart. */
INLINE void F(fill)(Problem *p, i64 i, V f, const V *from, i64 step, i64 count) {
    i64 j = 0;
    for (; j + 4 <= count; j += 4)
        for (int o = 0; o < 4; o++) PANEL(p, j)[i * 4 + o] = f * from[(j + o) * step];
    for (int o = 0; j + o < count; o++) PANEL(p, j)[i * 4 + o] = f * from[(j + o) * step];
}

/* `rows` dot products of n entries. */
INLINE void F(dots)(const V *K, i64 N, i64 n, const V *x, V *out, const int rows) {
    V t[8] = {{0}};
    for (i64 j = 0; j < n; j++)
        for (int o = 0; o < rows; o++) t[o] += K[o * N + j] * x[j];
    for (int o = 0; o < rows; o++) out[o] = t[o];
}

/* out += K^T y. */
INLINE void F(adds)(const V *K, i64 N, i64 n, const V *y, V *out, const int rows) {
    for (i64 j = 0; j < n; j++) {
        V t = out[j];
        for (int o = 0; o < rows; o++) t += y[o] * K[o * N + j];
        out[j] = t;
    }
}

/* P x. */
static void F(quadratic)(const Problem *p, const V *x, V *out) {
    if (!p->P) return;
    for (i64 i = 0; i < p->n; i++) {
        V t = {0};
        for (i64 j = 0; j < p->n; j++) t += p->P[i * p->n + j] * x[j];
        out[i] = t;
    }
}

/* sum += or -= left^T right, of one row. */
INLINE void F(outer)(const V *left, const V *right, V sum[4][4], const int plus, const int height, const int breadth) {
    V b[4];
    for (int o = 0; o < breadth; o++) {
        b[o] = right[o];
        HELD(b[o]);
    }
    for (int t = 0; t < height; t++) {
        V a = left[t];
        HELD(a);
        for (int o = 0; o < breadth; o++) sum[t][o] = plus ? sum[t][o] + a * b[o] : sum[t][o] - a * b[o];
    }
}

/* What rows `from` to `to` of the panels add to one tile, height x breadth values of B^T B + P - R^T R; with the last of
   them the tile becomes R. Which lanes break down. */
INLINE M F(tile)(Problem *p, const V *diag, i64 j, i64 k, i64 from, i64 to, const int height, const int breadth) {
    const V *left = PANEL(p, j) + from * 4, *right = PANEL(p, k) + from * 4, *P = p->by_rows ? 0 : p->P;
    V *R = PANEL(p, k) + (p->q_ + j) * 4, sum[4][4];
    M broken = {0};
    for (int t = 0; t < height; t++)
        for (int o = 0; o < breadth; o++) {
            sum[t][o] = from ? R[t * 4 + o] : P ? P[(j + t) * p->r + k + o] : (V){0};
            if (!from && j == k && t == o) sum[t][o] += diag[j + t];
        }
    i64 i = from;
    for (; i < to && i < p->q_; i++, left += 4, right += 4) F(outer)(left, right, sum, 1, height, breadth);
    for (; i < to; i++, left += 4, right += 4) F(outer)(left, right, sum, 0, height, breadth);
    const V *corner = PANEL(p, j) + (p->q_ + j) * 4;
    for (int t = 0; t < height && to == p->q_ + j; t++) {
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

/* R^T R = P + diag + B^T B, upper R; which lanes break down. Panels are taken a few rows at a time, which stay near. */
static M F(factor)(Problem *p, const V *diag) {
    i64 r = p->r, whole = r / 4 * 4, rest = r - whole;
    M broken = {0};
    for (i64 j = 0; j < whole; j += 4) {
        i64 from = 0, to;
        do {
            to = least(p->q_ + j, from + NEAR);
            for (i64 k = j; k < whole; k += 4) broken |= F(tile)(p, diag, j, k, from, to, 4, 4);
            if (rest == 1) F(tile)(p, diag, j, whole, from, to, 4, 1);
            if (rest == 2) F(tile)(p, diag, j, whole, from, to, 4, 2);
            if (rest == 3) F(tile)(p, diag, j, whole, from, to, 4, 3);
            from = to;
        } while (to < p->q_ + j);
    }
    if (rest == 1) broken |= F(tile)(p, diag, whole, whole, 0, p->q_ + whole, 1, 1);
    if (rest == 2) broken |= F(tile)(p, diag, whole, whole, 0, p->q_ + whole, 2, 2);
    if (rest == 3) broken |= F(tile)(p, diag, whole, whole, 0, p->q_ + whole, 3, 3);
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
