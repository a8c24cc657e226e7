/* Problems come into a thread's slots and leave them: for composed_ascent.c, once a floating type. */

/* The results of a slot's problem. */
static void NAME(leave)(const NAME(Group) *q, int64_t g) {
    const NAME(Given) *in = q->in;
    const int64_t r = q->problem[g];
    in->iterations[r] = q->step[g];
    memcpy(in->v + r * q->d, q->best_v + g * q->d, q->d * sizeof(T));
    for (int64_t i = 0; i < q->K; i++) {
        in->w[r * in->K + q->at[i]] = q->best[g * q->k + i];
        in->taken[r * in->K + q->at[i]] = q->best_taken[g * q->k + i];
    }
}

/* One slot in place of another. */
static void NAME(move)(NAME(Group) *q, int64_t to, int64_t from) {
    if (to == from) return;
    const int64_t k = q->k, d = q->d;
    T *const small[] = {q->w, q->best, q->taken, q->best_taken, q->moment, q->square, q->mean, q->c_y};
    T *const large[] = {q->mean_v, q->best_v};
    T *const alone[] = {q->offset, q->along, q->bound, q->objective};
    EACH(small) memcpy(small[i] + to * k, small[i] + from * k, k * sizeof(T));
    EACH(large) memcpy(large[i] + to * d, large[i] + from * d, d * sizeof(T));
    double *const powers[] = {q->decayed, q->first_left, q->second_left};
    EACH(alone) alone[i][to] = alone[i][from];
    EACH(powers) powers[i][to] = powers[i][from];
    q->c_v[to] = q->c_v[from], q->problem[to] = q->problem[from], q->step[to] = q->step[from];
}

/* Problems r, r + 1, ... into the slots from..to, each with the best of its starts. */
static void NAME(enter)(NAME(Group) *q, int64_t from, int64_t to, int64_t r) {
    const NAME(Given) *in = q->in;
    const int64_t k = q->k, d = q->d, n = to - from;
    T *const small[] = {q->taken, q->best_taken, q->moment, q->square, q->mean, q->w, q->best, q->c_y};
    T *const large[] = {q->mean_v, q->best_v};
    EACH(small) memset(small[i] + from * k, 0, n * k * sizeof(T));
    EACH(large) memset(large[i] + from * d, 0, n * d * sizeof(T));
    for (int64_t g = from; g < to; g++) {
        const int64_t p = r + g - from;
        q->problem[g] = p, q->step[g] = 0, q->c_v[g] = in->c_v + p * d, q->offset[g] = in->offset[p];
        q->along[g] = 0, q->bound[g] = -INFINITY, q->objective[g] = INFINITY;
        for (int64_t i = 0; i < q->K; i++) {
            q->c_y[g * k + i] = in->c_y[p * in->K + q->at[i]];
            q->w[g * k + i] = in->start[p * in->K + q->at[i]];
        }
    }
    /* The same work on these slots alone. */
    NAME(Group) these = *q;
    these.A += from * k, these.nu += from * k, these.c_y += from * k, these.v += from * d;
    memcpy(these.c_v, q->c_v + from, n * sizeof *q->c_v), memcpy(these.offset, q->offset + from, n * sizeof(T));
    for (int64_t s = 0; s < in->starts && in->starts > 1; s++) {
        const T *w = s ? q->other : q->w + from * k;
        for (int64_t g = 0; s && g < n; g++)
            for (int64_t i = 0; i < q->K; i++)
                q->other[g * k + i] = in->start[(s * in->R + r + g) * in->K + q->at[i]];
        NAME(pull)(&these, n, w);
        for (int64_t g = 0; g < n; g++) {
            const T *a = these.v + g * d;
            T bound = these.value[g];
            _Pragma("omp simd reduction(+ : bound)") for (int64_t j = 0; j < d; j++) bound -= q->radius[j] * ABS(a[j]);
            if (s > 0 && bound > q->value[from + g]) memcpy(q->w + (from + g) * k, w + g * k, q->K * sizeof(T));
            if (s == 0 || bound > q->value[from + g]) q->value[from + g] = bound;
        }
    }
    memcpy(q->best + from * k, q->w + from * k, n * k * sizeof(T));
}

/* The neurons of an example, side by side; where everything stands in a thread's room. */
static void NAME(settle)(NAME(Group) *q, int64_t e, T *room) {
    const NAME(Given) *in = q->in;
    q->d = in->d, q->radius = in->radius + e * in->d, q->K = 0;
    for (int64_t t = 0; t < in->layers; t++) {
        q->first[t] = q->K;
        for (int64_t i = 0; i < in->count[e * in->layers + t]; i++) q->at[q->K++] = in->first[t] + i;
    }
    const int64_t k = ROUNDED(q->K);
    q->k = k, q->first[in->layers] = q->K, q->direct = q->first[in->direct];
    T **const large[] = {&q->v, &q->mean_v, &q->best_v};
    T **const small[] = {&q->w,  &q->best, &q->taken, &q->best_taken, &q->moment, &q->square, &q->A,
                         &q->nu, &q->P,    &q->mean,  &q->y,          &q->c_y,    &q->other};
    T **const lines[] = {&q->m, &q->flat, &q->spread, &q->slope, &q->intercept};
    EACH(large) *large[i] = room, room += SLOTS * q->d;
    EACH(small) *small[i] = room, room += SLOTS * k;
    EACH(lines) {
        *lines[i] = room, room += k;
        for (int64_t j = 0; j < q->K; j++) (*lines[i])[j] = in->lines[i][e * in->K + q->at[j]];
    }
    q->N = room, q->NT = room + k * k;
    memset(q->N, 0, 2 * k * k * sizeof(T));
    for (int64_t t = 0; t < in->direct; t++)
        for (int64_t i = q->first[t]; i < q->first[t + 1]; i++)
            q->rows_of_M[i] = in->M[t] + in->rows[e * in->K + q->at[i]] * q->d;
    for (int64_t i = 0; i < q->K; i++) q->rows_of_N[i] = q->N + i * k, q->rows_of_NT[i] = q->NT + i * k;
    for (int64_t t = 1; t < in->layers; t++)
        for (int64_t i = q->first[t]; i < q->first[t + 1]; i++)
            for (int64_t j = q->first[in->back[t]]; j < q->first[t]; j++)
                q->N[i * k + j] = q->NT[j * k + i] = in->N[(e * in->K + q->at[i]) * in->K + q->at[j]];
}
