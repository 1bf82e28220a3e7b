/* bfloat16 matmul x W^T with packed weights, for AMX or AVX-512 BF16. See worker/cpu/linear_ops.py.
 *
 * M rows of x, N output features, K inputs, a multiple of 32. Sums are float32. Their order does
 * not depend on M, so the result of a row does not depend on other rows.
 *
 * With few rows, reading W takes most of the time. W is stored in tiles of 16 features by 32
 * inputs. A group is the sequence of tiles of 16 features. Several groups are read in parallel,
 * with prefetches, because this is faster than one stream.
 */
#include <stdint.h>

#include "thread_team.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>

#include "vector_math.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define HAS_AMX
#endif

enum { GROUPS = 4 };
#ifdef HAS_AMX
enum { MANY_ROWS = SIDE, AHEAD = 4 }; /* with more rows, two groups are multiplied at a time */
#else
enum { MANY_ROWS = 6, MOST_ROWS = 12, AHEAD = 16 }; /* 24 sums; the other registers hold operands */
#endif

/* Packs weight [N, K] into groups of 16 features. Each group has K / 32 tiles, [16 pairs of inputs,
 * 16 features, 2]. Missing features are zero. */
void make_tiles(const uint16_t *weight, uint16_t *tiles, int64_t N, int64_t K) {
    int64_t depth = K / DEPTH, num_groups = (N + SIDE - 1) / SIDE;
#pragma omp parallel for schedule(static)
    for (int64_t g = 0; g < num_groups; g++)
        for (int64_t d = 0; d < depth; d++)
            for (int64_t pair = 0; pair < SIDE; pair++)
                for (int64_t i = 0; i < SIDE; i++) {
                    uint16_t *to = tiles + ((g * depth + d) * SIDE + pair) * DEPTH + 2 * i;
                    const uint16_t *from = weight + (g * SIDE + i) * K + d * DEPTH + 2 * pair;
                    int is_there = g * SIDE + i < N;
                    to[0] = is_there ? from[0] : 0;
                    to[1] = is_there ? from[1] : 0;
                }
}

/* Prefetches a tile into the L1 cache. */
static inline void fetch_tile(const uint16_t *tile) {
    for (int line = 0; line < SIDE; line++) __builtin_prefetch(tile + line * DEPTH, 0, 3);
}

/* Returns the address of the tile that is AHEAD tiles after tile d, in this group or in the group
 * that follows it in the next round of num_groups groups. */
static inline const uint16_t *ahead(const uint16_t *group, int64_t d, int64_t depth, int64_t num_groups) {
    int64_t next = d + AHEAD;
    return group + (next < depth ? next : next + (num_groups - 1) * depth) * TILE;
}

/* Adds the bias (may be null) to sums [rows, 64], applies the activation, and writes `count`
 * columns to out [rows, N] from a column on. */
static inline void put(const float *sums, int64_t rows, uint16_t *out, int64_t N, int64_t column, int64_t count,
                       const float *bias, int activation) {
    for (int64_t m = 0; m < rows; m++)
        for (int64_t start = 0; start < count; start += SIDE) {
            float values[SIDE] __attribute__((aligned(64)));
            __mmask16 there = (__mmask16)((1u << (count - start < SIDE ? count - start : SIDE)) - 1);
            __m512 sum = _mm512_load_ps(sums + m * 64 + start);
            if (bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(there, bias + column + start));
            if (activation == SWISH) {
                _mm512_store_ps(values, sum);
                for (int i = 0; i < SIDE; i++) values[i] *= sigmoid(values[i]);
                sum = _mm512_load_ps(values);
            }
            _mm256_mask_storeu_epi16(out + m * N + column + start, there, (__m256i)_mm512_cvtneps_pbh(sum));
        }
}

#ifdef HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>

enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* for arch_prctl */

/* Returns whether the operating system lets this process use AMX tiles; asks for it. */
int has_tiles(void) { return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0; }

/* Tiles 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 weights. */
struct configuration configure_tiles(int64_t M) {
    struct configuration before, made = {.palette = 1};
    _tile_storeconfig(&before);
    for (int tile = 0; tile < 8; tile++) {
        made.bytes_a_row[tile] = 64;
        made.rows[tile] = tile < 6 && M < SIDE ? (uint8_t)M : SIDE;
    }
    _tile_loadconfig(&made);
    return before;
}

void restore_tiles(struct configuration before) { _tile_loadconfig(&before); }

/* Multiplies up to 16 rows by four groups: sums [16, 64]. */
static void four_groups(const uint16_t *x, const uint16_t *tiles, int64_t depth, float *sums) {
    const uint16_t *one = tiles, *two = one + depth * TILE, *three = two + depth * TILE, *four = three + depth * TILE;
    int64_t stride = depth * DEPTH * 2;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < depth; d++) {
        fetch_tile(ahead(one, d, depth, 4));
        fetch_tile(ahead(two, d, depth, 4));
        fetch_tile(ahead(three, d, depth, 4));
        fetch_tile(ahead(four, d, depth, 4));
        _tile_loadd(4, x + d * DEPTH, stride);
        _tile_loadd(6, one + d * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, two + d * TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(6, three + d * TILE, 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, four + d * TILE, 64);
        _tile_dpbf16ps(3, 4, 7);
    }
    _tile_stored(0, sums, 256);
    _tile_stored(1, sums + 16, 256);
    _tile_stored(2, sums + 32, 256);
    _tile_stored(3, sums + 48, 256);
}

/* Multiplies up to 16 rows by one group: writes 16 columns of sums [16, 64]. */
static void one_group(const uint16_t *x, const uint16_t *tiles, int64_t depth, float *sums) {
    _tile_zero(0);
    for (int64_t d = 0; d < depth; d++) {
        fetch_tile(ahead(tiles, d, depth, 1));
        _tile_loadd(4, x + d * DEPTH, depth * DEPTH * 2);
        _tile_loadd(6, tiles + d * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, sums, 256);
}

/* Multiplies two times 16 rows by two groups: writes 32 columns of sums [32, 64]. */
static void two_by_two(const uint16_t *x, const uint16_t *y, const uint16_t *tiles, int64_t depth, int is_first, float *sums) {
    const uint16_t *one = tiles, *two = one + depth * TILE;
    int64_t stride = depth * DEPTH * 2;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < depth; d++) {
        if (is_first) {
            fetch_tile(ahead(one, d, depth, 2));
            fetch_tile(ahead(two, d, depth, 2));
        }
        _tile_loadd(4, x + d * DEPTH, stride);
        _tile_loadd(6, one + d * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, two + d * TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, y + d * DEPTH, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 256);
    _tile_stored(1, sums + 16, 256);
    _tile_stored(2, sums + 16 * 64, 256);
    _tile_stored(3, sums + 16 * 64 + 16, 256);
}

/* Computes the columns of out [M, N] for `taken` groups, from group `first` on. */
static void some_groups(const uint16_t *x, const uint16_t *tiles, const float *bias, uint16_t *out, int64_t M, int64_t N, int64_t K,
                        int activation, int64_t first, int64_t taken) {
    int64_t depth = K / DEPTH, column = first * SIDE, count = column + taken * SIDE <= N ? taken * SIDE : N - column;
    const uint16_t *from = tiles + first * depth * TILE;
    float sums[2 * SIDE * 64] __attribute__((aligned(64)));
    if (M <= SIDE) {
        if (taken == GROUPS) four_groups(x, from, depth, sums);
        else
            for (int64_t g = 0; g < taken; g++) one_group(x, from + g * depth * TILE, depth, sums + g * SIDE);
        put(sums, M, out, N, column, count, bias, activation);
        return;
    }
    for (int64_t m = 0; m < M; m += 2 * SIDE) {
        /* the last block ends at row M: some rows are computed twice, with equal results */
        int64_t a = M < 2 * SIDE ? 0 : (m + 2 * SIDE <= M ? m : M - 2 * SIDE);
        int64_t b = M < 2 * SIDE ? M - SIDE : a + SIDE;
        if (taken == 2) two_by_two(x + a * K, x + b * K, from, depth, m == 0, sums);
        else {
            one_group(x + a * K, from, depth, sums);
            one_group(x + b * K, from, depth, sums + SIDE * 64);
        }
        put(sums, SIDE, out + a * N, N, column, count, bias, activation);
        put(sums + SIDE * 64, SIDE, out + b * N, N, column, count, bias, activation);
    }
}

#else
int has_tiles(void) { return 1; }
struct configuration configure_tiles(int64_t M) { return (struct configuration){0}; }
void restore_tiles(struct configuration before) {}

/* Multiplies `rows` rows by `groups` groups: sums [rows, 64]. Both numbers must be compile-time
 * constants. */
static inline __attribute__((always_inline)) void rows_by_groups(const int rows, const int groups, const uint16_t *x, int64_t K,
                                                                 const uint16_t *tiles, int is_first, float *sums) {
    int64_t depth = K / DEPTH;
    __m512 sum[MOST_ROWS][GROUPS];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int g = 0; g < groups; g++) sum[r][g] = _mm512_setzero_ps();
    for (int64_t d = 0; d < depth; d++) {
        for (int g = 0; is_first && g < groups; g++) fetch_tile(ahead(tiles + g * depth * TILE, d, depth, groups));
        for (int64_t pair = 0; pair < SIDE; pair++) {
            __m512bh weights[GROUPS];
#pragma GCC unroll 4
            for (int g = 0; g < groups; g++) weights[g] = (__m512bh)_mm512_load_si512(tiles + (g * depth + d) * TILE + pair * DEPTH);
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++) {
                int32_t bits;
                memcpy(&bits, x + r * K + d * DEPTH + 2 * pair, 4);
                __m512bh inputs = (__m512bh)_mm512_set1_epi32(bits);
#pragma GCC unroll 4
                for (int g = 0; g < groups; g++) sum[r][g] = _mm512_dpbf16_ps(sum[r][g], inputs, weights[g]);
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int g = 0; g < groups; g++) _mm512_store_ps(sums + r * 64 + g * SIDE, sum[r][g]);
}

#define CASE(rows, groups) \
    case 16 * (rows) + (groups): rows_by_groups(rows, groups, x, K, tiles, is_first, sums); break;
#define CASES(rows) CASE(rows, 1) CASE(rows, 2)

static void some_rows(int64_t rows, int64_t groups, const uint16_t *x, int64_t K, const uint16_t *tiles, int is_first, float *sums) {
    switch (16 * rows + groups) {
        CASES(1) CASES(2) CASES(3) CASES(4) CASES(5) CASES(6) CASES(7) CASES(8) CASES(9) CASES(10) CASES(11) CASES(12)
        CASE(1, 4) CASE(2, 4) CASE(3, 4) CASE(4, 4) CASE(5, 4) CASE(6, 4)
    }
}

/* Computes the columns of out [M, N] for `taken` groups, from group `first` on. */
static void some_groups(const uint16_t *x, const uint16_t *tiles, const float *bias, uint16_t *out, int64_t M, int64_t N, int64_t K,
                        int activation, int64_t first, int64_t taken) {
    int64_t depth = K / DEPTH, column = first * SIDE, count = column + taken * SIDE <= N ? taken * SIDE : N - column;
    int64_t blocks = (M + MOST_ROWS - 1) / MOST_ROWS, rows = (M + blocks - 1) / blocks;
    const uint16_t *from = tiles + first * depth * TILE;
    float sums[MOST_ROWS * 64] __attribute__((aligned(64)));
    for (int64_t m = 0; m < M; m += rows) {
        int64_t here = m + rows <= M ? rows : M - m;
        if (taken == 3) { /* a rest of three groups has no case of its own */
            some_rows(here, 2, x + m * K, K, from, m == 0, sums);
            some_rows(here, 1, x + m * K, K, from + 2 * depth * TILE, m == 0, sums + 2 * SIDE);
        } else some_rows(here, taken, x + m * K, K, from, m == 0, sums);
        put(sums, here, out + m * N, N, column, count, bias, activation);
    }
}
#endif

void multiply_groups(const uint16_t *x, const uint16_t *tiles, const float *bias, uint16_t *out, int64_t M, int64_t N, int64_t K,
                     int activation) {
    int64_t num_groups = (N + SIDE - 1) / SIDE, most = M > MANY_ROWS ? 2 : GROUPS;
    /* guided: long runs make use of the prefetches; short ones at the end balance threads that were
     * preempted */
#pragma omp for schedule(guided)
    for (int64_t part = 0; part < (num_groups + most - 1) / most; part++) {
        int64_t first = part * most;
        some_groups(x, tiles, bias, out, M, N, K, activation, first, first + most <= num_groups ? most : num_groups - first);
    }
}

/* out [M, N] = activation(x [M, K] W^T + bias). */
void multiply_tiles(const uint16_t *x, const uint16_t *tiles, const float *bias, uint16_t *out, int64_t M, int64_t N, int64_t K,
                    int activation) {
#pragma omp parallel
    {
        struct configuration before = configure_tiles(M);
        multiply_groups(x, tiles, bias, out, M, N, K, activation);
        restore_tiles(before);
    }
}
#else
int has_tiles(void) { return 0; }
void make_tiles(const uint16_t *weight, uint16_t *tiles, int64_t N, int64_t K) {}
struct configuration configure_tiles(int64_t M) { return (struct configuration){0}; }
void restore_tiles(struct configuration before) {}
void multiply_groups(const uint16_t *x, const uint16_t *tiles, const float *bias, uint16_t *out, int64_t M, int64_t N, int64_t K,
                     int activation) {}
void multiply_tiles(const uint16_t *x, const uint16_t *tiles, const float *bias, uint16_t *out, int64_t M, int64_t N, int64_t K,
                    int activation) {}
#endif
