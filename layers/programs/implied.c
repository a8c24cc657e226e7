/* Bounds on variables that rows imply, rounded outward: what implied_bounds.py states, in passes over the entries. */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;

/* Entries of rows in order: row i holds those from start[i] to start[i + 1]. */
typedef struct {
    i64 *start, *column;
    double *value;
} Entries;

static void list(Entries *e, const double *A, i64 m, const double *E, i64 p, i64 n) {
    i64 count = 0;
    for (i64 i = 0; i < m + p; i++) {
        const double *row = i < m ? A + i * n : E + (i - m) * n;
        e->start[i] = count;
        for (i64 j = 0; j < n; j++) {
            e->column[count] = j, e->value[count] = row[j];
            count += row[j] != 0;
        }
    }
    e->start[m + p] = count;
}

/* The least that a x gives in its box; at crossed ends, too, the smaller of both. */
static double term(double a, double l, double u) {
    double first = l == 0 ? 0 : a * l, second = u == 0 ? 0 : a * u;
    return first < second ? first : second;
}

/* The next float above. */
static double next(double x) {
    if (!isfinite(x)) return x;
    if (x == 0) return 0x1p-1074;
    i64 bits;
    memcpy(&bits, &x, sizeof x);
    bits += x > 0 ? 1 : -1;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* What sign a.x <= side says of each variable that has no end, where the rest of the row is bounded. */
static void row(const Entries *e, i64 i, double sign, double side, double share, double lost, const double *l,
                const double *u, double *low, double *high) {
    double sum = 0, size = 0;
    i64 open = 0;
    for (i64 k = e->start[i]; k < e->start[i + 1]; k++) {
        double t = term(sign * e->value[k], l[e->column[k]], u[e->column[k]]);
        if (isfinite(t)) sum += t, size += fabs(t);
        else open++;
    }
    if (open > 1) return;
    double error = share * (size + fabs(side)) + lost;
    for (i64 k = e->start[i]; k < e->start[i + 1]; k++) {
        i64 j = e->column[k];
        double a = sign * e->value[k], t = term(a, l[j], u[j]);
        if (isfinite(a > 0 ? u[j] : l[j]) || open - !isfinite(t) != 0) continue;
        double room = next(side - (sum - (isfinite(t) ? t : 0)) + error), end = room / a;
        if (!isfinite(end)) continue;
        if (a > 0) high[j] = fmin(high[j], next(end));
        else low[j] = fmax(low[j], -next(-end));
    }
}

/* low and high are l and u, and where these are infinite what `rounds` rounds imply, each from the one before. share and
   lost: the error of a row's sum, relative to its terms and absolute. places and numbers are each thread's own room. */
void implied_f64(i64 B, i64 n, i64 m, i64 p, i64 shared_a, i64 shared_e, i64 rounds, double share, double lost,
                 const double *A, const double *b, const double *E, const double *d, const double *l, const double *u,
                 double *low, double *high, i64 *places, double *numbers, i64 threads) {
    i64 rows = m + p, entries = rows * n + 1, teams = B * entries > 32768 ? threads : 1;
#pragma omp parallel for schedule(static) num_threads((int)teams) if (teams > 1)
    for (i64 team = 0; team < teams; team++) {
        i64 *own = places + team * (entries + rows + 1);
        double *values = numbers + team * (entries + 2 * n), *from = values + entries, *to = from + n;
        Entries e = {.start = own, .column = own + rows + 1, .value = values};
        for (i64 k = team; k < B; k += teams) {
            double *lk = low + k * n, *uk = high + k * n;
            if (k == team || !shared_a || !shared_e)
                list(&e, A + (shared_a ? 0 : k * m * n), m, E + (shared_e ? 0 : k * p * n), p, n);
            memcpy(lk, l + k * n, n * sizeof(double)), memcpy(uk, u + k * n, n * sizeof(double));
            int open = 1;
            for (i64 round = 0; open && round < rounds; round++) {
                memcpy(from, lk, n * sizeof(double)), memcpy(to, uk, n * sizeof(double));
                for (i64 j = 0; j < n; j++) { /* an end of the wrong sign is none, too */
                    if (isinf(lk[j])) lk[j] = -INFINITY;
                    if (isinf(uk[j])) uk[j] = INFINITY;
                }
                for (i64 i = 0; i < m; i++) row(&e, i, 1, b[k * m + i], share, lost, from, to, lk, uk);
                for (i64 i = 0; i < p; i++) {
                    double side = d[k * p + i];
                    row(&e, m + i, 1, side, share, lost, from, to, lk, uk);
                    row(&e, m + i, -1, -side, share, lost, from, to, lk, uk);
                }
                if (!memcmp(from, lk, n * sizeof(double)) && !memcmp(to, uk, n * sizeof(double))) break;
                open = 0;
                for (i64 j = 0; j < n; j++) open |= isinf(lk[j]) || isinf(uk[j]);
            }
        }
    }
}
