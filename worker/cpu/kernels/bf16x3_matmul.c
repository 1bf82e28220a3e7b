/* bf16x3: float32 matmul computed as bfloat16 matmuls with AMX. See worker/cpu/linear_ops.py.
 *
 * A float32 number is split exactly into three bfloat16 parts of 8 bits each: high + middle + low.
 * Of the nine products of parts, six are computed and summed in float32. The other three are below
 * 2^-24 of |a||b|, which is the rounding error of a float32 product. AMX is fast enough for six
 * products to take less time than one float32 product. With two parts (16 bits) there are three
 * products, and the error is below 2^-16. Source: Henry, Tang and Heinecke 2019, arXiv:1904.06376.
 *
 * out [M, N] = A [M, K] B [K, N]. The longer of A's rows and B's columns is divided among the
 * threads: each packs its "own" part. The other operand is packed once for all threads ("shared").
 * The order of sums along K does not depend on M, N or the number of threads, so the result of a
 * row of A depends on that row and B alone.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "thread_team.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include <immintrin.h>
#include <pthread.h>

enum { BLOCK = 2 * SIDE, CACHED = 1 << 20 };

int has_splits(void) { return has_tiles(); }

/* An operand: its numbers, and its strides along its side (A's rows or B's columns) and along K.
 * One of the strides is 1. */
struct operand {
    const float *numbers;
    int64_t count, side_step, k_step;
};

static inline __mmask16 first(int64_t count) { return count >= SIDE ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1); }

static inline __m512i upper_halves(__m512i bits) { return _mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000)); }

/* Returns x rounded to the nearest bfloat16, ties away from zero, in the upper halves. Subtracts it
 * from x. */
static inline __m512i part_of(__m512 *x) {
    __m512i part = upper_halves(_mm512_add_epi32(_mm512_castps_si512(*x), _mm512_set1_epi32(0x8000)));
    *x = _mm512_sub_ps(*x, _mm512_castsi512_ps(part));
    return part;
}

static inline void store_pair(uint16_t *to, __m512i low, __m512i high) {
    _mm512_store_si512(to, _mm512_or_si512(_mm512_srli_epi32(low, 16), high));
}

/* Transposes a [16, 16] matrix of 32-bit numbers. */
static inline void transpose(__m512 rows[SIDE]) {
    __m512i r[SIDE], t[SIDE];
    for (int i = 0; i < SIDE; i++) r[i] = _mm512_castps_si512(rows[i]);
    for (int i = 0; i < SIDE; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < SIDE; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
    for (int i = 0; i < SIDE; i++) rows[i] = _mm512_castsi512_ps(r[i]);
}

/* Packs a cell of an operand, 16 along its side by 32 along K, into one tile per part. Missing
 * numbers are zero. A row of a tile of A is one row of A; a row of a tile of B is a pair along K.
 * Pairs are (0, 16), (1, 17), and so on: any order is correct if both operands use the same one. */
static void pack_cell(struct operand from, int64_t side, int64_t k, int64_t K, int is_b, int parts, uint16_t *to) {
    const float *numbers = from.numbers + side * from.side_step + k * from.k_step;
    int lies_along_k = from.k_step == 1;
    int64_t there = from.count - side, depth = K - k, num_rows = lies_along_k ? there : depth;
    int64_t step = lies_along_k ? from.side_step : from.k_step, second = lies_along_k ? SIDE : SIDE * from.k_step;
    int64_t num_second = lies_along_k ? there : depth - SIDE;
    __mmask16 low = first(lies_along_k ? depth : there), high = first(lies_along_k ? depth - SIDE : there);
    __m512 x[SIDE], y[SIDE];
    const float *next = numbers + DEPTH * from.k_step;
    for (int i = 0; i < SIDE; i++) {
        _mm_prefetch((const char *)(next + i * step), _MM_HINT_T0);
        _mm_prefetch((const char *)(next + i * step + second), _MM_HINT_T0);
        x[i] = _mm512_maskz_loadu_ps(i < num_rows ? low : 0, numbers + i * step);
        y[i] = _mm512_maskz_loadu_ps(i < num_second ? high : 0, numbers + i * step + second);
    }
    if (lies_along_k == is_b) {
        transpose(x);
        transpose(y);
    }
    for (int i = 0; i < SIDE; i++, to += DEPTH) {
        store_pair(to, part_of(&x[i]), part_of(&y[i]));
        store_pair(to + TILE, part_of(&x[i]), part_of(&y[i]));
        if (parts == 2) continue;
        /* the remainder is stored without rounding, so that NaN stays NaN */
        store_pair(to + 2 * TILE, _mm512_castps_si512(x[i]), upper_halves(_mm512_castps_si512(y[i])));
    }
}

enum { HIGH, MIDDLE, LOW };
#define LOAD(tile, panel, part) _tile_loadd(tile, panel + d * parts * TILE + (part) * TILE, 64)
#define MULTIPLY()               \
    _tile_dpbf16ps(0, 4, 6);     \
    _tile_dpbf16ps(1, 4, 7);     \
    _tile_dpbf16ps(2, 5, 6);     \
    _tile_dpbf16ps(3, 5, 7)
#define MULTIPLY_THEN_A(part)    \
    _tile_dpbf16ps(0, 4, 6);     \
    _tile_dpbf16ps(1, 4, 7);     \
    LOAD(4, a, part);            \
    _tile_dpbf16ps(2, 5, 6);     \
    _tile_dpbf16ps(3, 5, 7);     \
    LOAD(5, a_two, part)
#define MULTIPLY_THEN_B(part)    \
    _tile_dpbf16ps(0, 4, 6);     \
    _tile_dpbf16ps(2, 5, 6);     \
    LOAD(6, b, part);            \
    _tile_dpbf16ps(1, 4, 7);     \
    _tile_dpbf16ps(3, 5, 7);     \
    LOAD(7, b_two, part)

/* Multiplies two panels of A by two of B and adds the result to sums [32, 32], whose rows are
 * `step` numbers apart. With is_first, sums are overwritten. */
static inline void multiply_parts(const uint16_t *a, const uint16_t *b, int64_t depth, const int parts, int is_first, float *sums,
                                  int64_t step) {
    const uint16_t *a_two = a + depth * parts * TILE, *b_two = b + depth * parts * TILE;
    float *below = sums + SIDE * step;
    if (is_first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, step * 4);
        _tile_loadd(1, sums + SIDE, step * 4);
        _tile_loadd(2, below, step * 4);
        _tile_loadd(3, below + SIDE, step * 4);
    }
    for (int64_t d = 0; d < depth; d++) {
        /* each tile is loaded as soon as its register is free */
        LOAD(4, a, HIGH);
        LOAD(6, b, parts - 1);
        LOAD(5, a_two, HIGH);
        LOAD(7, b_two, parts - 1);
        if (parts == 3) {
            MULTIPLY_THEN_B(MIDDLE);
            MULTIPLY_THEN_A(MIDDLE);
            MULTIPLY_THEN_B(HIGH);
            MULTIPLY_THEN_A(LOW);
            MULTIPLY_THEN_A(HIGH);
        } else {
            MULTIPLY_THEN_B(HIGH);
            MULTIPLY_THEN_A(MIDDLE);
        }
        MULTIPLY();
    }
    _tile_stored(0, sums, step * 4);
    _tile_stored(1, sums + SIDE, step * 4);
    _tile_stored(2, below, step * 4);
    _tile_stored(3, below + SIDE, step * 4);
}

static void multiply_block(const uint16_t *a, const uint16_t *b, int64_t depth, int parts, int is_first, float *sums, int64_t step) {
    if (parts == 3) multiply_parts(a, b, depth, 3, is_first, sums, step);
    else multiply_parts(a, b, depth, 2, is_first, sums, step);
}

/* The same for a block that extends beyond the edge of out. */
static void multiply_edge(const uint16_t *a, const uint16_t *b, int64_t depth, int parts, int is_first, float *out, int64_t N,
                          int64_t rows, int64_t columns) {
    float sums[BLOCK * BLOCK] __attribute__((aligned(64)));
    if (!is_first)
        for (int64_t m = 0; m < rows; m++) memcpy(sums + m * BLOCK, out + m * N, columns * sizeof(float));
    multiply_block(a, b, depth, parts, is_first, sums, BLOCK);
    for (int64_t m = 0; m < rows; m++) memcpy(out + m * N, sums + m * BLOCK, columns * sizeof(float));
}

/* Working space of a thread, kept for its next call: new memory would take as long as writing to
 * it. It is freed when the thread ends. */
struct room {
    uint16_t *numbers;
    int64_t count;
};
enum { SHARED, OWN, NUM_ROOMS };
static pthread_key_t kept;
static pthread_once_t is_made = PTHREAD_ONCE_INIT;
static int has_key;

static void release(void *rooms) {
    for (int which = 0; which < NUM_ROOMS; which++) free(((struct room *)rooms)[which].numbers);
    free(rooms);
}

static void make_key(void) { has_key = !pthread_key_create(&kept, release); }

static uint16_t *room_for(int64_t count, int which) {
    pthread_once(&is_made, make_key);
    if (!has_key) return NULL;
    struct room *rooms = pthread_getspecific(kept);
    if (!rooms) {
        rooms = calloc(NUM_ROOMS, sizeof(struct room));
        if (!rooms || pthread_setspecific(kept, rooms)) {
            free(rooms);
            return NULL;
        }
    }
    struct room *room = rooms + which;
    if (room->count < count) {
        free(room->numbers);
        room->numbers = aligned_alloc(64, count * sizeof(uint16_t));
        room->count = room->numbers ? count : 0;
    }
    return room->numbers;
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* out = A B, or out += A B with `adds`, with three or two parts per number. A has strides from row
 * to row and along K, B from column to column and along K. One stride of each pair is 1. Returns 0,
 * or 1 if there was no memory. */
int multiply_split(const float *a, int64_t a_step, int64_t a_k_step, const float *b, int64_t b_step, int64_t b_k_step, float *out,
                   int64_t M, int64_t N, int64_t K, int parts, int adds) {
    struct operand rows = {a, M, a_step, a_k_step}, columns = {b, N, b_step, b_k_step};
    int owns_rows = M >= N, has_failed = 0;
    struct operand own = owns_rows ? rows : columns, shared = owns_rows ? columns : rows;
    int64_t cell = parts * TILE;
    /* If out does not fit in the cache, large blocks reduce the number of passes over out and over
     * the shared operand. Otherwise small blocks keep the working space small. */
    int is_large = M * N > CACHED;
    int64_t own_block = (is_large ? 8 : 2) * BLOCK, most_depth = is_large ? 18 : 12;
    int64_t num_panels = (shared.count + BLOCK - 1) / BLOCK * 2, cells = (K + DEPTH - 1) / DEPTH;
    int64_t num_rounds = (cells + most_depth - 1) / most_depth, most = (cells + num_rounds - 1) / num_rounds;
    uint16_t *packed = room_for(num_panels * most * cell, SHARED);
    if (!packed) return 1;
#pragma omp parallel
    {
        struct configuration before = configure_tiles(SIDE);
        uint16_t *mine = room_for(own_block / SIDE * most * cell, OWN);
        if (!mine) {
#pragma omp atomic write
            has_failed = 1;
        }
        for (int64_t k = 0; k < K; k += most * DEPTH) {
            int64_t depth = least((K - k + DEPTH - 1) / DEPTH, most), panel = depth * cell;
            if (shared.k_step == 1) {
#pragma omp for schedule(static)
                for (int64_t p = 0; p < num_panels; p++)
                    for (int64_t d = 0; d < depth; d++)
                        pack_cell(shared, p * SIDE, k + d * DEPTH, K, owns_rows, parts, packed + p * panel + d * cell);
            } else {
#pragma omp for schedule(static)
                for (int64_t d = 0; d < depth; d++)
                    for (int64_t p = 0; p < num_panels; p++)
                        pack_cell(shared, p * SIDE, k + d * DEPTH, K, owns_rows, parts, packed + p * panel + d * cell);
            }
#pragma omp for schedule(dynamic)
            for (int64_t o = 0; o < (own.count + own_block - 1) / own_block; o++) {
                if (!mine) continue;
                int64_t start = o * own_block, end = least(start + own_block, own.count);
                for (int64_t d = 0; d < depth; d++)
                    for (int64_t p = 0; p < (end - start + BLOCK - 1) / BLOCK * 2; p++)
                        pack_cell(own, start + p * SIDE, k + d * DEPTH, K, !owns_rows, parts, mine + p * panel + d * cell);
                for (int64_t s = 0; s < shared.count; s += BLOCK)
                    for (int64_t i = start; i < end; i += BLOCK) {
                        const uint16_t *m = mine + (i - start) / SIDE * panel, *l = packed + s / SIDE * panel;
                        int64_t row = owns_rows ? i : s, column = owns_rows ? s : i;
                        int64_t num_rows = least(M - row, BLOCK), num_columns = least(N - column, BLOCK);
                        float *to = out + row * N + column;
                        int is_first = k == 0 && !adds;
                        if (num_rows == BLOCK && num_columns == BLOCK)
                            multiply_block(owns_rows ? m : l, owns_rows ? l : m, depth, parts, is_first, to, N);
                        else multiply_edge(owns_rows ? m : l, owns_rows ? l : m, depth, parts, is_first, to, N, num_rows, num_columns);
                    }
            }
        }
        restore_tiles(before);
    }
    return has_failed;
}
#else
int has_splits(void) { return 0; }
int multiply_split(const float *a, int64_t a_step, int64_t a_k_step, const float *b, int64_t b_step, int64_t b_k_step, float *out,
                   int64_t M, int64_t N, int64_t K, int parts, int adds) {
    return 1;
}
#endif
