/* Vectors, and the scaling of a matrix: Ruiz 2001. */
/* A product and its sum in one instruction: with -std=c11 a compiler leaves them apart unless told. */
#pragma GCC optimize("fp-contract=fast")

typedef int64_t i64;
#if defined(__AVX512F__)
#define W 8
#else
#define W 4
#endif
typedef double vec __attribute__((vector_size(8 * W), aligned(8), may_alias));
typedef i64 ivec __attribute__((vector_size(8 * W), aligned(8), may_alias));
#define PAD 8
#define ALIKE 1.5       /* how far a row's scaling may be from what the last round left */
#define INLINE static inline __attribute__((always_inline))

INLINE double least(double a, double b) { return a < b ? a : b; }
INLINE double most(double a, double b) { return a > b ? a : b; }

/* Of no numbers there may be no address either. */
INLINE void copy(double *to, const double *from, i64 n) {
    if (n > 0) memcpy(to, from, n * sizeof(double));
}

INLINE void clear(double *to, i64 n) {
    if (n > 0) memset(to, 0, n * sizeof(double));
}

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

static double *slice(double **from, i64 count) {
    double *here = *from;
    *from += (count + PAD - 1) / PAD * PAD;
    return here;
}
