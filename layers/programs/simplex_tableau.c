/* A tableau: its memory, the rows' own basis, and a problem in a basis. */
/* T [rows + 1, N] and its norms; which variables its rows and columns are. */
typedef struct {
    i64 rows; /* at most the batch's: basic rows that a problem cannot violate are left out */
    double *T, *norm;
    i64 *inside, *outside;
    double *basic, *basic_low, *basic_high; /* by rows */
    double *at, *way; /* by columns: values; 1 at a lower end, -1 at an upper, 0 where fixed */
    double *speed, *cost, *ratio, *step, *made;
    i64 *list, *move, moves;
    double *low, *high, *value; /* by variables, x then r */
    i64 *idle; /* by the batch's rows: whether the box, or an equal row, keeps it */
    double primal, dual, reach, work; /* reach: twice the last step of the costs */
    int back;
} Tableau;

static i64 doubles(const Batch *a) {
    return (a->rows + 1) * a->N + (9 * (a->rows + PAD) + 13 * (a->N + PAD) + PAD) / PAD * PAD;
}

static Tableau tableau(const Batch *a, double *memory) {
    double *at = memory;
    Tableau t = {.T = slice(&at, (a->rows + 1) * a->N), .norm = slice(&at, a->rows)};
    t.inside = (i64 *)slice(&at, a->rows), t.outside = (i64 *)slice(&at, a->N);
    double **by_rows[] = {&t.basic, &t.basic_low, &t.basic_high};
    double **by_columns[] = {&t.at, &t.way, &t.speed, &t.cost, &t.ratio, &t.step, &t.made};
    double **by_variables[] = {&t.low, &t.high, &t.value};
    for (int i = 0; i < 3; i++) *by_rows[i] = slice(&at, a->rows);
    for (int i = 0; i < 7; i++) *by_columns[i] = slice(&at, a->N);
    for (int i = 0; i < 3; i++) *by_variables[i] = slice(&at, a->n + a->rows);
    t.idle = (i64 *)slice(&at, a->rows);
    t.list = (i64 *)slice(&at, a->N), t.move = (i64 *)slice(&at, a->N);
    return t;
}

/* The rows' own basis. */
static void begin(const Batch *a, Tableau *t) {
    i64 n = a->n, N = a->N;
    t->rows = a->rows;
    memset(t->T, 0, (a->rows + 1) * N * sizeof(double));
    for (i64 i = 0; i < a->rows; i++) {
        double *row = t->T + i * N;
        memcpy(row, a->K + i * n, n * sizeof(double));
        t->norm[i] = dot(row, row, N);
        t->inside[i] = n + i;
    }
    for (i64 j = 0; j < N; j++) t->outside[j] = j;
}

/* The basis of `from`, without the rows that stand idle in t's problem. */
static void begin_at(const Batch *a, const Tableau *from, Tableau *t) {
    t->rows = 0;
    for (i64 i = 0; i < from->rows; i++) {
        i64 v = from->inside[i], to = t->rows;
        if (v >= a->n && t->idle[v - a->n]) continue;
        memcpy(t->T + to * a->N, from->T + i * a->N, a->N * sizeof(double));
        t->norm[to] = from->norm[i], t->inside[to] = v, t->rows++;
    }
    memcpy(t->outside, from->outside, a->N * sizeof(i64));
}

/* The ends of x and r in problem k, scaled and finite; 0 where they are too far. */
static int ends(const Batch *a, i64 k, Tableau *t) {
    i64 n = a->n, m = a->m;
    double *low = t->low, *high = t->high, unit = 0, widest = 0;
    const double *l = a->l + k * n, *u = a->u + k * n, *b = a->b + k * m, *d = a->d + k * (a->rows - m);
    for (i64 j = 0; j < n; j++) {
        low[j] = a->low[k * n + j] / a->C[j], high[j] = a->high[k * n + j] / a->C[j];
        unit = most(unit, most(fabs(low[j]), fabs(high[j])));
        widest = most(widest, high[j] - low[j]);
    }
    if (!(unit < INFINITY)) return 0;
    double sides = 0;
    for (i64 i = 0; i < a->rows; i++) {
        double side = fabs(i < m ? b[i] : d[i - m]) * a->S[i];
        if (side < INFINITY) sides = most(sides, side);
    }
    unit = sides > 0 ? least(sides, unit) : unit;
    unit = unit > 0 ? unit : 1;
    for (i64 j = 0; j < n; j++) {
        double width = high[j] - low[j] + unit;
        if (isinf(l[j])) low[j] -= width;
        if (isinf(u[j])) high[j] += width;
    }
    for (i64 i = 0; i < a->rows; i++) {
        t->idle[i] = 0;
        if (i >= m) {
            low[n + i] = high[n + i] = d[i - m] * a->S[i];
            continue;
        }
        double up = greatest(a->K + i * n, low, high, n), down = greatest(a->K + i * n, high, low, n);
        double width = up - down + unit;
        low[n + i] = down - width, high[n + i] = least(b[i] * a->S[i], up + width);
        i64 o = a->twin[i];
        while (o >= 0 && t->idle[o]) o = a->twin[o];
        if (high[n + i] >= up || (o >= 0 && high[n + i] >= high[n + o])) t->idle[i] = 1;
        else if (o >= 0) t->idle[o] = 1;
    }
    t->primal = PRIMAL * unit;
    return widest <= FAR * unit;
}

/* Whether a variable may not rest at an end: there is none in problem k. */
static int unreal(const Batch *a, i64 k, const Tableau *t, i64 v, int upper) {
    if (v < a->n) return isinf((upper ? a->u : a->l)[k * a->n + v]);
    i64 i = v - a->n;
    return i < a->m && (!upper || !(t->high[v] == a->b[k * a->m + i] * a->S[i]));
}

/* Costs and values of problem k in the present basis. */
static void load(const Batch *a, i64 k, Tableau *t) {
    i64 n = a->n, N = a->N, rows = t->rows;
    double *d = t->T + rows * N, most_of = 0;
    const double *c = a->c + k * n;
    memset(d, 0, N * sizeof(double));
    for (i64 j = 0; j < n; j++) {
        i64 v = t->outside[j];
        d[j] = v < n ? c[v] * a->C[v] : 0;
        most_of = most(most_of, fabs(c[j] * a->C[j]));
    }
    t->dual = DUAL * most_of, t->reach = 0;
    for (i64 i = 0; i < rows; i++) {
        i64 v = t->inside[i];
        if (v < n && c[v] != 0) add(d, c[v] * a->C[v], t->T + i * N, N);
        t->basic_low[i] = t->low[v], t->basic_high[i] = t->high[v];
    }
    for (i64 j = 0; j < n; j++) {
        i64 v = t->outside[j];
        int upper = d[j] < -t->dual || (d[j] <= t->dual && unreal(a, k, t, v, 0));
        t->at[j] = upper ? t->high[v] : t->low[v];
        t->way[j] = t->high[v] > t->low[v] ? upper ? -1 : 1 : 0;
    }
    for (i64 i = 0; i < rows; i++) t->basic[i] = dot(t->T + i * N, t->at, N);
}
