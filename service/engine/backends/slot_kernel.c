/* Attention of rows, each over its own prefix of its own slot.
 *
 * For every row and head: softmax(q K^T * scaling) V over positions 0..length-1 of one slot, read in
 * place. The order in which numbers are added depends on the length of the row and on nothing else:
 * not on other rows, on the slot, or on the number of threads. Vectors have 16 lanes on every
 * processor; the compiler splits them where registers are narrower.
 *
 * Shapes, float32: pools [slots, groups, positions, size], contiguous; q [rows, heads, size] and
 * k, v [rows, groups, size] with any stride of rows and heads; out [all rows, heads, size].
 * The caller has checked every index.
 */

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GLIBC__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));
/* The same in memory, where nothing is aligned. */
typedef float mem __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef struct {
    float *keys, *values; /* of one layer */
    int64_t groups, positions, size;
} Pool;

typedef struct {
    const int64_t *slots, *lengths; /* of `rows` rows; the new position is the last of each length */
    int64_t rows, all_rows;         /* those that only fill up the tick come last */
    float *scratch;                 /* `scratch_size` floats a thread, a multiple of LANES */
    int64_t scratch_size, threads;
} Rows;

typedef struct {
    const float *at;
    int64_t row, head; /* strides in floats */
} Strided;

typedef struct {
    Pool pool;
    Rows rows;
    Strided q;
    float *out;
    int64_t heads;
    float scaling;
} Work;

INLINE vec load(const float *p) { return *(const mem *)p; }
INLINE void store(float *p, vec v) { *(mem *)p = v; }
INLINE vec all(float x) { return (vec){} + x; }
INLINE vec pick(ivec which, vec a, vec b) { return (vec)((which & (ivec)a) | (~which & (ivec)b)); }

INLINE float sum_lanes(vec v) {
    union { vec whole; vec8 half[2]; } a = {.whole = v};
    union { vec8 whole; vec4 half[2]; } b = {.whole = a.half[0] + a.half[1]};
    vec4 c = b.half[0] + b.half[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}

/* e^x for x <= 0, relative error below 2.5e-7; NaN stays NaN. Polynomial of degree 6 on [-ln2/2, ln2/2]. */
INLINE vec exp_lanes(vec x) {
    const vec magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    x = pick(x < -87.0f, all(-87.0f), x);
    vec shifted = x * 1.44269504088896341f + magic;
    vec n = shifted - magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = all(1.0f / 720) * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    union { vec f; ivec i; } power = {.f = shifted};
    power.i = (power.i << 23) + 0x3f800000;
    return p * power.f;
}

/* scores[j] = q . keys[j] * scaling */
INLINE void score(const float *q, const float *keys, int64_t n, int64_t size, float scaling,
                  float *scores) {
    int64_t whole = size - size % LANES;
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        const float *k = keys + j * size;
        vec a[4] = {};
        for (int64_t d = 0; d < whole; d += LANES)
            for (int i = 0; i < 4; i++) a[i] += load(q + d) * load(k + i * size + d);
        for (int i = 0; i < 4; i++) scores[j + i] = sum_lanes(a[i]);
    }
    for (; j < n; j++) {
        vec a = {};
        for (int64_t d = 0; d < whole; d += LANES) a += load(q + d) * load(keys + j * size + d);
        scores[j] = sum_lanes(a);
    }
    if (whole < size)
        for (j = 0; j < n; j++)
            for (int64_t d = whole; d < size; d++) scores[j] += q[d] * keys[j * size + d];
    for (j = 0; j < n; j++) scores[j] *= scaling;
}

/* scores become weights that are not normalised yet; returns their sum. */
INLINE float soften(float *scores, int64_t n) {
    int64_t padded = (n + LANES - 1) / LANES * LANES;
    for (int64_t j = n; j < padded; j++) scores[j] = scores[0];
    vec top = load(scores);
    for (int64_t j = LANES; j < padded; j += LANES) {
        vec s = load(scores + j);
        top = pick(s > top, s, top);
    }
    float highest = top[0];
    for (int i = 1; i < LANES; i++) highest = top[i] > highest ? top[i] : highest;
    for (int64_t j = 0; j < padded; j += LANES)
        store(scores + j, exp_lanes(load(scores + j) - highest));
    for (int64_t j = n; j < padded; j++) scores[j] = 0;
    vec total = {};
    for (int64_t j = 0; j < padded; j += LANES) total += load(scores + j);
    return sum_lanes(total);
}

/* out = sum of weights[j] * values[j] / total, for `tiles` * LANES channels */
INLINE void weigh(const float *weights, const float *values, int64_t n, int64_t size, float total,
                  float *out, const int tiles) {
    vec even[4] = {}, odd[4] = {};
    int64_t j = 0;
    for (; j + 2 <= n; j += 2)
        for (int i = 0; i < tiles; i++) {
            const float *v = values + j * size + i * LANES;
            even[i] += weights[j] * load(v);
            odd[i] += weights[j + 1] * load(v + size);
        }
    if (j < n)
        for (int i = 0; i < tiles; i++) even[i] += weights[j] * load(values + j * size + i * LANES);
    for (int i = 0; i < tiles; i++) store(out + i * LANES, (even[i] + odd[i]) / total);
}

FOR_EACH_PROCESSOR
static void attend(const Work *w, int64_t item, float *scores) {
    int64_t row = item / w->heads, head = item % w->heads;
    int64_t size = w->pool.size, n = w->rows.lengths[row];
    int64_t group = head / (w->heads / w->pool.groups);
    int64_t at = (w->rows.slots[row] * w->pool.groups + group) * w->pool.positions * size;
    const float *values = w->pool.values + at;
    float *out = w->out + item * size;

    score(w->q.at + row * w->q.row + head * w->q.head, w->pool.keys + at, n, size, w->scaling, scores);
    float total = soften(scores, n);
    int64_t d = 0;
    for (; d + 4 * LANES <= size; d += 4 * LANES) weigh(scores, values + d, n, size, total, out + d, 4);
    for (; d + 2 * LANES <= size; d += 2 * LANES) weigh(scores, values + d, n, size, total, out + d, 2);
    for (; d + LANES <= size; d += LANES) weigh(scores, values + d, n, size, total, out + d, 1);
    for (; d < size; d++) {
        float sum = 0;
        for (int64_t j = 0; j < n; j++) sum += scores[j] * values[j * size + d];
        out[d] = sum / total;
    }
}

static void keep(float *pool, Strided from, const Work *w) {
    const Pool *p = &w->pool;
    for (int64_t row = 0; row < w->rows.rows; row++)
        for (int64_t g = 0; g < p->groups; g++) {
            int64_t slot = w->rows.slots[row], position = w->rows.lengths[row] - 1;
            int64_t at = (slot * p->groups + g) * p->positions + position;
            memcpy(pool + at * p->size, from.at + row * from.row + g * from.head,
                   p->size * sizeof(float));
        }
}

/* Threads that wait for work. One piece of work at a time, under `busy`. */

static struct {
    pthread_mutex_t busy, lock;
    pthread_cond_t begun, done;
    int64_t workers, running;
    uint64_t round;
    const Work *work;
    _Atomic int64_t next;
} crew = {.busy = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER,
          .begun = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};

static void take_items(const Work *w, int64_t who) {
    int64_t items = w->rows.rows * w->heads, item;
    while ((item = atomic_fetch_add(&crew.next, 1)) < items)
        attend(w, item, w->rows.scratch + who * w->rows.scratch_size);
}

static void *worker(void *argument) {
    int64_t who = (intptr_t)argument;
    uint64_t seen = 0;
    pthread_mutex_lock(&crew.lock);
    for (;;) {
        while (crew.round == seen || crew.work == NULL) pthread_cond_wait(&crew.begun, &crew.lock);
        seen = crew.round;
        const Work *w = crew.work;
        if (who >= w->rows.threads) continue;
        crew.running++;
        pthread_mutex_unlock(&crew.lock);
        take_items(w, who);
        pthread_mutex_lock(&crew.lock);
        if (--crew.running == 0) pthread_cond_signal(&crew.done);
    }
    return NULL;
}

static void hire(int64_t workers) {
    while (crew.workers < workers) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)(crew.workers + 1))) return;
        pthread_detach(thread);
        crew.workers++;
    }
}

static void share(const Work *w) {
    pthread_mutex_lock(&crew.busy);
    pthread_mutex_lock(&crew.lock);
    hire(w->rows.threads - 1);
    crew.work = w;
    crew.next = 0;
    crew.round++;
    pthread_cond_broadcast(&crew.begun);
    pthread_mutex_unlock(&crew.lock);
    take_items(w, 0);
    /* Who has not begun yet finds no work; who has is waited for. */
    pthread_mutex_lock(&crew.lock);
    crew.work = NULL;
    while (crew.running) pthread_cond_wait(&crew.done, &crew.lock);
    pthread_mutex_unlock(&crew.lock);
    pthread_mutex_unlock(&crew.busy);
}

/* Write k and v of every row at its last position, then attend. What only fills up is zero in `out`. */
void slot_attention(const Pool *pool, const Rows *rows, int64_t heads, float scaling,
                    const float *q, int64_t q_row, int64_t q_head,
                    const float *k, int64_t k_row, int64_t k_head,
                    const float *v, int64_t v_row, int64_t v_head, float *out) {
    Work w = {.pool = *pool, .rows = *rows, .q = {q, q_row, q_head}, .out = out, .heads = heads,
              .scaling = scaling};
    int64_t items = rows->rows * heads;
    keep(pool->keys, (Strided){k, k_row, k_head}, &w);
    keep(pool->values, (Strided){v, v_row, v_head}, &w);
    memset(out + items * pool->size, 0,
           (rows->all_rows - rows->rows) * heads * pool->size * sizeof(float));
    if (rows->threads > 1)
        share(&w);
    else
        for (int64_t item = 0; item < items; item++) attend(&w, item, rows->scratch);
}

/* Which source this was made from. */
const char *slot_kernel_source(void) { return SOURCE; }
