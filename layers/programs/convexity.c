/* Which symmetric matrices have a Cholesky factor when `rounding` of their largest entry is added to the diagonal. */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

typedef int64_t i64;

/* R [n, n]: rows of the factor, right of the diagonal; each is taken from those below as soon as it is known. */
static int factor(const double *restrict P, double *restrict R, double shift, i64 n) {
    for (i64 i = 0; i < n; i++) {
        for (i64 j = i; j < n; j++) R[i * n + j] = P[i * n + j];
        R[i * n + i] += shift;
    }
    for (i64 k = 0; k < n; k++) {
        const double *row = R + k * n;
        if (!(row[k] > 0)) return 0;
        double inverse = 1 / row[k];
        for (i64 i = k + 1; i < n; i++) {
            double times = row[i] * inverse, *below = R + i * n;
#pragma omp simd
            for (i64 j = i; j < n; j++) below[j] -= times * row[j];
        }
    }
    return 1;
}

void convexity_f64(i64 size, i64 n, double rounding, const double *P, i64 *convex, i64 threads) {
    i64 busy = size * n * n * n > 262144 ? threads : 1;
#pragma omp parallel num_threads((int)busy) if (busy > 1)
    {
        double *R = malloc(n * n * sizeof(double));
#pragma omp for
        for (i64 k = 0; k < size; k++) {
            const double *M = P + k * n * n;
            double most = 0;
            int even = 1;
#pragma omp simd reduction(max : most)
            for (i64 i = 0; i < n * n; i++) most = fabs(M[i]) > most ? fabs(M[i]) : most;
            for (i64 i = 0; i < n; i++)
                for (i64 j = 0; j < i; j++) even &= fabs(M[i * n + j] - M[j * n + i]) <= rounding * most;
            /* The least normal number keeps a matrix of zeros convex. */
            convex[k] = R && even && isfinite(most) && factor(M, R, rounding * most + DBL_MIN, n);
        }
        free(R);
    }
}
