/* Which row leaves, which column enters, and what changes. */
/* By how much a basic variable is outside of its ends. */
INLINE double outside_by(const Tableau *t, i64 i) {
    return most(t->basic[i] - t->basic_high[i], t->basic_low[i] - t->basic[i]);
}

/* Takes row i where it is farther outside, by the length of its edge, than `best`. */
INLINE void consider(const Tableau *t, i64 i, double *best, i64 *found) {
    double off = outside_by(t, i), square = off * off, edge = t->norm[i] + 1;
    if ((off > t->primal) & (square > *best * edge)) *best = square / edge, *found = i;
}

static i64 leaving(const Tableau *t) {
    i64 found = -1;
    double best = 0;
    for (i64 i = 0; i < t->rows; i++) consider(t, i, &best, &found);
    return found;
}

/* The columns that may enter for a row which is to fall (sign 1) or to rise (-1), with the speed at which each moves it
   and the cost that each has left. */
static i64 candidates(const Batch *a, Tableau *t, i64 i, double sign) {
    const double *row = t->T + i * a->N, *d = t->T + t->rows * a->N;
    double *fall = t->made;
    i64 count = 0;
    for (i64 j = 0; j < a->N; j += W) *(vec *)(fall + j) = -sign * *(vec *)(t->way + j) * *(const vec *)(row + j);
    for (i64 j = 0; j < a->n; j++) {
        t->list[count] = j;
        count += fall[j] > NOISE;
    }
    for (i64 o = 0; o < count; o++) {
        i64 j = t->list[o];
        t->speed[o] = fall[j], t->cost[o] = most(t->way[j] * d[j], 0);
        t->ratio[o] = (t->cost[o] + t->dual) / t->speed[o];
    }
    return count;
}

/* Brings the candidates from `start` on that the cost reaches to the front, at least one of them; where they end. */
static i64 near(Tableau *t, i64 start, i64 count) {
    i64 end = start;
    while (end == start) {
        double lowest = INFINITY;
        for (i64 o = start; o < count; o++) {
            if (t->ratio[o] > t->reach) {
                lowest = least(lowest, t->ratio[o]);
                continue;
            }
            i64 j = t->list[o];
            double speed = t->speed[o], cost = t->cost[o], ratio = t->ratio[o];
            t->list[o] = t->list[end], t->speed[o] = t->speed[end], t->cost[o] = t->cost[end], t->ratio[o] = t->ratio[end];
            t->list[end] = j, t->speed[end] = speed, t->cost[end] = cost, t->ratio[end++] = ratio;
        }
        if (end == start) t->reach = 2 * lowest;
    }
    return end;
}

/* The column that enters, -1 where there is none; moves of ends that are passed on the way, and its own. */
static i64 entering(const Batch *a, Tableau *t, i64 i, double sign) {
    i64 count = candidates(a, t, i, sign), start = 0, end = 0;
    double off = outside_by(t, i);
    t->moves = 0;
    while (end < count || start < end) {
        if (start == end) end = near(t, start, count);
        double bound = INFINITY, best = 0, rest = off;
        i64 found = -1, kept = end, before = t->moves;
#pragma omp simd reduction(min : bound)
        for (i64 o = start; o < end; o++) bound = t->ratio[o] < bound ? t->ratio[o] : bound;
        for (i64 o = end - 1; o >= start; o--) {
            i64 j = t->list[o], v = t->outside[j];
            double speed = t->speed[o], cost = t->cost[o];
            if (cost > bound * speed) {
                t->list[--kept] = j, t->speed[kept] = speed, t->cost[kept] = cost, t->ratio[kept] = t->ratio[o];
                continue;
            }
            double width = t->high[v] - t->low[v];
            rest -= speed * width;
            t->move[t->moves] = j, t->step[t->moves++] = t->way[j] * width;
            if (speed > best) best = speed, found = j;
        }
        if (!(rest > 0) || (kept == end && end == count)) {
            if (!(best > PIVOT)) return -1;
            t->moves = before, t->reach = 2 * bound;
            t->move[before] = found, t->step[t->moves++] = -sign * off / t->T[i * a->N + found];
            return found;
        }
        off = rest, start = kept;
    }
    return -1;
}

/* other += g * row, where that has 0 at j; the sum of its squares. */
INLINE double eliminate(double *restrict other, const double *restrict row, double g, i64 N) {
    vec first = {0}, second = {0};
    i64 k = 0;
    for (; k + 2 * W <= N; k += 2 * W) {
        vec a = *(vec *)(other + k) + g * *(const vec *)(row + k), b = *(vec *)(other + k + W) + g * *(const vec *)(row + k + W);
        *(vec *)(other + k) = a, *(vec *)(other + k + W) = b;
        first += a * a, second += b * b;
    }
    for (; k < N; k += W) {
        vec a = *(vec *)(other + k) + g * *(const vec *)(row + k);
        *(vec *)(other + k) = a, first += a * a;
    }
    return sum_of(first + second);
}

/* Row i and column j change places and all moves are made; the row that leaves next, -1 where none does. */
static i64 pivot(const Batch *a, Tableau *t, i64 i, i64 j) {
    const i64 N = a->N, rows = t->rows, moves = t->moves, *move = t->move;
    const double *step = t->step;
    double *row = t->T + i * N, *made = t->made, f = 1 / row[j], best = 0;
    i64 next = -1;
    for (i64 k = 0; k < N; k += W) *(vec *)(made + k) = *(vec *)(row + k) * -f;
    made[j] = f - 1; /* with what stands there already: g f */
    t->back = !t->back; /* to and fro: what was read last lies near */
    for (i64 at = 0; at <= rows; at++) {
        i64 o = t->back ? rows - at : at;
        if (o == i) continue;
        double *other = t->T + o * N, g = other[j], sum = 0;
        if (o < rows)
            for (i64 k = 0; k < moves; k++) sum += other[move[k]] * step[k];
        double norm = -1;
        if (g != 0) norm = eliminate(other, made, g, N), other[j] = g * f, t->work += N;
        if (o == rows) continue;
        t->basic[o] += sum;
        if (norm >= 0) t->norm[o] = norm;
        consider(t, o, &best, &next);
    }
    made[j] = f;
    t->work += LOOK * N;
    memcpy(row, made, N * sizeof(double));
    t->norm[i] = dot(row, row, N);
    consider(t, i, &best, &next);
    return next;
}

/* The dual simplex method from the present basis; steps, or -1 where it does not end in an optimum. */
static i64 descend(const Batch *a, Tableau *t) {
    i64 i = leaving(t);
    for (i64 steps = 0; steps < a->limit; steps++) {
        if (i < 0) return steps;
        int falls = t->basic[i] > t->basic_high[i];
        i64 j = entering(a, t, i, falls ? 1 : -1), v = t->inside[i];
        if (j < 0) return -1;
        i64 enters = t->outside[j];
        double value = t->at[j] + t->step[t->moves - 1];
        for (i64 k = 0; k < t->moves - 1; k++) {
            i64 o = t->move[k];
            t->way[o] = -t->way[o], t->at[o] = t->way[o] > 0 ? t->low[t->outside[o]] : t->high[t->outside[o]];
        }
        t->at[j] = falls ? t->basic_high[i] : t->basic_low[i], t->way[j] = t->high[v] > t->low[v] ? falls ? -1 : 1 : 0;
        t->basic[i] = value, t->basic_low[i] = t->low[enters], t->basic_high[i] = t->high[enters];
        t->inside[i] = enters, t->outside[j] = v;
        i = pivot(a, t, i, j);
    }
    return -1;
}
