/* Products and factors of one problem: vectors lie along rows, rows are taken eight at a time. */
#define VEC(at) (*(vec *)(at))
#define CVEC(at) (*(const vec *)(at))

/* `rows` dot products of n entries, n a multiple of W; sums of eight wait for each other less than one. */
INLINE void F(dots)(const double *K, i64 N, i64 n, const double *x, double *out, const int rows) {
    vec t[8] = {{0}};
    for (i64 j = 0; j < n; j += W)
        for (int o = 0; o < rows; o++) t[o] += CVEC(K + o * N + j) * CVEC(x + j);
    for (int o = 0; o < rows; o++) out[o] = sum_of(t[o]);
}

/* out += K^T y. */
INLINE void F(adds)(const double *K, i64 N, i64 n, const double *y, double *out, const int rows) {
    for (i64 j = 0; j < n; j += W) {
        vec t = CVEC(out + j);
        for (int o = 0; o < rows; o++) t += y[o] * CVEC(K + o * N + j);
        VEC(out + j) = t;
    }
}

/* P x. */
static void F(quadratic)(const Problem *p, const V *x, V *out) {
    if (!p->P) return;
    for (i64 i = 0; i < p->n; i++) out[i] = dot(p->P + i * p->N, x, p->N);
}

/* Row i of B: f times entries of K, `step` apart. */
INLINE void F(fill)(Problem *p, i64 i, V f, const V *from, i64 step, i64 count) {
    for (i64 j = 0; j < count; j++) p->B[i * p->r + j] = f * from[j * step];
}

/* One tile of 8 rows and `parts` vectors of B^T B + P - R^T R. */
INLINE void F(tile)(const Problem *p, const V *diag, i64 j, i64 k, const int parts) {
    i64 r = p->r, q = p->q_;
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

/* R^T R = P + diag + B^T B, upper R row by row; whether it breaks down. */
static M F(factor)(Problem *p, const V *diag) {
    i64 r = p->r;
    M broken = 0;
    for (i64 j = 0; j < r; j += 8) {
        i64 k = j;
        for (; k + 2 * W <= r; k += 2 * W) F(tile)(p, diag, j, k, 2);
        for (; k < r; k += W) F(tile)(p, diag, j, k, 1);
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

/* R^T R g = g: blocks of eight rows, within which one entry waits for the other. */
static void F(solve)(const Problem *p, V *g) {
    i64 r = p->r;
    double z[8];
    for (i64 k = 0; k < r; k += 8) {
        const V *block = p->R + k * r + k;
        for (i64 i = 0; i < 8; i++) {
            z[i] = g[k + i] *= p->inverse[k + i];
            for (i64 o = i + 1; o < 8; o++) g[k + o] -= z[i] * block[i * r + o];
            z[i] = -z[i];
        }
        F(adds)(block + 8, r, r - k - 8, z, g + k + 8, 8);
    }
    for (i64 k = r - 8; k >= 0; k -= 8) {
        const V *block = p->R + k * r + k;
        F(dots)(block + 8, r, r - k - 8, g + k + 8, z, 8);
        for (i64 i = 7; i >= 0; i--) {
            double rest = g[k + i] - z[i];
            for (i64 o = i + 1; o < 8; o++) rest -= block[i * r + o] * g[k + o];
            g[k + i] = rest * p->inverse[k + i];
        }
    }
}
