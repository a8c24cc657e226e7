/* The bound of multipliers and the value of a point, each problem in one pass over its rows: what safe_bounds.py
   states, evaluated in float64, between finite ends of the variables: given, or implied by the rows. */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;

static double inner(const double *restrict a, const double *restrict x, i64 n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 j = 0; j < n; j++) sum += a[j] * x[j];
    return sum;
}

/* a.x; r += y a */
static double through(const double *restrict a, const double *restrict x, double y, double *restrict r, i64 n) {
    if (y != 0)
        for (i64 j = 0; j < n; j++) r[j] += y * a[j];
    return inner(a, x, n);
}

/* Of quadratic programs the linear one of the tangent at x is evaluated, as quadratic_bounds.py states it.
   y and v become what is counted: prices that are no numbers, or of the wrong sign, are 0. */
void evaluation_f64(i64 B, i64 n, i64 m, i64 p, i64 shared_a, i64 shared_e, i64 shared_p,
                    double feasibility, const double *c, const double *A, const double *b, const double *E, const double *d,
                    const double *l, const double *u, const double *low, const double *high, const double *P, const double *x, double *y, double *v, double *reduced,
                    double *bound, double *value, i64 threads) {
    i64 busy = B * (m + p + (P ? n : 1)) * n > 32768 ? threads : 1;
#pragma omp parallel for num_threads((int)busy) if (busy > 1)
    for (i64 k = 0; k < B; k++) {
        double *r = reduced + k * n, least = 0, cost = 0;
        const double *a = A + (shared_a ? 0 : k * m * n), *e = E + (shared_e ? 0 : k * p * n);
        int kept = 1;
        memcpy(r, c + k * n, n * sizeof(double));
        if (P) {
            const double *row = P + (shared_p ? 0 : k * n * n), *at = x + k * n;
            for (i64 j = 0; j < n; j++, row += n) {
                double slope = inner(row, at, n);
                r[j] += slope, least -= at[j] * slope / 2, cost += at[j] * slope / 2;
            }
        }
        for (i64 i = 0; i < m; i++) {
            double side = b[k * m + i], *price = y + k * m + i;
            if (!(*price > 0 && isfinite(*price) && isfinite(side))) *price = 0;
            double over = through(a + i * n, x + k * n, *price, r, n) - side;
            if (over <= 0) over = 0;
            kept &= over <= feasibility * fmax(fabs(side), 1);
            if (*price != 0) least -= *price * side, cost += *price * over;
        }
        for (i64 i = 0; i < p; i++) {
            double side = d[k * p + i], *price = v + k * p + i;
            if (!isfinite(*price)) *price = 0;
            double off = fabs(through(e + i * n, x + k * n, *price, r, n) - side);
            kept &= off <= feasibility * fmax(fabs(side), 1);
            least -= *price * side, cost += fabs(*price) * off;
        }
        for (i64 j = 0; j < n; j++) {
            double at = x[k * n + j];
            double below = r[j] * low[k * n + j], above = r[j] * high[k * n + j];
            least += below < above ? below : above;
            cost += c[k * n + j] * at;
            kept &= at >= l[k * n + j] && at <= u[k * n + j];
        }
        bound[k] = isfinite(least) ? least : -INFINITY;
        value[k] = kept && isfinite(cost) ? cost : INFINITY;
    }
}
